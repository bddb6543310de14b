"""The algorithms as a table: what each one fixes in TRL, and how it turns rewards into credit.

Layer 4: knows `advantages.py` and the names of TRL's fields, but neither imports TRL nor sees a
trainer. `config.py` asks it what a recipe may set, `trainer.py` which function to call. A new
algorithm with a loss that TRL has is one more row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from agentr1 import advantages


@dataclasses.dataclass(frozen=True, slots=True)
class Algorithm:
    """One row of the table.

    Attributes:
        name: what a recipe writes.
        paper: title and arXiv id.
        settings: fields of TRL's `GRPOConfig` that make the algorithm what it is, by name.
        outcome_advantage: `(rewards (B,), group_size) -> (B,)` on the global batch; None leaves
            TRL's own computation in place.
        needs_group: compares rollouts of one prompt, so needs at least two of them.
    """

    name: str
    paper: str
    settings: Mapping[str, Any]
    outcome_advantage: Callable[[Tensor, int], Tensor] | None
    needs_group: bool


_REINFORCE_PP_PAPER = (
    "REINFORCE++: Stabilizing Critic-Free Policy Optimization with Global Advantage Normalization "
    "(arXiv 2501.03262)"
)
# The paper averages over tokens, which is TRL's dapo loss; its KL penalty inside the reward is left
# to TRL's `beta`, a penalty in the loss.
_REINFORCE_PP = {
    "loss_type": "dapo",
    "scale_rewards": "batch",
    "importance_sampling_level": "token",
    "multi_objective_aggregation": "sum_then_normalize",
}

_ROWS = (
    Algorithm(
        name="grpo",
        paper="DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models "
        "(arXiv 2402.03300)",
        settings={
            "loss_type": "grpo",
            "scale_rewards": "group",
            "importance_sampling_level": "token",
        },
        outcome_advantage=None,
        needs_group=True,
    ),
    # TRL's constant normaliser: dividing by sampled lengths (grpo, dapo) would bend the estimate
    # that leaving one out keeps exact.
    Algorithm(
        name="rloo",
        paper="Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human "
        "Feedback in LLMs (arXiv 2402.14740)",
        settings={
            "loss_type": "dr_grpo",
            "scale_rewards": "none",
            "importance_sampling_level": "token",
            "multi_objective_aggregation": "sum_then_normalize",
        },
        outcome_advantage=advantages.leave_one_out,
        needs_group=True,
    ),
    Algorithm(
        name="reinforce++",
        paper=_REINFORCE_PP_PAPER,
        settings=_REINFORCE_PP,
        outcome_advantage=advantages.batch_whitened,
        needs_group=False,
    ),
    Algorithm(
        name="reinforce++_baseline",
        paper=_REINFORCE_PP_PAPER,
        settings=_REINFORCE_PP,
        outcome_advantage=advantages.group_baseline_whitened,
        needs_group=True,
    ),
)

ALGORITHMS: dict[str, Algorithm] = {row.name: row for row in _ROWS}


def algorithm(name: str) -> Algorithm:
    """Look an algorithm up; an unknown name is an error, never a run without credit."""
    if name not in ALGORITHMS:
        raise ValueError(
            f"unknown algorithm {name!r}, expected one of {sorted(ALGORITHMS)}; leave `algorithm` "
            "out to use TRL's own fields as they are"
        )
    return ALGORITHMS[name]
