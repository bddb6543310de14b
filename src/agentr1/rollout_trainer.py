"""GRPOTrainer that plays episodes: engine, rollouts, evaluation, and what is logged about them.

Layer 6, the half of `trainer.AgentTrainer` that knows rollouts; the other half knows credit. Rows
go in, trajectories come out, the same number of collectives on every process.
"""

from __future__ import annotations

import inspect
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.utils.data import Sampler
from trl import GRPOTrainer
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import RepeatSampler

from agentr1.checkpoints import WholeCheckpoints
from agentr1.codec import Codec
from agentr1.config import AgentConfig
from agentr1.engines.base import Sampling
from agentr1.envs.base import EnvFactory
from agentr1.inference import make_engine, without_trls_engine
from agentr1.loops import finish
from agentr1.ranks import (
    leave_processes,
    means_over_processes,
    together,
    without_collective_hooks,
)
from agentr1.rollout import rollout_batch
from agentr1.runs import write_trajectories
from agentr1.scoring import Metric, Scored, episode_means, score
from agentr1.types import Row, Trajectory
from agentr1.update import FrugalUpdate


class RolloutTrainer(WholeCheckpoints, FrugalUpdate):
    """GRPOTrainer with an engine and environments; `AgentTrainer` trains on what it plays.

    Contact with TRL 1.16 and transformers, pinned by `tests/test_trl_contract.py`:

    - `use_vllm`, `vllm_importance_sampling_correction`, `vllm_importance_sampling_mode`: private
      writes, so that TRL corrects for what any engine's probabilities differ by, but neither makes
      an engine of its own nor loads weights into one.
    - `evaluate`, `end` (public): greedy rollouts where there is an environment; close the engine.
    - `_log_metric`: private call, averages over ranks.
    - `mask_truncated_completions`: private write, the rollout decides what is truncated.
    - `temperature`, `num_generations`, `eos_token_ids`, `model_wrapped`, `processing_class`: read.
    - `_get_train_sampler`: `super()` around, so that a resumed run goes on in its own epoch.
    - `unwrap_model_for_generation`: gathers ZeRO-3 parameters once around a rollout.
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
        self._env_factory = env_factory
        self._metric_functions = dict(metrics or {})
        if env_factory is not None:
            self._prepare_rollouts(env_factory)

    def _prepare_rollouts(self, env_factory: EnvFactory) -> None:
        self._config: AgentConfig = self.args  # pyright: ignore (_checked has seen it)
        self.frugal = True
        # TRL asks only whether the last id is an eos; we know why each episode ended.
        self._mask_truncated = self.mask_truncated_completions
        self.mask_truncated_completions = False
        model: Any = self.accelerator.unwrap_model(self.model)
        tokenizer: Any = self.processing_class
        self.codec = Codec(tokenizer, env_factory().tool_schemas, model.config.name_or_path)
        tokenizer.chat_template = self.codec.template  # a saved policy carries what it was taught
        mode = self._config.sampling_mode
        self.use_vllm = mode is not None
        self.vllm_importance_sampling_correction = True
        self.vllm_importance_sampling_mode = mode or self.vllm_importance_sampling_mode
        stop_ids = sorted(self.codec.stop_ids.union(self.eos_token_ids))
        self._engine = make_engine(self._config, model, stop_ids, self.accelerator)
        self._batches_of_step = (-1, 0)
        self._period_written = -1

    def end(self) -> None:
        """What the Trainer's own `end` does (5.17 has none), after the engine has let go."""
        if self._env_factory is not None:
            self._engine.close()
        leave_processes(self.accelerator)

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

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        sampler = super()._get_train_sampler(*args, **kwargs)
        if self._env_factory is None or not isinstance(sampler, RepeatSampler):
            return sampler
        self._config.check_rows(sampler.num_samples)
        # Nearly whole: the Trainer adds up fractions of an epoch.
        return _EpochSampler(sampler, lambda: int((self.state.epoch or 0.0) + 1e-6))

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

    def _refuse_noise(self, faults: int, turns: int, known: Sequence[str]) -> None:
        """Stop where too many turns of all processes met an infrastructure fault."""
        if faults > self._config.max_fault_share * turns:
            example = known[0] if known else "on another process"
            raise RuntimeError(
                f"{faults} of {turns} turns met an infrastructure fault, more than "
                f"max_fault_share={self._config.max_fault_share}: {example}; check the tools' "
                "servers or raise their timeout"
            )

    def _log_batch(self, episodes: Sequence[Trajectory]) -> None:
        means = means_over_processes(episode_means(episodes), len(episodes))
        for name, value in means.items():
            self._log_metric(f"rollout/{name}", value)
        for scored in score(episodes, self._metric_functions):
            for name, value in scored.values.items():
                self._log_metric(f"rollout/{name}", value)
        every = self._config.trajectory_steps
        if every and self.state.global_step // every != self._period_written:
            self._period_written = self.state.global_step // every
            folder = Path(str(self.args.output_dir)) / "trajectories"
            rank = self.accelerator.process_index
            write_trajectories(folder, self.state.global_step, rank, episodes)

    # Evaluation ---------------------------------------------------------------------------

    def play_greedily(self, rows: Sequence[Row]) -> list[Scored]:
        """Play rows once each with temperature 0, shared among the processes, and score them.

        Args:
            rows: dataset rows.

        Returns:
            Records of all rows, in order, on every process.

        Raises:
            RuntimeError: more faults than `max_fault_share`: a policy is not to be judged by them.
        """
        mine = range(self.accelerator.process_index, len(rows), self.accelerator.num_processes)
        greedy = [Sampling(max_tokens=1, temperature=0.0)] * len(mine)
        trajectories = self._play([rows[i] for i in mine], greedy)
        scored = together(lambda: score(trajectories, self._metric_functions))
        found = dict(gather_object(list(zip(mine, scored, strict=True))))
        turns = [turn for s in found.values() for turn in s.trajectory.turns]
        faults = [turn.fault for turn in turns if turn.fault is not None]
        self._refuse_noise(len(faults), len(turns), faults)
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


class _EpochSampler(Sampler[int]):
    """TRL's sampler, in the order of the epoch that training is in.

    It draws one permutation per epoch from a generator that a checkpoint does not hold, so a
    resumed run would begin with the first epoch's again.
    """

    def __init__(self, sampler: RepeatSampler, epoch: Callable[[], int]) -> None:
        self._sampler = sampler
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._sampler)

    def __iter__(self) -> Iterator[int]:
        sampler = self._sampler
        if sampler.shuffle and sampler.seed is not None:
            sampler.generator.manual_seed(sampler.seed)
            for _ in range(self._epoch()):
                torch.randperm(sampler.num_samples, generator=sampler.generator)
        return iter(sampler)
