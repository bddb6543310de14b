"""GRPOTrainer with agentr1's rollout in front of it and credit per turn behind it.

The trainer knows tensors and never turns, only `turn_ids`. It hands rows to the rollout, gives
TRL the tokens and the mask, and afterwards replaces TRL's one advantage per sequence where turns
were paid or the algorithm asks for it. Loss, optimisation, distribution, logging and checkpoints
are TRL's.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from trl import GRPOTrainer
from trl.models import unwrap_model_for_generation

from agentr1.advantages import combine, turn_leave_one_out
from agentr1.algorithms import ALGORITHMS
from agentr1.checkpoints import WholeCheckpoints
from agentr1.codec import Codec
from agentr1.config import AgentConfig
from agentr1.credit import padded_masks, process_rewards, trained_turn_ids, training_segments
from agentr1.engines.base import Sampling
from agentr1.envs.base import EnvFactory
from agentr1.inference import make_engine, without_trls_engine
from agentr1.loops import finish
from agentr1.ranks import means_over_processes, together, without_collective_hooks
from agentr1.rollout import rollout_batch
from agentr1.runs import write_trajectories
from agentr1.scoring import Metric, Scored, episode_means, score
from agentr1.types import Row, Segment, Trajectory
from agentr1.update import FrugalUpdate


class AgentTrainer(WholeCheckpoints, FrugalUpdate):
    """Train a policy in a multi-turn environment.

    Without `env_factory` and with `algorithm=None` this is `GRPOTrainer`, to the last bit.

    Contact with TRL 1.16 and transformers, pinned by `tests/test_trl_contract.py`:

    - `rollout_func` (public attribute) with its key `env_mask`: set after construction.
    - `_generate_and_score_completions`, `_calculate_rewards`: `super()` around, to keep the rows
      and the rewards and to replace `advantages`.
    - `_prepare_inputs`, `_compute_loss`, `_get_per_token_logps_and_entropies`: `super()` around,
      see `FrugalUpdate`.
    - `use_vllm`, `_last_loaded_step`: private writes, so that TRL corrects for what a server's
      probabilities differ by, but neither makes an engine of its own nor loads weights into one.
    - `evaluate`, `end` (public): greedy rollouts where there is an environment; close the engine.
    - `_log_metric`: private call, averages over ranks.
    - `mask_truncated_completions`: private write, the rollout decides what is truncated.
    - `temperature`, `num_generations`, `reward_weights`, `eos_token_ids`, `model_wrapped`,
      `processing_class`: read.
    - `unwrap_model_for_generation`: gathers ZeRO-3 parameters once around a rollout.

    Args:
        *args: as in `GRPOTrainer`.
        env_factory: makes one environment per episode. Excludes `tools`, `rollout_func` and
            `environment_factory`, which are TRL's own ways.
        metrics: name to metric, for evaluation and for the batch's log.
        **kwargs: as in `GRPOTrainer`.

    Raises:
        ValueError: settings that clash; see `AgentConfig`.
    """

    def __init__(
        self,
        *args: Any,
        env_factory: EnvFactory | None = None,
        metrics: Mapping[str, Metric] | None = None,
        **kwargs: Any,
    ) -> None:
        if env_factory is None:
            super().__init__(*args, **kwargs)
        else:
            given = inspect.signature(GRPOTrainer).bind(*args, **kwargs).arguments
            with without_trls_engine(_checked(given)):
                super().__init__(*args, **kwargs)
        name = getattr(self.args, "algorithm", None)
        self._algorithm = ALGORITHMS[name] if name else None
        self._env_factory = env_factory
        self._metric_functions = dict(metrics or {})
        self._reward_table: Tensor | None = None
        if env_factory is not None:
            self._prepare_rollouts(env_factory)

    def _prepare_rollouts(self, env_factory: EnvFactory) -> None:
        self._config: AgentConfig = self.args  # pyright: ignore (_checked has seen it)
        self.rollout_func = self._play_batch
        self.frugal = True
        # TRL asks only whether the last id is an eos; we know why each episode ended.
        self._mask_truncated = self.mask_truncated_completions
        self.mask_truncated_completions = False
        model: Any = self.accelerator.unwrap_model(self.model)
        tokenizer: Any = self.processing_class
        self.codec = Codec(tokenizer, env_factory().tool_schemas, model.config.name_or_path)
        tokenizer.chat_template = self.codec.template  # a saved policy carries what it was taught
        self.use_vllm = self._config.use_vllm  # TRL corrects for what a server samples otherwise
        stop_ids = sorted(self.codec.stop_ids.union(self.eos_token_ids))
        self._engine = make_engine(self._config, model, stop_ids, self.accelerator)
        self._batches_of_step = (-1, 0)
        self._period_written = -1

    def end(self) -> None:
        """What the Trainer's own `end` does (5.17 has none), after the engine has let go."""
        if self._env_factory is not None:
            self._engine.close()
        self.accelerator.end_training()

    @property
    def _group_size(self) -> int:
        assert self.num_generations is not None  # GRPOConfig has checked it
        return self.num_generations

    @property
    def _training(self) -> bool:
        assert self.model is not None  # set by the Trainer's constructor
        return self.model.training

    # Rollout ------------------------------------------------------------------------------

    def _play(
        self, rows: Sequence[Row], samplings: Sequence[Sampling], spare: int = 0
    ) -> list[Trajectory]:
        """Play rows on this process; ranks meet before the first turn and after the last."""
        factory = self._env_factory
        assert factory is not None  # callers check

        def play() -> list[Trajectory]:
            return finish(
                rollout_batch(
                    rows,
                    factory,
                    self.codec,
                    self._engine,
                    limits=self._config.limits,
                    samplings=samplings,
                    group_size=self._group_size if spare else 1,
                    spare=spare,
                )
            )

        with self._policy() as model:
            together(lambda: self._engine.sync(model))
            if self._engine.samples_from_model:
                try:
                    return together(play)
                finally:
                    self._engine.release()
        return together(play)

    @contextmanager
    def _policy(self) -> Iterator[Any]:
        """The model as it samples: parameters whole, in the precision trained, without dropout."""
        was_training = self._training
        wrapped: Any = self.model_wrapped
        checkpointing: Any = self.args.gradient_checkpointing_kwargs  # or they become the defaults
        with (
            torch.no_grad(),
            self.accelerator.autocast(),
            unwrap_model_for_generation(
                wrapped,
                self.accelerator,
                gradient_checkpointing_kwargs=checkpointing,
            ) as unwrapped,
        ):
            model: Any = unwrapped
            if model.device.type != self.accelerator.device.type:  # DeepSpeed moves it at `train`
                model.to(self.accelerator.device)
            model.eval()
            try:
                with without_collective_hooks(model):
                    yield model
            finally:
                model.train(was_training)

    def _play_batch(self, prompts: list[Any], trainer: Any) -> dict[str, list[Any]]:
        """TRL's `rollout_func`: one completion per row, in order."""
        rows = self._rows
        if len(rows) != len(prompts):
            raise RuntimeError(f"TRL asked for {len(prompts)} completions of {len(rows)} rows")
        spare = self._config.spare_rollouts
        episodes = len(rows) // self._group_size * (self._group_size + spare)
        samplings = [
            Sampling(max_tokens=1, temperature=self.temperature, seed=seed)
            for seed in self._seeds(episodes)
        ]
        trajectories = self._play(rows, samplings, spare)
        segments = together(lambda: training_segments(rows, trajectories))
        self._episodes, self._segments = trajectories, segments
        self._refuse_noise(trajectories)
        masks = [self._mask(s, t) for s, t in zip(segments, trajectories, strict=True)]
        # Until the rows are scored: the passes of old and reference log-probabilities.
        self.loss_mask = padded_masks(masks, self.accelerator.device)
        return {
            "prompt_ids": [list(s.prompt_ids) for s in segments],
            "completion_ids": [list(s.completion_ids) for s in segments],
            "logprobs": [list(s.logprobs) for s in segments],
            "env_mask": masks,
            "trajectories": trajectories,
        }

    def _mask(self, segment: Segment, trajectory: Trajectory) -> list[int]:
        if self._mask_truncated and not trajectory.stop_reason.is_terminal:
            return [0] * len(segment.loss_mask)
        return list(segment.loss_mask)

    def _seeds(self, count: int) -> list[int]:
        """One seed per rollout, a function of run seed, step, process and position alone.

        So a resumed run draws what the uninterrupted one would have drawn.
        """
        step, batches = self._batches_of_step
        batches = batches + 1 if step == self.state.global_step else 0
        self._batches_of_step = (self.state.global_step, batches)
        place = (self.args.seed, self.state.global_step, batches, self.accelerator.process_index)
        draws = random.Random(repr(place))
        return [draws.getrandbits(40) for _ in range(count)]

    def _refuse_noise(self, trajectories: Sequence[Trajectory]) -> None:
        """Stop on all ranks together when too many turns met an infrastructure fault."""
        turns = [turn for t in trajectories for turn in t.turns]
        local = torch.tensor(
            [[sum(t.fault is not None for t in turns), len(turns)]], device=self.accelerator.device
        )
        everyone: Any = self.accelerator.gather(local)
        faults, total = everyone.sum(0).tolist()
        if faults > self._config.max_fault_share * total:
            example = next((t.fault for t in turns if t.fault), "on another process")
            raise RuntimeError(
                f"{faults} of {total} turns met an infrastructure fault, more than "
                f"max_fault_share={self._config.max_fault_share}: {example}; check the tools' "
                "servers or raise their timeout"
            )

    # Credit -------------------------------------------------------------------------------

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any
    ) -> Tensor:
        table = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self._reward_table = table  # (B_global, F)
        if self._env_factory is not None and self._training:
            together(
                self._log_batch
            )  # here, because TRL averages pending metrics right after rewards
        return table

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        training = self._training
        # Copies: TRL writes the trajectories into its rows, which would then hold themselves.
        self._rows = [dict(row) for row in inputs]
        if self._env_factory is not None:
            self._last_loaded_step = self.state.global_step  # `_play` syncs, not TRL
        try:
            output = super()._generate_and_score_completions(inputs)
        finally:
            self.loss_mask = None
        if training:
            output["advantages"] = self._outcome_advantages(output["advantages"])
            if self._env_factory is not None:
                output["advantages"] = together(lambda: self._with_process_rewards(output))
        return output

    def _outcome_advantages(self, advantages: Tensor) -> Tensor:
        """TRL's `(B,)`, or the algorithm's own on the global batch, cut to this process."""
        if self._algorithm is None or self._algorithm.outcome_advantage is None:
            return advantages
        table = self._reward_table
        assert table is not None  # `super()` has just filled it
        rewards = (table * self.reward_weights.to(table.device)).nansum(dim=1)  # (B_global,)
        rewards[table.isnan().all(dim=1)] = torch.nan
        everyone = self._algorithm.outcome_advantage(rewards, self._group_size)
        start = self.accelerator.process_index * len(advantages)
        return everyone[start : start + len(advantages)]

    def _with_process_rewards(self, output: dict[str, Any]) -> Tensor:
        """`(B,)` where no turn was paid, else `(B, T)` with each turn's own credit."""
        outcome: Tensor = output["advantages"]
        if not any(any(t.process_rewards) for t in self._episodes):
            return outcome
        self._config.check_for_turn_advantages()
        process = turn_leave_one_out(
            *process_rewards(self._episodes, like=outcome),
            self._group_size,
            self._config.turn_discount,
        )
        turn_ids = trained_turn_ids(self._segments, like=output["completion_ids"])
        return combine(outcome, process, turn_ids)

    def _log_batch(self) -> None:
        means = means_over_processes(episode_means(self._episodes), len(self._episodes))
        for name, value in means.items():
            self._log_metric(f"rollout/{name}", value)
        for scored in score(self._episodes, self._metric_functions):
            for name, value in scored.values.items():
                self._log_metric(f"rollout/{name}", value)
        every = self._config.trajectory_steps
        if every and self.state.global_step // every != self._period_written:
            self._period_written = self.state.global_step // every
            folder = Path(str(self.args.output_dir)) / "trajectories"
            rank = self.accelerator.process_index
            write_trajectories(folder, self.state.global_step, rank, self._episodes)

    # Evaluation ---------------------------------------------------------------------------

    def play_greedily(self, rows: Sequence[Row]) -> list[Scored]:
        """Play rows once each with temperature 0, shared among the processes, and score them.

        Args:
            rows: dataset rows.

        Returns:
            Records of all rows, in order, on every process.
        """
        mine = range(self.accelerator.process_index, len(rows), self.accelerator.num_processes)
        greedy = [Sampling(max_tokens=1, temperature=0.0)] * len(mine)
        trajectories = self._play([rows[i] for i in mine], greedy)
        scored = together(lambda: score(trajectories, self._metric_functions))
        found = dict(gather_object(list(zip(mine, scored, strict=True))))
        return [found[i] for i in range(len(rows))]

    def evaluate(
        self,
        eval_dataset: Any = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Greedy rollouts where there is an environment, TRL's evaluation otherwise."""
        if self._env_factory is None:
            return super().evaluate(eval_dataset, ignore_keys, metric_key_prefix)
        rows: Any = eval_dataset or self.eval_dataset
        scored = self.play_greedily(list(rows))
        names = scored[0].values
        means = {n: sum(s.values[n] for s in scored) / len(scored) for n in names}
        means |= episode_means([s.trajectory for s in scored])
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in means.items()}
        model: Any = self.model
        was_training = model.training
        model.eval()  # TRL's `log` would take the training numbers gathered so far along
        self.log(metrics)
        model.train(was_training)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics


def _checked(given: Mapping[str, Any]) -> AgentConfig:
    """Refuse what clashes with an environment, before weights are loaded."""
    config = given.get("args")
    clash = [k for k in ("tools", "rollout_func", "environment_factory") if given.get(k)]
    if clash or not isinstance(config, AgentConfig):
        raise ValueError(
            "env_factory needs an AgentConfig and excludes tools, rollout_func and "
            f"environment_factory, got {type(config).__name__} and {clash}; keep one way"
        )
    config.check_for_environment()
    return config
