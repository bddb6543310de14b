"""`python -m agentr1`: the same as the console script `agentr1`."""

from agentr1.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
