"""The loss of episodes that are several training rows each.

Layer 6. An environment that rewrites the context cuts an episode into rows, and TRL's normalisers
count rows: an episode cut in three would weigh three times, its tokens more or less by where the
cut fell. Every normaliser that counts episodes is a weight per token under a constant sum, and
TRL's dapo is that sum; so the same per-token loss is handed to it with the weights of the chosen
normaliser. dapo, cispo and bnpo count tokens and stay as they are. Knows rows and their episodes'
lengths, nothing of turns.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from trl import GRPOTrainer

from agentr1.credit_config import LOSSES_OF_CONTEXTS

_WEIGHTS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "grpo": lambda tokens, _: 1 / tokens,
    "dr_grpo": lambda tokens, length: torch.full_like(tokens, 1 / length),
}
"""Loss type to weight of a token, by the tokens of its episode and `max_completion_length`."""


class RowWeights(GRPOTrainer):
    """GRPOTrainer in which an episode weighs the same, however many rows it makes.

    Loss, KL and entropy terms of an episode do not depend on where its context was cut, except that
    a ratio of whole sequences (gspo) is one per row.

    Contact with TRL 1.16, pinned by `tests/test_trl_contract.py`: `_compute_loss`, `super()`
    around, with `loss_type` set to dapo for the call; reads `max_completion_length`,
    `top_entropy_quantile` and `entropy_coef`.
    """

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        weights = inputs.get("row_weights")
        if weights is None:
            return super()._compute_loss(model, inputs)
        chosen = self.loss_type
        self.loss_type = "dapo"
        try:
            return super()._compute_loss(
                model,
                inputs
                | {
                    "tool_mask": inputs["tool_mask"] * weights.unsqueeze(1),  # (R, T)
                    "num_items_in_batch": inputs["row_weight_total"],
                },
            )
        finally:
            self.loss_type = chosen

    def _weigh_rows(self, output: dict[str, Any], tokens: Sequence[int], episodes: int) -> None:
        """Put the weights of rows into a generation batch.

        Args:
            output: of R rows.
            tokens: trained tokens of each row's episode.
            episodes: B over all processes.

        Raises:
            ValueError: a loss whose rows cannot be weighed.
        """
        if self.loss_type not in LOSSES_OF_CONTEXTS:
            raise ValueError(
                f"loss_type {self.loss_type!r} takes each episode for one row, but an environment "
                f"rewrote the context and made several; use one of {list(LOSSES_OF_CONTEXTS)}"
            )
        if self.loss_type not in _WEIGHTS:
            return
        if self.loss_type == "grpo" and (self.top_entropy_quantile < 1 or self.entropy_coef):
            raise ValueError(
                "TRL weighs entropies with the mask, which carries the rows' weights where an "
                "environment rewrote the context; got top_entropy_quantile="
                f"{self.top_entropy_quantile}, entropy_coef={self.entropy_coef} with loss_type "
                "grpo; unset them, or use loss_type dapo"
            )
        lengths = torch.tensor(tokens, device=output["advantages"].device).clamp(min=1).float()
        assert self.max_completion_length is not None  # checked with an environment
        weights = _WEIGHTS[self.loss_type](lengths, self.max_completion_length)
        # Scaled up together with their sum: TRL takes a mask that sums to less than 1 for empty.
        scale = 1 / weights.min()
        output["row_weights"] = weights * scale  # (R,)
        output["row_weight_total"] = scale * episodes
