"""One probability ratio per turn: StepPO's.

Layer 6. TRL has ratios of tokens and of whole sequences. Here the old log-probabilities are moved
so that each token's difference is its turn's mean: value, clipping and gradient are those of one
ratio per turn (the geometric mean of its tokens' ratios, StepPO, arXiv 2604.18401), as long as all
tokens of a turn weigh the same. The KL penalty reads only the new ones; TRL's
`use_bias_correction_kl` multiplies it by the ratio, then the turn's. Knows `turn_ids`, nothing of
rewards.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from trl import GRPOTrainer

from agentr1.advantages import turn_mean_log_ratio


class StepRatio(GRPOTrainer):
    """GRPOTrainer with one ratio per turn where `turn_ratio` is set.

    Contact with TRL 1.16, pinned by `tests/test_trl_contract.py`: `_compute_loss` and
    `_get_per_token_logps_and_entropies`, `super()` around; TRL reads `old_per_token_logps` from its
    inputs after it has computed the new ones.
    """

    turn_ratio = False
    _old: dict[str, Any] | None = None

    def _compute_loss(self, model: Any, inputs: Any) -> Tensor:
        if not self.turn_ratio or "old_per_token_logps" not in inputs:
            return super()._compute_loss(model, inputs)
        self._old = inputs = dict(inputs)
        try:
            return super()._compute_loss(model, inputs)
        finally:
            self._old = None

    def _get_per_token_logps_and_entropies(self, *args: Any, **kwargs: Any) -> Any:
        found = super()._get_per_token_logps_and_entropies(*args, **kwargs)
        inputs, self._old = self._old, None
        if inputs is not None:
            new = found[0].detach()  # (R, T)
            log_ratio = new - inputs["old_per_token_logps"]
            mean = turn_mean_log_ratio(log_ratio, inputs["turn_ids"])
            inputs["old_per_token_logps"] = new - mean
        return found
