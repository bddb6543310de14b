"""What all verbs share on the command line: overrides pass through, mistakes become one line.

A user's mistake ends with `error: ...` and exit code 2; `--debug` shows the traceback as well.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence


def recipe_parser(verb: str, description: str) -> argparse.ArgumentParser:
    """A parser for `agentr1 VERB RECIPE [--key value ...]`; add the verb's own options to it."""
    parser = argparse.ArgumentParser(
        prog=f"agentr1 {verb}",
        description=description,
        epilog="Every further --key value overrides that key of the recipe.",
        allow_abbrev=False,
    )
    parser.add_argument("recipe", help="x for recipes/x/grpo.yaml, x/y for recipes/x/y.yaml")
    add_debug(parser)
    return parser


def add_debug(parser: argparse.ArgumentParser) -> None:
    """Give a parser the `--debug` option that `guarded` reads."""
    parser.add_argument("--debug", action="store_true", help="show tracebacks")


def guarded(work: Callable[[], object], debug: bool) -> int:
    """Run a verb and turn what a user can mend into one line.

    Args:
        work: the verb, arguments bound.
        debug: let exceptions through.

    Returns:
        The exit code: 0, or 2 after a mistake, or 130 after an interrupt.
    """
    try:
        work()
    except KeyboardInterrupt as interrupt:
        if os.environ.get("RANK", "0") == "0":  # all processes of a launch are told alike
            print(str(interrupt) or "interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        if debug:
            raise
        print(f"error: {error}\n(--debug shows the traceback)", file=sys.stderr)
        return 2
    return 0


def split_arguments(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None
) -> tuple[argparse.Namespace, list[str]]:
    """The verb's own options, and the recipe's overrides."""
    return parser.parse_known_args(argv)
