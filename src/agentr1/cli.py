"""The `agentr1` command: which verb, nothing else. Each verb's module parses its own options."""

from __future__ import annotations

import importlib
import logging
import os
import sys
import warnings
from collections.abc import Sequence

VERBS = {
    "train": "train a policy with reinforcement learning and test it",
    "sft": "fine-tune a policy on demonstrations",
    "demonstrate": "write ideal searches for a recipe's training rows",
    "eval": "evaluate a policy on a recipe's rows",
    "play": "watch a policy solve rows, turn by turn",
    "compare": "compare the evaluations of two runs",
    "ablate": "train with and without masks and process rewards",
    "algorithms": "compare what a task's recipes gain",
    "data": "prepare a published question set and its passages",
    "index": "build an index of a corpus, and measure how good it is",
    "serve-retriever": "serve an index to other machines over HTTP",
}
_MODULES = {
    "data": "agentr1.prepare",
    "eval": "agentr1.evaluate",
    "algorithms": "agentr1.algorithm_table",
    "serve-retriever": "agentr1.serve_retriever",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Dispatch to the verb's `main`."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments or arguments[0] not in VERBS:
        lines = "\n".join(f"  {verb:17}{what}" for verb, what in VERBS.items())
        print(f"usage: agentr1 VERB ... (agentr1 VERB --help tells more)\n\n{lines}")
        known = not arguments or arguments[0] in ("-h", "--help", "help")
        return 0 if known else _unknown(arguments[0])
    _quieten()
    sys.path.insert(0, os.getcwd())  # a recipe names the user's own modules, as with `python -m`
    verb = arguments[0]
    try:
        module = importlib.import_module(_MODULES.get(verb, f"agentr1.{verb}"))
        return module.main(arguments[1:])
    except KeyboardInterrupt:  # in the seconds that importing takes
        print("interrupted", file=sys.stderr)
        return 130


def _quieten() -> None:
    """Silence libraries that chatter over the progress bar; a user's own settings win."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    if not sys.warnoptions:
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
        warnings.filterwarnings("ignore", message=".*pin_memory.*")


def _unknown(verb: str) -> int:
    print(f"error: there is no verb {verb!r}", file=sys.stderr)
    return 2
