"""Micro-batches of similar length, each no wider than its longest member.

Layer 1, pure tensors. TRL pads a whole generation batch to its longest prompt and its longest
completion and cuts micro-batches at random, so one long episode makes every micro-batch wide. The
rows of one accumulation window may change places: their gradients are summed anyway. Called by the
trainer between generation and update; knows nothing of losses.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

Batch = dict[str, Any]
"""TRL's: `(B, P)` prompts, `(B, T)` completions and what belongs to them, scalars, None."""


def regrouped(batches: Sequence[Batch], window: int) -> list[Batch]:
    """Sort the rows of every `window` consecutive micro-batches by length, then trim each.

    Args:
        batches: micro-batches of one generation, equally many rows in each.
        window: micro-batches whose gradients are summed before the optimizer steps.

    Returns:
        As many micro-batches with as many rows, the rows of a window among themselves. The
        longest come first: memory that is too small for them shows in the first micro-batch.
    """
    found: list[Batch] = []
    for start in range(0, len(batches), window):
        members = batches[start : start + window]
        size = len(members[0]["completion_ids"])
        rows = {key: _joined([batch[key] for batch in members]) for key in members[0]}
        lengths = rows["prompt_mask"].sum(1) + rows["completion_mask"].sum(1)  # (window x B,)
        order = lengths.argsort(descending=True, stable=True)
        for i in range(len(members)):
            chosen = order[i * size : (i + 1) * size]
            found.append(trimmed({key: _picked(value, chosen) for key, value in rows.items()}))
    return found


def trimmed(batch: Batch) -> Batch:
    """Drop the columns that are padding in every row: prompts on the left, completions right."""
    width = batch["completion_mask"].shape[1]
    first = _padded_columns(batch["prompt_mask"])
    last = width - _padded_columns(batch["completion_mask"].flip(1))

    def cut(key: str, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.ndim != 2:
            return value
        if key in ("prompt_ids", "prompt_mask"):
            return value[:, first:]
        return value[:, :last] if value.shape[1] == width else value  # (B, 1): one per sequence

    return {key: cut(key, value) for key, value in batch.items()}


def _padded_columns(mask: torch.Tensor) -> int:
    """Leading columns of `(B, n)` without a 1; one column always stays."""
    seen = mask.bool().any(0)  # (n,)
    return int(seen.int().argmax()) if seen.any() else len(seen) - 1


def _joined(values: Sequence[Any]) -> Any:
    """All rows of a window; a scalar or None holds for the whole generation."""
    first = values[0]
    return torch.cat(list(values)) if isinstance(first, torch.Tensor) and first.ndim else first


def _picked(value: Any, rows: torch.Tensor) -> Any:
    return value[rows] if isinstance(value, torch.Tensor) and value.ndim else value
