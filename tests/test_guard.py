"""The collapse guard at work: rates that stay lowered, weights that come back, runs that collapse.

What is an alarm is tested in test_collapse.py, what is measured in test_displacement.py. Here an
alarm is given where a test needs one at a certain step, and comes about where a run collapses.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback, get_scheduler

import test_learning
from agentr1.collapse import Alarm
from agentr1.guard import (
    MOST_ANSWERS,
    CollapseGuard,
    lower_learning_rate,
    signals,
)
from test_learning import LEARNED, OutcomeOnly, guesser, won  # noqa: F401 (a fixture)
from trainers import ROWS, make_trainer, planned, silent_reward

ALARM = Alarm("entropy", 0.0, 1.0, "given by the test")
SCHEDULES = ("constant", "linear", "cosine", "constant_with_warmup")
TOO_MANY = tuple(range(1, MOST_ANSWERS + 2))
SAVING = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None}
PLATEAU = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "eval_steps": 1}


class AlarmAt(TrainerCallback):
    """Raises an alarm when a step begins, as if the record before had been its reason."""

    def __init__(self, guard: CollapseGuard, *steps: int) -> None:
        self.guard, self.steps = guard, steps

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step in self.steps:
            self.guard._alarm = ALARM
            self.guard._seen = 100 + state.global_step  # whatever was saved before is old


class Steeper(TrainerCallback):
    """Multiplies the learning rate, once: somebody's mistake."""

    def __init__(self, step: int, factor: float) -> None:
        self.step, self.factor = step, factor

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            lower_learning_rate(kwargs["optimizer"], kwargs["lr_scheduler"], self.factor)


@pytest.fixture
def make(tmp_path: Path, make_model: Callable[..., Any], tokenizer: Any) -> Callable[..., Any]:
    """`make(alarms=(steps), peft_config=..., **settings)`: a guarded trainer, three short games."""

    def build(alarms: tuple[int, ...] = (), peft_config: Any = None, **settings: Any) -> Any:
        trainer = make_trainer(
            tmp_path / "run",
            make_model(),
            tokenizer,
            settings={"max_steps": 4, "learning_rate": 1e-2, "lr_scheduler_type": "linear"}
            | settings,
            env_factory=planned([0.0], [0.0, 0.0], [0.0], [0.0, 0.0]),
            peft_config=peft_config,
        )
        trainer.add_callback(AlarmAt(trainer._guard, *alarms))
        return trainer

    return build


def weights_of(trainer: Any) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in trainer.model.named_parameters()}


def rates_of(trainer: Any) -> list[float]:
    return [r["learning_rate"] for r in trainer.state.log_history if "learning_rate" in r]


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def schedule_of(name: str) -> tuple[Any, Any]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.8)
    return optimizer, get_scheduler(name, optimizer, num_warmup_steps=3, num_training_steps=20)


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("resumed", [False, True])
def test_a_lowered_rate_is_half_of_the_schedule_from_then_on(name: str, resumed: bool) -> None:
    plain, lowered = schedule_of(name), schedule_of(name)
    for step in range(15):
        if step == 5:
            assert lower_learning_rate(*lowered) == plain[1].get_last_lr()[0] / 2
        if step == 9 and resumed:
            states = [part.state_dict() for part in lowered]
            lowered = schedule_of(name)
            for part, state in zip(lowered, states, strict=True):
                part.load_state_dict(state)
        share = 1 if step < 5 else 0.5
        rates = [optimizer.param_groups[0]["lr"] for optimizer, _ in (plain, lowered)]
        assert rates[1] == pytest.approx(share * rates[0])
        for optimizer, scheduler in (plain, lowered):
            optimizer.step()
            scheduler.step()


def test_a_schedule_that_cannot_be_lowered_is_refused() -> None:
    optimizer, _ = schedule_of("constant")
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
    with pytest.raises(ValueError, match="ReduceLROnPlateau"):
        lower_learning_rate(optimizer, plateau)


def test_a_record_becomes_the_signals_it_has() -> None:
    logs = {"entropy": 0.5, "rollout/turns": 2.0, "rollout/calls": 2.0, "rollout/mistakes": 0.5}
    assert signals(logs) == {"entropy": 0.5, "turns": 2.0, "invalid calls": 0.25}
    assert signals({"rollout/calls": 0.0, "rollout/mistakes": 1.0}) == {"invalid calls": 1.0}
    assert signals({"rollout/calls": 0.01, "rollout/mistakes": 0.01, "entropy": None}) == {}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"save_strategy": "no"}, "save_strategy"),
        ({**SAVING, "save_only_model": True}, "save_only_model"),
        ({**SAVING, "logging_strategy": "no"}, "logging_strategy"),
        ({**SAVING, "gradient_accumulation_steps": 2, "steps_per_generation": 1}, "inside an"),
        ({**SAVING, **PLATEAU}, "'reduce_lr_on_plateau' has none"),
        ({**SAVING, **PLATEAU, "lr_scheduler_type": "greedy"}, "'greedy' has none"),
        ({**SAVING, "save_total_limit": 1}, "save_total_limit=1 keeps 0 beside the newest"),
        ({"save_strategy": "epoch", "save_total_limit": 1}, "save_total_limit=1"),
        ({**SAVING, "save_total_limit": 3}, "36 steps old or older, but save_total_limit=3"),
        ({**SAVING, "save_total_limit": 3, "logging_steps": 18}, "180 steps old or older"),
        ({**SAVING, "save_total_limit": 3, "num_iterations": 2}, "72 steps old or older"),
    ],
)
def test_what_rolling_back_needs_is_asked_for_at_the_start(
    make: Callable[..., Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        make(collapse_guard="roll_back", **settings)


def test_the_best_checkpoint_takes_one_of_the_limit(make: Callable[..., Any]) -> None:
    saving = SAVING | {"save_steps": 36, "save_total_limit": 2}
    make(collapse_guard="roll_back", **saving)
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 36}
    with pytest.raises(ValueError, match="save_total_limit=2 keeps 0 beside the newest and the be"):
        make(collapse_guard="roll_back", **saving, **best)


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        ({"save_steps": 0.25}, True),  # of four steps
        ({"save_strategy": "epoch"}, True),  # four steps
        ({"save_strategy": "best", "metric_for_best_model": "eval_reward"}, False),
    ],
)
def test_checkpoints_that_are_gone_too_soon_are_refused_where_a_run_begins(
    make: Callable[..., Any], settings: dict[str, Any], refused: bool
) -> None:
    trainer = make(collapse_guard="roll_back", **SAVING | {"save_total_limit": 3} | settings)
    if refused:
        with pytest.raises(ValueError, match="save_total_limit=3 keeps 2"):
            trainer.train()
    else:
        trainer.train()


def test_no_rate_is_lowered_of_a_schedule_without_one(make: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="lower_lr lowers the rate of a schedule"):
        make(collapse_guard="lower_lr", **PLATEAU)


@pytest.mark.parametrize(
    ("plans", "share"), [(([1.0], [0.0]), 0.0), (([1.0], [1.0]), 1.0), (([1.0], [0.0], [0.0]), 0.5)]
)
def test_a_group_whose_turns_are_paid_differently_is_not_silent(
    tmp_path: Path, make_model: Callable[..., Any], tokenizer: Any, plans: Any, share: float
) -> None:
    trainer = make_trainer(
        tmp_path,
        make_model(),
        tokenizer,
        rewards=silent_reward,
        settings={"max_steps": 2},
        env_factory=planned(*plans, *plans[2:]),
    )
    trainer.train()
    record = trainer.state.log_history[1]
    assert record["frac_reward_zero_std"] == 1.0  # TRL's, of outcomes alone
    assert record["guard/silent_groups"] == share
    assert "guard/silent_groups" not in trainer.state.log_history[0]  # of the batch before


def test_warning_changes_nothing(make: Callable[..., Any]) -> None:
    plain = make(collapse_guard="off")
    plain.train()
    warned = make(alarms=(2,), collapse_guard="warn")
    warned.train()
    assert equal(weights_of(plain), weights_of(warned))
    records = [r for r in warned.state.log_history if "reward" in r]
    assert [record["guard/triggered"] for record in records] == [0.0, 0.0, 1.0, 0.0]
    assert any("guard/displacement" in record for record in records[1:])
    assert not any("guard/triggered" in record for record in plain.state.log_history)


def test_lowering_halves_the_rest_of_the_schedule_and_survives_a_resume(
    make: Callable[..., Any],
) -> None:
    plain = make(collapse_guard="off")
    plain.train()
    first = make(alarms=(1,), collapse_guard="lower_lr", **SAVING)
    first.train()
    shares = zip(rates_of(plain), (1, 0.5, 0.5, 0.5), strict=True)
    expected = [rate * share for rate, share in shares]
    assert rates_of(first) == pytest.approx(expected)
    resumed = make(collapse_guard="lower_lr", **SAVING)
    resumed.train(resume_from_checkpoint=str(Path(first.args.output_dir) / "checkpoint-2"))
    assert rates_of(resumed) == pytest.approx(expected)
    assert resumed._guard._lowered == 1
    assert equal(weights_of(resumed), weights_of(first))


def test_it_lowers_only_so_often(make: Callable[..., Any]) -> None:
    trainer = make(alarms=TOO_MANY, max_steps=8, collapse_guard="lower_lr")
    trainer.args.lr_scheduler_type = "constant"
    trainer.train()
    assert rates_of(trainer)[-1] == pytest.approx(1e-2 * 0.5**MOST_ANSWERS)


class Witness(TrainerCallback):
    """Keeps the weights before the update of a step, and the optimizer's moments."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.weights: list[dict[str, Tensor]] = []
        self.moments: list[list[Tensor]] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.weights.append(weights_of(self.trainer))
        states = self.trainer.optimizer.state_dict()["state"].values()
        self.moments.append([state["exp_avg"].clone() for state in states])


@pytest.mark.parametrize("lora", [False, True])
def test_going_back_restores_weights_and_optimizer_and_saves(
    make: Callable[..., Any], lora: bool
) -> None:
    adapter = LoraConfig(r=4, target_modules="all-linear") if lora else None
    saving = SAVING | {"save_steps": 3, "max_steps": 6}
    trainer = make(alarms=(4,), peft_config=adapter, collapse_guard="roll_back", **saving)
    witness = Witness(trainer)
    trainer.add_callback(witness)
    trainer.train()
    third, fourth, back = witness.weights[3], weights_of(trainer), witness.weights[4]
    assert equal(back, third)  # the weights after three steps, at the fourth and again at the fifth
    assert not equal(back, fourth)
    pairs = zip(witness.moments[4], witness.moments[3], strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    trained = {n for n, p in trainer.model.named_parameters() if p.requires_grad}
    assert trained == ({n for n in back if "lora_" in n} if lora else set(back))

    left = [5 / 6, 4 / 6, 3 / 6, 2 / 6 / 2, 1 / 6 / 2]  # linear, then half of it
    assert rates_of(trainer) == pytest.approx([1e-2 * share for share in (1, *left)])
    saved = Path(trainer.args.output_dir) / "checkpoint-5"  # not due before the sixth
    weights = load_file(saved / ("adapter_model.safetensors" if lora else "model.safetensors"))
    names = {n.replace(".default", ""): n for n in trained}
    assert all(torch.equal(w, witness.weights[5][names[n]]) for n, w in weights.items())


def test_it_goes_further_back_when_the_run_collapses_again_at_once(
    make: Callable[..., Any], capsys: Any
) -> None:
    trainer = make(alarms=(4, 5), max_steps=6, collapse_guard="roll_back", **SAVING)
    trainer.train()
    said = capsys.readouterr().out
    assert "checkpoint-4 the" in said
    assert "checkpoint-3 the" in said


def test_what_it_goes_back_to_outlives_a_limit_of_two(
    tmp_path: Path, make_model: Callable[..., Any], tokenizer: Any, capsys: Any
) -> None:
    saving = {"save_strategy": "steps", "save_steps": 10, "save_total_limit": 2}
    alone = {"algorithm": "reinforce++", "num_generations": 1, "per_device_train_batch_size": 12}
    trainer = make_trainer(
        tmp_path,
        make_model(),
        tokenizer,
        rows=ROWS * 2,
        settings={"max_steps": 38, "collapse_guard": "roll_back", **saving, **alone},
        env_factory=planned([0.0]),
    )
    there: dict[int, set[str]] = {}

    class Alarms(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            there[state.global_step] = {path.name for path in tmp_path.glob("*-*")}
            if state.global_step in (25, 33, 36):
                trainer._guard._alarm = ALARM

    trainer.add_callback(Alarms())
    trainer.train()
    said = capsys.readouterr().out
    assert "step 25: weights and optimizer are those of" in said
    assert there[25] == {"checkpoint-10", "checkpoint-20"}
    assert there[26] == {"checkpoint-10", "checkpoint-26"}  # that of the collapse had to go
    assert f"step 33: weights and optimizer are those of {tmp_path}/checkpoint-26 " in said
    assert there[33] == {"checkpoint-26", "checkpoint-30"}
    assert there[34] == {"checkpoint-26", "checkpoint-34"}
    assert f"step 36: weights and optimizer are those of {tmp_path}/checkpoint-26 " in said
    assert there[37] == {"checkpoint-26", "checkpoint-37"}


@pytest.mark.parametrize("alarm", [4, 6])
def test_a_return_is_saved_where_the_run_can_be_resumed(
    make: Callable[..., Any], alarm: int
) -> None:
    two = {"steps_per_generation": 2, "max_steps": 10, **SAVING, "save_steps": 2}
    whole = make(alarms=(alarm,), collapse_guard="roll_back", **two | {"save_steps": 4})
    whole.train()
    folder = Path(whole.args.output_dir)
    assert {path.name for path in folder.glob("checkpoint-*")} == {
        *("checkpoint-4", "checkpoint-8", "checkpoint-10"),
        f"checkpoint-{alarm + 2}",  # not in the middle of the batch
    }
    resumed = make(collapse_guard="roll_back", **two)
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{alarm + 2}"))
    assert equal(weights_of(whole), weights_of(resumed))


def test_later_checkpoints_are_put_aside(make: Callable[..., Any]) -> None:
    trainer = make(alarms=(4,), max_steps=6, collapse_guard="roll_back", **SAVING)
    trainer._guard._old = lambda: [9, 2, 1]  # the ninth has not been saved
    trainer.train()
    folder = Path(trainer.args.output_dir)
    kept = {"checkpoint-1", "checkpoint-2", "checkpoint-5", "checkpoint-6"}
    assert {path.name for path in folder.glob("*-*")} == {*kept, "collapsed-3", "collapsed-4"}
    assert trainer._guard._saved == [(1, 1), (2, 2), (5, 2), (6, 106)]  # five is a copy of two


def test_it_is_the_returns_that_are_counted(make: Callable[..., Any], capsys: Any) -> None:
    saving = SAVING | {"save_steps": 6, "max_steps": 8}
    trainer = make(alarms=TOO_MANY, collapse_guard="roll_back", **saving)
    trainer._guard._suspect = 0  # the sixth, just saved, will do
    trainer.train()
    said = capsys.readouterr().out
    assert said.count("no checkpoint is old enough") == MOST_ANSWERS
    assert said.count("weights and optimizer are those of") == 1
    assert said.count("the learning rate is") == MOST_ANSWERS


def test_a_run_that_collapses_too_often_ends(make: Callable[..., Any]) -> None:
    trainer = make(alarms=TOO_MANY, max_steps=8, collapse_guard="roll_back", **SAVING)
    with pytest.raises(RuntimeError, match=f"after {MOST_ANSWERS} returns"):
        trainer.train()


def test_without_an_old_checkpoint_only_the_rate_is_lowered(
    make: Callable[..., Any], capsys: Any
) -> None:
    trainer = make(alarms=(2,), collapse_guard="roll_back", **SAVING | {"save_steps": 3})
    trainer.train()
    assert "no checkpoint is old enough" in capsys.readouterr().out
    assert rates_of(trainer)[2] == pytest.approx(0.25e-2)


def test_a_resumed_run_knows_what_the_guard_knew(make: Callable[..., Any]) -> None:
    whole = make(alarms=(2,), collapse_guard="roll_back", **SAVING)
    whole.train()
    resumed = make(collapse_guard="roll_back", **SAVING)
    resumed.train(resume_from_checkpoint=str(Path(whole.args.output_dir) / "checkpoint-3"))
    states = [t.state.stateful_callbacks["CollapseGuard"] for t in (whole, resumed)]
    for state in states:  # what a batch did is measured in the next, which a resumed run lacks
        for seen in state["judge"]["records"]:
            seen.pop("displacement", None)
            seen.pop("silent groups", None)
    assert json.loads(json.dumps(states[0])) == json.loads(json.dumps(states[1]))
    assert equal(weights_of(whole), weights_of(resumed))


def collapse(folder: Path, policy: Any, tokenizer: Any, response: str) -> list[dict[str, Any]]:
    """A learned game, and from step 25 on ten times the learning rate; the records of training."""
    trainer = make_trainer(
        folder,
        policy,
        tokenizer,
        rewards=won,
        rows=test_learning.ROWS,
        settings=test_learning.SETTINGS
        | {"algorithm": "grpo", "max_steps": 100, "collapse_guard": response, "seed": 0}
        | {"save_strategy": "steps", "save_steps": 5},
        env_factory=OutcomeOnly,
    )
    trainer.add_callback(Steeper(25, 10.0))
    trainer.train()
    return [record for record in trainer.state.log_history if "reward" in record]


def success(records: list[dict[str, Any]]) -> float:
    return sum(record["reward"] for record in records) / len(records)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_run_made_to_collapse_is_kept_by_going_back(
    tmp_path: Path,
    guesser: Any,  # noqa: F811
    tokenizer: Any,
    capsys: Any,
) -> None:
    without = collapse(tmp_path / "without", guesser, tokenizer, "warn")
    assert success(without[20:25]) > LEARNED  # learned, and then lost
    assert success(without[-10:]) < 0.5  # who guesses at random finds 0.56
    assert any(record["guard/triggered"] for record in without)
    assert not any(record["guard/triggered"] for record in without[:26])

    kept = collapse(tmp_path / "kept", guesser, tokenizer, "roll_back")
    assert success(kept[-10:]) > LEARNED
    assert "weights and optimizer are those of" in capsys.readouterr().out
