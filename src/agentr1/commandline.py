"""What all verbs share on the command line: overrides pass through, mistakes become one line.

A user's mistake ends with `error: ...` and exit code 2; `--debug` shows the traceback as well.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any


class _RecipeParser(argparse.ArgumentParser):
    """A parser whose help ends with the keys of a recipe.

    Attributes:
        trl: name of TRL's class that the keys of training come from.
    """

    trl = "GRPOConfig"

    def format_help(self) -> str:
        return f"{super().format_help()}\n{_recipe_keys(self.trl)}"


def recipe_parser(verb: str, description: str, trl: str = "GRPOConfig") -> argparse.ArgumentParser:
    """A parser for `agentr1 VERB RECIPE [--key value ...]`; add the verb's own options to it.

    Args:
        verb: as it is typed.
        description: for its help.
        trl: name of TRL's class that the verb reads the keys of training into.
    """
    parser = _RecipeParser(
        prog=f"agentr1 {verb}",
        description=description,
        epilog="Every further --key value overrides that key of the recipe.",
        allow_abbrev=False,
    )
    parser.add_argument("recipe", help="x (recipes/x/grpo.yaml), x/y (recipes/x/y.yaml), or a file")
    add_debug(parser)
    parser.trl = trl
    return parser


def _recipe_keys(trl: str) -> str:
    """Our own keys with what they do; TRL's hundreds are only pointed to."""
    # Imported here: what holds the keys imports TRL, which costs seconds.
    from agentr1.config import AgentConfig
    from agentr1.credit_config import CreditConfig
    from agentr1.recipe_arguments import RecipeArguments

    groups: dict[str, Any] = {"data, environment, tools, rewards": RecipeArguments}
    if trl == "GRPOConfig":
        groups |= {"rollouts": AgentConfig, "credit, critic, collapse guard": CreditConfig}
    listed = argparse.ArgumentParser(
        usage=argparse.SUPPRESS,
        epilog=f"Every key of TRL's {trl} and ModelConfig works too.",
        add_help=False,
        formatter_class=functools.partial(argparse.HelpFormatter, max_help_position=30),
    )
    for title, kind in groups.items():
        group = listed.add_argument_group(title)
        for field in dataclasses.fields(kind):
            if field.name in kind.__annotations__:  # not inherited
                group.add_argument(f"--{field.name}", metavar="", help=_help_of(field))
    return listed.format_help()


def _help_of(field: dataclasses.Field[Any]) -> str:
    """What a key does, and its default unless that is nothing."""
    made = field.default_factory
    default = field.default if made is dataclasses.MISSING else " ".join(made())
    shown = str(default).lower() if isinstance(default, bool) else default
    text = field.metadata["help"] + ("" if shown in (None, "") else f" ({shown})")
    return text.replace("%", "%%")


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
