"""A key/value cache with one row ("slot") per episode, for a batch whose members come and go.

transformers' own caches hold sequences of one length, so a batch cannot take in a new member
without padding the others. Here every row has a length of its own: each forward pass says at
which rows and positions its tokens are written. Used by `engines.in_process` alone; knows
tensors, nothing of requests or sampling.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

GROWTH = 128
"""Columns and rows are allocated in steps of this many and `GROWTH // 8`."""


class SlotLayer(CacheLayerMixin):
    """Keys and values of one layer, `(slots, heads, columns, head_dim)`.

    The last column is a dump: padding tokens of a ragged batch write there, and no mask shows it.
    """

    keys: Any  # tensors once they are initialized
    values: Any

    def __init__(self, plan: WritePlan) -> None:
        super().__init__()
        self.plan = plan

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate for the shapes of the first tokens seen."""
        self.keys = self._grown(None, key_states)
        self.values = self._grown(None, value_states)
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write new tokens `(n, heads, q, head_dim)` as planned, return the rows' history."""
        plan = self.plan
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._fit()
        rows, columns = plan.rows[:, None], plan.write_at  # (n, 1), (n, q)
        self.keys[rows, :, columns] = key_states.transpose(1, 2)
        self.values[rows, :, columns] = value_states.transpose(1, 2)
        window = slice(plan.first_row, plan.first_row + len(plan.rows))
        return self.keys[window, :, : plan.visible], self.values[window, :, : plan.visible]

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` columns of one row over another."""
        self._fit()
        if self.is_initialized:
            for tensor in (self.keys, self.values):
                tensor[target, :, :length] = tensor[source, :, :length]

    def read_row(self, row: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """A copy of the first `length` columns of a row, `(heads, length, head_dim)` twice."""
        return self.keys[row, :, :length].clone(), self.values[row, :, :length].clone()

    def write_row(self, row: int, content: tuple[torch.Tensor, torch.Tensor]) -> None:
        """Put back what `read_row` gave, into any row."""
        self._fit()
        for tensor, part in zip((self.keys, self.values), content, strict=True):
            tensor[row, :, : part.shape[1]] = part

    def swap_rows(self, a: int, b: int, length: int) -> None:
        """Exchange the first `length` columns of two rows."""
        self._fit()
        if self.is_initialized:
            for tensor in (self.keys, self.values):
                held = tensor[a, :, :length].clone()
                tensor[a, :, :length] = tensor[b, :, :length]
                tensor[b, :, :length] = held

    def _fit(self) -> None:
        """Grow to what the plan has reserved; a row may be moved before it is first written."""
        plan = self.plan
        if self.is_initialized and (
            self.keys.shape[0] < plan.slots or self.keys.shape[2] < plan.columns
        ):
            self.keys = self._grown(self.keys, self.keys)
            self.values = self._grown(self.values, self.values)

    def _grown(self, old: torch.Tensor | None, like: torch.Tensor) -> torch.Tensor:
        shape = (self.plan.slots, like.shape[1], self.plan.columns, like.shape[3])
        # Zeros, not empty: stale NaN bits would survive a mask (0 x NaN is NaN).
        new = torch.zeros(shape, dtype=like.dtype, device=like.device)
        if old is not None:
            new[: old.shape[0], :, : old.shape[2]] = old
        return new

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of the visible keys; unused, since the mask is given ready-made."""
        return self.plan.visible, 0

    def get_seq_length(self) -> int:
        """Columns visible to the current forward pass."""
        return self.plan.visible

    def get_max_length(self) -> int:
        """No maximum: the cache grows."""
        return -1


class WritePlan:
    """Where the tokens of the coming forward pass go; shared by all layers.

    Attributes:
        first_row: the batch occupies rows `first_row` to `first_row + n - 1`.
        rows: those rows, `(n,)`.
        write_at: column of each token, `(n, q)`; the dump column for padding.
        visible: columns shown to attention.
        slots: rows allocated.
        columns: columns allocated, the dump included.
    """

    def __init__(self) -> None:
        self.first_row = 0
        self.rows = torch.empty(0, dtype=torch.long)
        self.write_at = torch.empty(0, 0, dtype=torch.long)
        self.visible = 0
        self.slots = 0
        self.columns = 0

    def reserve(self, rows: int, columns: int) -> None:
        """Make room for `rows` rows of `columns` tokens."""
        step = GROWTH // 8
        self.slots = max(self.slots, -(-rows // step) * step)
        self.columns = max(self.columns, -(-(columns + 1) // GROWTH) * GROWTH)

    def aim(self, first_row: int, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Plan one forward pass.

        Args:
            first_row: row of the batch's first member.
            positions: `(n, q)` column of each token, -1 for padding on the left.

        Returns:
            Position ids `(n, q)` and the boolean attention mask `(n, 1, q, visible)`.
        """
        self.first_row = first_row
        self.rows = torch.arange(first_row, first_row + len(positions), device=positions.device)
        self.write_at = torch.where(positions < 0, self.columns - 1, positions)
        self.visible = int(positions.max()) + 1
        # Padding looks at column 0: a row that sees nothing would be NaN.
        shown = positions.clamp(min=0)
        keys = torch.arange(self.visible, device=positions.device)
        return shown, (keys <= shown[..., None])[:, None]


class SlotCache(Cache):
    """The cache handed to `model(past_key_values=...)`."""

    def __init__(self, num_layers: int) -> None:
        self.plan = WritePlan()
        self._rows = [SlotLayer(self.plan) for _ in range(num_layers)]
        super().__init__(layers=list(self._rows))

    def copy_row(self, source: int, target: int, length: int) -> None:
        """Copy `length` tokens of one row over another, in every layer."""
        for layer in self._rows:
            layer.copy_row(source, target, length)

    def swap_rows(self, a: int, b: int, length: int) -> None:
        """Exchange `length` tokens of two rows, in every layer."""
        for layer in self._rows:
            layer.swap_rows(a, b, length)

    def read_row(self, row: int, length: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """A copy of `length` tokens of one row, layer by layer."""
        return [layer.read_row(row, length) for layer in self._rows]

    def write_row(self, row: int, content: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Begin a row with what `read_row` gave."""
        for layer, part in zip(self._rows, content, strict=True):
            layer.write_row(row, part)
