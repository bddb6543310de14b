"""GRPOTrainer with agentr1's rollout in front of it and credit per turn behind it.

The trainer knows tensors and never turns, only `turn_ids`. It gives TRL the tokens and masks of
the episodes that `RolloutTrainer` plays, and afterwards replaces TRL's one advantage per sequence
where turns were paid or the algorithm asks for it. Loss, optimisation, distribution, logging and
checkpoints are TRL's.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from trl import GRPOTrainer

from agentr1.advantages import TurnRewards, prime_scaled
from agentr1.algorithms import ALGORITHMS, Algorithm
from agentr1.credit import (
    Payment,
    credited_turns,
    filled_up,
    padded_masks,
    payments,
    placed,
    silent_groups,
    trained_tokens,
    training_segments,
    turn_rewards,
)
from agentr1.credit_config import CreditConfig
from agentr1.engines.base import Sampling
from agentr1.envs.base import EnvFactory
from agentr1.estimators import group_relative
from agentr1.guard import CollapseGuard
from agentr1.ranks import together
from agentr1.refill import PlayedBatch, draw_rows, refill
from agentr1.rewards import environment_reward, overlong_penalty
from agentr1.rollout_trainer import RolloutTrainer
from agentr1.row_weights import RowWeights
from agentr1.scoring import Metric
from agentr1.segments import flatten
from agentr1.step_ratio import StepRatio
from agentr1.types import Row, Segment, Trajectory


class AgentTrainer(RolloutTrainer, RowWeights, StepRatio):
    """Train a policy in a multi-turn environment.

    Without `env_factory` and with `algorithm=None` this is `GRPOTrainer`, to the last bit.

    Contact with TRL 1.16 and transformers, pinned by `tests/test_trl_contract.py`; that of the
    classes it is made of stands in theirs (`RolloutTrainer`, `FrugalUpdate`, `RowWeights`,
    `StepRatio`, `WholeCheckpoints`):

    - `rollout_func` (public attribute) with its key `env_mask`: set after construction. It returns
      more rows than prompts where environments rewrite contexts; TRL trains them all, as long as
      their number divides evenly.
    - `_generate_and_score_completions`, `_calculate_rewards`: `super()` around, to keep the rows
      and the rewards and to replace `advantages`.
    - `reward_funcs`, `reward_func_names`, `reward_processing_classes`, `reward_weights`: private
      writes, for the rewards that settings ask for.
    - `_last_loaded_step`: private write, so that TRL loads no weights into an engine.
    - `_logs`: private write, one completion per episode.
    - `_pending_extra_logs`: private write, what rewards logged of the episodes that were kept.
    - `train_dataset`: read.

    Args:
        *args: as in `GRPOTrainer`.
        env_factory: makes one environment per episode. Excludes `tools`, `rollout_func` and
            `environment_factory`, which are TRL's own ways.
        metrics: name to metric, for evaluation and for the batch's log.
        **kwargs: as in `GRPOTrainer`.

    Raises:
        ValueError: settings that clash; see `AgentConfig`.
    """

    has_critic = False

    def __init__(
        self,
        *args: Any,
        env_factory: EnvFactory | None = None,
        metrics: Mapping[str, Metric] | None = None,
        **kwargs: Any,
    ) -> None:
        given = inspect.signature(GRPOTrainer).bind(*args, **kwargs).arguments
        name = getattr(given.get("args"), "algorithm", None)
        self._algorithm: Algorithm | None = ALGORITHMS[name] if name else None
        if self._algorithm is not None and self._algorithm.needs_critic > self.has_critic:
            raise ValueError(
                f"algorithm {name!r} needs a critic, got {type(self).__name__}; use "
                "agentr1.actor_critic.ActorCriticTrainer"
            )
        if env_factory is None and isinstance(config := given.get("args"), CreditConfig):
            greedy = self._algorithm is not None and self._algorithm.greedy_first
            config.check_without_environment(name if greedy else None)
        super().__init__(*args, env_factory=env_factory, metrics=metrics, **kwargs)
        self._reward_table: Tensor | None = None
        self._played: PlayedBatch | None = None
        if env_factory is not None:
            self.rollout_func = self._hand_over
            self.turn_ratio = self._algorithm is not None and self._algorithm.ratio == "turn"
            self._add_rewards()
            self._guard = CollapseGuard(self._config)
            self.add_callback(self._guard)

    def _add_rewards(self) -> None:
        """Rewards that settings ask for, beside the user's and logged like them."""
        config = self._config
        wanted: dict[str, Any] = {}
        if config.process_credit == "trajectory":
            wanted["process"] = environment_reward
        if config.overlong_share:
            length = config.limits.max_completion_length
            wanted["overlong"] = overlong_penalty(length, config.overlong_share)
        functions, classes = list(self.reward_funcs), list(self.reward_processing_classes or [])
        self.reward_funcs = [*functions, *wanted.values()]
        self.reward_func_names = [*self.reward_func_names, *wanted]
        self.reward_processing_classes = [*classes, *[None] * len(wanted)]
        self.reward_weights = torch.cat([self.reward_weights, torch.ones(len(wanted))])

    # Rollout ------------------------------------------------------------------------------

    def _play_training(self, rows: Sequence[Row]) -> list[Trajectory]:
        """Play a training batch: sampled, with spare episodes or a greedy one per group."""
        size, spare = self._group_size, self._config.spare_rollouts
        seeds = self._seeds(len(rows) // size * (size + spare))
        samplings = [
            Sampling(
                max_tokens=1, temperature=0.0 if self._is_greedy(i) else self.temperature, seed=seed
            )
            for i, seed in enumerate(seeds)
        ]
        return self._play(rows, samplings, spare)

    def _is_greedy(self, episode: int) -> bool:
        """The first of each group, for algorithms whose baseline it is."""
        greedy = self._algorithm is not None and self._algorithm.greedy_first
        return greedy and episode % self._group_size == 0

    def _hand_over(self, prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
        """TRL's `rollout_func`: the training rows of one episode per prompt, in order."""
        rows = self._rows
        if len(rows) != len(prompts):
            raise RuntimeError(f"TRL asked for {len(prompts)} completions of {len(rows)} rows")
        played = self._played.trajectories if self._played else self._play_training(rows)
        cut = together(lambda: training_segments(rows, played, self._config.loss_mask))
        self._episodes = played
        count = self._meet(played, len(cut[0]))
        self._segments, self._owners = filled_up(*cut, count)
        pairs = zip(self._segments, self._owners, strict=True)
        masks = [self._mask(segment, owner) for segment, owner in pairs]
        self._tokens = trained_tokens(masks, self._owners)
        # Until the rows are scored: the passes of old and reference log-probabilities.
        self.loss_mask = padded_masks(masks, self.accelerator.device)
        return {
            "prompt_ids": [list(s.prompt_ids) for s in self._segments],
            "completion_ids": [list(s.completion_ids) for s in self._segments],
            "logprobs": [list(s.logprobs) for s in self._segments],
            "env_mask": masks,
            "trajectories": played,
        }

    def _mask(self, segment: Segment, owner: int) -> list[int]:
        cut = not self._episodes[owner].stop_reason.is_terminal
        if (self._mask_truncated and cut) or self._is_greedy(owner):
            return [0] * len(segment.loss_mask)
        return list(segment.loss_mask)

    def _meet(self, played: Sequence[Trajectory], rows: int) -> int:
        """Stop together where too many turns met a fault; else agree on the rows to train.

        Returns:
            Rows of every process: as many as the largest has, in equal parts for each step.
        """
        turns = [turn for t in played for turn in t.turns]
        faults = [turn.fault for turn in turns if turn.fault]
        mine = torch.tensor([[len(faults), len(turns), rows]], device=self.accelerator.device)
        everyone: Any = self.accelerator.gather(mine)
        self._refuse_noise(int(everyone[:, 0].sum()), int(everyone[:, 1].sum()), faults)
        steps = self._config.steps_per_generation or 1
        return -(-int(everyone[:, 2].max()) // steps) * steps

    def _play_varied(self, rows: Sequence[Row]) -> PlayedBatch:
        """Play a batch whose silent groups are replaced, see `refill`."""
        size = self._group_size

        def play(groups: int, number: int) -> PlayedBatch:
            dataset: Any = self.train_dataset
            share = (self.accelerator.process_index, self.accelerator.num_processes)
            place = (self.args.seed, self.state.global_step, self._batches_of_step[1], number)
            drawn = draw_rows(dataset, groups, batch.rows[::size], share=share, place=place)
            return self._play_and_reward([row for row in drawn for _ in range(size)])

        batch = self._play_and_reward(rows)
        groups, before = len(rows) // size, len(self._silent(batch))
        left = refill(
            batch,
            size,
            self._config.refill_rounds or 0,
            silent=self._silent,
            most=self._most,
            play=play,
        )
        self._log_metric("rollout/refilled_groups", (before - left) / groups)
        self._pending_extra_logs.update(batch.extras)
        return batch

    def _play_and_reward(self, rows: Sequence[Row]) -> PlayedBatch:
        played = self._play_training(rows)
        inputs = [{**row, "trajectories": t} for row, t in zip(rows, played, strict=True)]
        prompts = [row["prompt"] for row in rows]
        ids = self._last_ids(played)
        self._pending_extra_logs.clear()
        table = super()._calculate_rewards(inputs, prompts, self._spoken(prompts, ids), ids)
        extras = dict(self._pending_extra_logs)  # of these rows, some of which may be dropped
        self._pending_extra_logs.clear()
        return PlayedBatch([dict(r) for r in rows], played, self._mine(table, len(rows)), extras)

    def _silent(self, batch: PlayedBatch) -> list[int]:
        paid = self._payments(batch.trajectories)
        rewards = turn_rewards(self._weighted(batch.rewards), paid, self._group_size, 1.0)
        return silent_groups(rewards).nonzero().flatten().tolist()

    def _most(self, count: int) -> int:
        mine = torch.tensor([count], device=self.accelerator.device)
        everyone: Any = self.accelerator.gather(mine)
        return int(everyone.max())

    # Rewards ------------------------------------------------------------------------------

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any
    ) -> Tensor:
        if self._played is not None:
            table: Any = self.accelerator.gather(self._played.rewards)
        else:
            if len(completions) != len(prompts):  # rows of rewritten contexts: one per episode
                completion_ids_list = self._last_ids(self._episodes)
                completions = self._spoken(prompts, completion_ids_list)
            table = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._reward_table = table  # (B_global, F)
        if self._env_factory is not None and self._training:
            # Here, because TRL averages pending metrics right after rewards.
            together(lambda: self._log_batch(self._episodes))
        return table

    def _last_ids(self, trajectories: Sequence[Trajectory]) -> list[list[int]]:
        """Completion of each episode's last context, for reward functions that read tokens."""
        return [list(flatten(t)[-1].completion_ids) for t in trajectories]

    def _spoken(self, prompts: Sequence[Any], ids: Sequence[Sequence[int]]) -> list[Any]:
        """Those completions as TRL shows them to reward functions."""
        tokenizer: Any = self.processing_class
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        if isinstance(prompts[0], str):
            return texts
        return [[{"role": "assistant", "content": text}] for text in texts]

    def _weighted(self, table: Tensor) -> Tensor:
        """(B, F) rewards as (B,), NaN where no function had an opinion."""
        rewards = (table * self.reward_weights.to(table.device)).nansum(dim=1)
        rewards[table.isnan().all(dim=1)] = torch.nan
        return rewards

    def _outcome_rewards(self) -> Tensor:
        """Outcome rewards of the last batch, of all processes: (B_global,)."""
        assert self._reward_table is not None  # `_calculate_rewards` has filled it
        return self._weighted(self._reward_table)

    def _mine(self, everyone: Tensor, count: int) -> Tensor:
        """This process's part of something gathered."""
        start = self.accelerator.process_index * count
        return everyone[start : start + count]

    # Credit -------------------------------------------------------------------------------

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        training, playing = self._training, self._env_factory is not None
        # Copies: TRL writes the trajectories into its rows, which would then hold themselves.
        self._rows = [dict(row) for row in inputs]
        if playing and training:
            self._guard.before_generation(self)
        if playing:
            self._last_loaded_step = self.state.global_step  # `_play` syncs, not TRL
            if training and self._config.refill_rounds:
                self._played = self._play_varied(self._rows)
                self._rows = self._played.rows
                inputs = [dict(row) for row in self._rows]
        try:
            output = super()._generate_and_score_completions(inputs)
        finally:
            self.loss_mask = self._played = None
        if training:
            self._credit(output)
            if playing:
                self._finish_rows(output, len(inputs))
                self._guard.after_credit(output, self._outcome_rewards())
        return output

    def _credit(self, output: dict[str, Any]) -> None:
        """Replace TRL's `(B,)` advantages where algorithm, payments or rows ask for more."""
        outcome: Tensor = output["advantages"]
        everyone = self._batch_rewards(len(outcome))
        if everyone is not None:
            turns = together(lambda: self._turn_advantages(outcome, everyone))
            output["advantages"] = self._spread(output, outcome, turns)

    def _batch_rewards(self, count: int) -> TurnRewards | None:
        """What all episodes were paid, None where TRL's own advantages are all there is to say.

        Args:
            count: episodes of this process.
        """
        own = self._algorithm is not None and self._algorithm.advantage is not None
        if self._env_factory is None:
            if not own:
                return None
            paid = [((0.0,), ("",))] * (count * self.accelerator.num_processes)
            return turn_rewards(self._outcome_rewards(), paid, self._group_size, 1.0)
        config, paid = self._config, gather_object(self._payments(self._episodes))
        several_rows = len(self._segments) > count
        turns_paid = any(any(rewards) for rewards, _ in paid)
        if not (own or self.has_critic or several_rows or turns_paid):
            return None
        rewards = turn_rewards(
            self._outcome_rewards(), paid, self._group_size, config.turn_discount
        )
        if config.process_scale == "prime":
            scaled = prime_scaled(rewards.process, rewards.turn_counts, rewards.discount)
            rewards = dataclasses.replace(rewards, process=scaled)
        return rewards

    def _payments(self, trajectories: Sequence[Trajectory]) -> list[Payment]:
        """What single turns are credited with; nothing where it is part of the outcome."""
        paid = payments(trajectories)
        if self._config.process_credit == "turn":
            return paid
        return [((0.0,) * len(rewards), states) for rewards, states in paid]

    def _turn_advantages(self, outcome: Tensor, rewards: TurnRewards) -> Tensor:
        """(B, K) of this process."""
        if self._algorithm is not None and self._algorithm.advantage is not None:
            function = self._algorithm.advantage
            options = {name: getattr(self.args, name) for name in self._algorithm.options}
            return self._mine(function(rewards, **options), len(outcome))
        if self._env_factory is not None:
            self._config.check_for_turn_advantages()
        count = len(outcome)
        mine = dataclasses.replace(
            rewards,
            outcome=self._mine(rewards.outcome, count),
            process=self._mine(rewards.process, count),
            turn_counts=self._mine(rewards.turn_counts, count),
        )
        return group_relative(outcome, mine)

    def _spread(self, output: dict[str, Any], outcome: Tensor, turns: Tensor) -> Tensor:
        """Credit of turns on the tokens of their rows: (R, T); (B,) without an environment."""
        if self._env_factory is None:
            return turns[:, 0]
        turn_ids = credited_turns(self._segments, like=output["completion_ids"])
        return placed(turns, self._owners, turn_ids)

    def _finish_rows(self, output: dict[str, Any], episodes: int) -> None:
        """What the loss must know of rows: their turns, and how much each of several weighs."""
        if self.turn_ratio:
            output["turn_ids"] = credited_turns(self._segments, like=output["completion_ids"])
        if len(self._segments) > episodes:
            world = self.accelerator.num_processes
            together(lambda: self._weigh_rows(output, self._tokens, episodes * world))
            self._log_one_completion_per_episode()

    def _log_one_completion_per_episode(self) -> None:
        """TRL's table of completions has a line per prompt; give it as many completions."""
        spoken = self._spoken([self._rows[0]["prompt"]], self._last_ids(self._episodes))
        self._logs["completion"].extend(gather_object(spoken))  # as many as it holds
