"""From the episodes of a batch to the tensors that TRL and `advantages.py` compute on.

Layer 5. Trajectories and segments are lists of different lengths, each belonging to a row. Called
by the trainer; knows no algorithm.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from agentr1.segments import flatten
from agentr1.types import OBSERVATION_TURN, Row, Segment, Trajectory


def training_segments(rows: Sequence[Row], trajectories: Sequence[Trajectory]) -> list[Segment]:
    """One training row per dataset row, in order.

    Raises:
        RuntimeError: a trajectory answers another row; its reward would train on noise.
        ValueError: an environment rewrote the context, which makes several training rows.
    """
    found = []
    for row, trajectory in zip(rows, trajectories, strict=True):
        if trajectory.row != row:
            raise RuntimeError(
                f"the rollout of row {row.get('id', row)!r} is a trajectory of row "
                f"{trajectory.row.get('id', trajectory.row)!r}; this is a bug, please report it"
            )
        segments = flatten(trajectory)
        if len(segments) > 1:
            raise ValueError(
                f"the environment rewrote the context of row {row.get('id')!r}, which makes "
                f"{len(segments)} training rows of one episode; training takes append-only "
                "episodes, so leave StepResult.rewrite unset"
            )
        found += segments
    return found


def process_rewards(trajectories: Sequence[Trajectory], like: Tensor) -> tuple[Tensor, Tensor]:
    """What every turn was paid, and how many turns there were.

    Args:
        trajectories: B of them.
        like: has the type and device of the result.

    Returns:
        Rewards `(B, K)`, padded with 0, and turn counts `(B,)`.
    """
    # One type for all: padding takes the first row's, and whole numbers would cut the others.
    paid = [torch.tensor(t.process_rewards, dtype=like.dtype) for t in trajectories]
    counts = torch.tensor([len(p) for p in paid], device=like.device)
    return pad_sequence(paid, batch_first=True).to(like.device), counts


def trained_turn_ids(segments: Sequence[Segment], like: Tensor) -> Tensor:
    """The turn each trained token belongs to, `OBSERVATION_TURN` where nothing is trained.

    Args:
        segments: B of them.
        like: completion ids `(B, T)`.
    """
    turn_ids = torch.full_like(like, OBSERVATION_TURN)  # (B, T)
    for i, segment in enumerate(segments):
        pairs = zip(segment.turn_ids, segment.loss_mask, strict=True)
        trained = [turn if kept else OBSERVATION_TURN for turn, kept in pairs]
        turn_ids[i, : len(trained)] = torch.tensor(trained)
    return turn_ids


def padded_masks(masks: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Loss masks of B completions as `(B, T)`, 0 behind each one's end."""
    return pad_sequence([torch.tensor(mask) for mask in masks], batch_first=True).to(device)
