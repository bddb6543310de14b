"""Dynamic sampling: groups that teach nothing are replaced by groups of other rows.

Layer 5. A group whose rollouts were all paid alike has advantage 0 everywhere (DAPO, arXiv
2503.14476). Whole groups are replaced, for a bounded number of rounds which is the same on every
process. The rows drawn are a function of seed, step and round, so a resumed run draws what the
uninterrupted one would have drawn, and there is no iterator to save. Knows rows, rewards and
groups, nothing of trainers, advantages or tokens.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from agentr1.types import Trajectory


@dataclasses.dataclass(slots=True)
class PlayedBatch:
    """Whole groups of one process with their rewards.

    Attributes:
        rows: B of them.
        trajectories: theirs.
        rewards: (B, F), one column per reward function.
        extras: columns that the reward functions logged, B values each.
    """

    rows: list[dict[str, Any]]
    trajectories: list[Trajectory]
    rewards: Tensor
    extras: dict[str, list[Any]] = dataclasses.field(default_factory=dict)

    def take(self, group: int, other: PlayedBatch, others_group: int, size: int) -> None:
        """Put a group of another batch in the place of one of this."""
        mine, theirs = (slice(g * size, (g + 1) * size) for g in (group, others_group))
        self.rows[mine] = other.rows[theirs]
        self.trajectories[mine] = other.trajectories[theirs]
        self.rewards[mine] = other.rewards[theirs]
        for name in self.extras.keys() | other.extras.keys():
            column = self.extras.setdefault(name, [None] * len(self.rows))
            column[mine] = other.extras.get(name, [None] * len(other.rows))[theirs]


def refill(
    batch: PlayedBatch,
    group_size: int,
    rounds: int,
    *,
    silent: Callable[[PlayedBatch], Sequence[int]],
    most: Callable[[int], int],
    play: Callable[[int, int], PlayedBatch],
) -> int:
    """Replace the silent groups of a batch until none is left or the rounds are over.

    Args:
        batch: changed in place.
        group_size: G.
        rounds: at most; every process takes part in each until none misses a group.
        silent: positions of a batch's silent groups.
        most: the largest of a number over all processes.
        play: plays so many groups of new rows in round n; as many on every process, so that
            rewards can be gathered. What a process does not need is dropped.

    Returns:
        Groups of this process that are still silent.
    """
    missing = list(silent(batch))
    for n in range(rounds):
        wanted = most(len(missing))
        if not wanted:
            break
        fresh = play(wanted, n)
        spoken = sorted(set(range(wanted)).difference(silent(fresh)))
        for group, replacement in zip(missing, spoken, strict=False):
            batch.take(group, fresh, replacement, group_size)
        missing = missing[len(spoken) :]
    return len(missing)


def draw_rows(
    dataset: Sequence[Any],
    groups: int,
    taken: Sequence[Mapping[str, Any]],
    *,
    share: tuple[int, int],
    place: tuple[int, ...],
) -> list[dict[str, Any]]:
    """Rows of the dataset that are new to this process's batch.

    No two processes draw the same ones, but one may draw what another has been given.

    Args:
        dataset: of training rows, with a length and positions.
        groups: rows to draw.
        taken: rows of the batch, drawn again only where the dataset has too few others.
        share: index of this process and number of processes.
        place: seed, step, round: what makes the draw another.
    """
    order = list(range(len(dataset)))
    random.Random(repr(place)).shuffle(order)
    mine = order[share[0] :: share[1]] or order
    kept = [dict(row) for row in taken]
    fresh = (i for i in mine if dict(dataset[i]) not in kept)
    chosen = itertools.islice(itertools.chain(fresh, itertools.cycle(mine)), groups)
    return [dict(dataset[i]) for i in chosen]
