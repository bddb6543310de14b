"""The settings of credit: which tokens count, what they are compared with, the critic, the guard.

Layer 5, one half of `config.AgentConfig`, whose other half are the settings of rollouts. Checks
what these fields alone can tell; what clashes with TRL's fields is checked in `config`.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class CreditConfig:
    """Fields of `AgentConfig` that say how rewards become advantages."""

    turn_discount: float = field(
        default=1.0, metadata={"help": "Discount of rewards per turn, never per token."}
    )
    process_credit: str = field(
        default="turn",
        metadata={
            "help": "turn: each turn is credited with what follows it. trajectory: an episode's "
            "process rewards are added to its outcome reward, one credit for all its turns (what "
            "rloo does in any case)."
        },
    )
    process_scale: str = field(
        default="none",
        metadata={
            "help": "none: process rewards as paid. prime: divided by the largest absolute "
            "return-to-go of the batch, as in Agent-R1's first code."
        },
    )
    anchor_weight: float = field(
        default=1.0,
        metadata={
            "help": "gigpo: weight of the comparison of equal states beside that of episodes."
        },
    )
    loss_mask: str = field(
        default="policy",
        metadata={"help": "policy: train on sampled tokens. all: observations too, an ablation."},
    )
    advantage_alignment: str = field(
        default="policy",
        metadata={
            "help": "policy: token-level GAE steps over observations. all: through them, an "
            "ablation."
        },
    )
    refill_rounds: int | None = field(
        default=None,
        metadata={
            "help": "Dynamic sampling: so many times, groups whose rewards are all equal are "
            "replaced by groups of other rows. Unset: the algorithm's, for most 0."
        },
    )
    overlong_share: float | None = field(
        default=None,
        metadata={
            "help": "Share of `max_completion_length` at its end in which a longer completion is "
            "punished more, down to -1 (soft overlong punishment); 0 punishes none. Unset: the "
            "algorithm's, for most 0."
        },
    )
    sampling_correction: str = field(
        default="auto",
        metadata={
            "help": "Weigh tokens by trainer's over engine's probability: off, token_truncate, "
            "token_mask, sequence_truncate or sequence_mask, as TRL's "
            "vllm_importance_sampling_mode. auto: token_truncate wherever the two can differ, with "
            "vLLM and below float32; over an episode of many turns, a sequence's ratio says little."
        },
    )
    critic: str | None = field(
        default=None,
        metadata={
            "help": "What the value head reads. adapter: an adapter of its own on the policy's "
            "frozen base. shared: the policy's own trunk. separate: a second model, not under "
            "DeepSpeed. Unset: adapter with LoRA, else shared."
        },
    )
    critic_learning_rate: float | None = field(
        default=None, metadata={"help": "Of value adapter and head; unset: `learning_rate`."}
    )
    critic_warmup_steps: int = field(
        default=0, metadata={"help": "Steps in which only the critic is trained."}
    )
    critic_prefix: str | None = field(
        default=None,
        metadata={
            "help": "Text that only the critic reads before the prompt, with the row's columns in "
            "braces: 'Accepted answers: {answers}.'; a privileged critic."
        },
    )
    value_coef: float = field(
        default=0.5, metadata={"help": "Weight of the value loss beside the policy loss."}
    )
    value_clip: float | None = field(
        default=0.2, metadata={"help": "Values move at most so far from those of the rollout."}
    )
    gae_lambda: float = field(
        default=1.0, metadata={"help": "GAE's lambda: per token for ppo, per turn for steppo."}
    )
    reward_kl: float = field(
        default=0.0,
        metadata={
            "help": "Coefficient of a KL penalty inside the reward, token by token (ppo); TRL's "
            "`beta` is the penalty in the loss."
        },
    )
    collapse_guard: str = field(
        default="warn",
        metadata={
            "help": "When training collapses. off, warn, lower_lr: halve the learning rate, "
            "roll_back: go back to the last checkpoint before it."
        },
    )

    def check_credit(self) -> None:
        """Give what is still unset its value, and refuse values out of range.

        Raises:
            ValueError: with the setting, its value and what was expected.
        """
        self.refill_rounds = self.refill_rounds or 0
        self.overlong_share = self.overlong_share or 0.0
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"{name} must be one of {list(choices)}, got {getattr(self, name)!r}"
                )
        checks = [
            ("turn_discount", 0 < self.turn_discount <= 1, "in (0, 1]"),
            ("anchor_weight", self.anchor_weight >= 0, "0 or more"),
            ("refill_rounds", self.refill_rounds in range(1000), "a whole number, 0 or more"),
            ("overlong_share", 0 <= self.overlong_share <= 1, "in [0, 1]"),
            ("critic_warmup_steps", self.critic_warmup_steps >= 0, "0 or more"),
            (
                "critic_learning_rate",
                self.critic_learning_rate is None or self.critic_learning_rate > 0,
                "more than 0, or unset",
            ),
            ("value_coef", self.value_coef > 0, "more than 0"),
            ("value_clip", self.value_clip is None or self.value_clip > 0, "more than 0, or unset"),
            ("gae_lambda", 0 <= self.gae_lambda <= 1, "in [0, 1]"),
            ("reward_kl", self.reward_kl >= 0, "0 or more"),
        ]
        for name, holds, expected in checks:
            if not holds:
                raise ValueError(f"{name} must be {expected}, got {getattr(self, name)!r}")
        if self.process_scale != "none" and self.process_credit == "trajectory":
            raise ValueError(
                f"process_scale={self.process_scale!r} scales what single turns are credited with, "
                "but with process_credit: trajectory they are credited with nothing of their own; "
                "remove one of the two"
            )

    def check_without_environment(self, greedy: str | None) -> None:
        """Refuse what generation without an environment, TRL's own, would pass over.

        Args:
            greedy: the algorithm's name if it plays a greedy episode per group.

        Raises:
            ValueError: with the setting, its value and the way out.
        """
        if greedy is not None:
            raise ValueError(
                f"algorithm {greedy!r} plays a greedy episode per group, which needs an "
                "environment; pass env_factory, or use rloo"
            )
        for name in OF_EPISODES:
            value, idle = getattr(self, name), _IDLE.get(name, getattr(CreditConfig, name))
            if value != idle:
                raise ValueError(
                    f"{name}={value!r} is about episodes and does nothing without an environment; "
                    f"pass env_factory, or set {name} to {idle!r}"
                )


OF_THE_CRITIC = (
    *("critic", "critic_learning_rate", "critic_warmup_steps", "critic_prefix"),
    *("value_coef", "value_clip", "gae_lambda", "reward_kl", "advantage_alignment"),
)
"""Fields that do nothing without a critic."""

OF_EPISODES = (
    *("turn_discount", "process_credit", "process_scale", "anchor_weight", "loss_mask"),
    *("refill_rounds", "overlong_share"),
)
"""Fields that do nothing without an environment."""

LOSSES_OF_CONTEXTS = ("grpo", "dr_grpo", "dapo", "cispo", "bnpo")
"""Losses in which an episode of several contexts can weigh as one."""

_IDLE = {"refill_rounds": 0, "overlong_share": 0.0}
"""Their values that ask for nothing, where these are not the defaults."""

_CHOICES: dict[str, tuple[str | None, ...]] = {
    "process_credit": ("turn", "trajectory"),
    "process_scale": ("none", "prime"),
    "loss_mask": ("policy", "all"),
    "advantage_alignment": ("policy", "all"),
    "sampling_correction": (
        *("auto", "off", "token_truncate", "token_mask"),
        *("sequence_truncate", "sequence_mask"),
    ),
    "critic": (None, "adapter", "shared", "separate"),
    "collapse_guard": ("off", "warn", "lower_lr", "roll_back"),
}
