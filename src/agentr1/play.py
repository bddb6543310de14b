"""`agentr1 play`: watch a policy solve rows, turn by turn, in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape

from agentr1.commandline import guarded, recipe_parser, split_arguments
from agentr1.engines.base import Sampling
from agentr1.loops import finish
from agentr1.rollout import rollout_batch
from agentr1.scoring import Scored, score
from agentr1.systems import load_player

_COLOURS = {"system": "dim", "user": "cyan", "assistant": "green", "tool": "yellow"}


def play(
    name: str,
    overrides: Sequence[str] = (),
    policy: str | None = None,
    count: int = 3,
    temperature: float = 0.0,
) -> list[Scored]:
    """Play the first test rows of a recipe and print every message.

    Args:
        name: recipe.
        overrides: of the recipe's keys.
        policy: see `systems.find_policy`.
        count: rows to play.
        temperature: 0 is greedy.
    """
    player = load_player(name, overrides, policy)
    rows = player.task.test[:count]
    samplings = [Sampling(max_tokens=1, temperature=temperature, seed=i) for i in range(len(rows))]
    trajectories = finish(
        rollout_batch(
            rows,
            player.task.env_factory,
            player.codec,
            player.engine,
            limits=player.limits,
            samplings=samplings,
        )
    )
    scored = score(trajectories, player.task.metrics)
    console = Console()
    for record in scored:
        _show(console, record)
    return scored


def _show(console: Console, record: Scored) -> None:
    trajectory = record.trajectory
    console.rule(f"row {record.row_id}")
    for message in trajectory.messages:
        colour = _COLOURS[message.role]
        console.print(f"[bold {colour}]{message.role}[/] {escape(message.content)}")
    gold = trajectory.row.get("answers") or trajectory.row.get("answer")
    values = ", ".join(f"{metric} {value:g}" for metric, value in record.values.items())
    console.print(
        f"[dim]gold {escape(str(gold))} · {values} · stopped: {trajectory.stop_reason} · "
        f"process rewards {list(trajectory.process_rewards)}[/]"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """`agentr1 play RECIPE [--model M] [--rows N] [--sample T] [--key value ...]`."""
    parser = recipe_parser("play", "Watch a policy solve a recipe's test rows.")
    parser.add_argument("--model", help="model id or folder, adapter, or run folder")
    parser.add_argument("--rows", type=int, default=3, help="rows to play")
    parser.add_argument("--sample", type=float, default=0.0, help="temperature, 0 is greedy")
    args, overrides = split_arguments(parser, argv)
    return guarded(
        lambda: play(args.recipe, overrides, args.model, args.rows, args.sample), args.debug
    )
