"""The frugal update against TRL's own path: equal loss, equal gradients, less work."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from trl.kernels import ChunkedLogProbFunction

from agentr1.config import AgentConfig
from agentr1.update import regrouping_window
from trainers import inputs, make_trainer, planned, save_policy

# Episodes of 1 to 6 turns, so that lengths differ a lot.
PLANS = (
    [1.0],
    [0.0] * 6,
    [0.5, 0.0],
    [0.0, None, 1.0, 0.0],
    [0.0] * 3,
    [2.0],
    [0.0] * 5,
    [0.0, 1.0],
)
UNPAID = tuple([0.0] * len(plan) for plan in PLANS)
SETTINGS = {
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 4,
    "max_completion_length": 160,
    "max_turns": 6,
}


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Any]) -> Any:
    return make_model()


@pytest.fixture(scope="module")
def policy(model: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_policy(tmp_path_factory.mktemp("policy"), model, tokenizer)


@pytest.fixture
def build(tmp_path: Path, model: Any, policy: Path, tokenizer: Any) -> Callable[..., Any]:
    def build(frugal: bool, plans: Any = PLANS, **changes: Any) -> Any:
        settings = SETTINGS | changes.pop("settings", {})
        source = str(policy) if settings.get("beta") else model  # the reference is loaded again
        trainer = make_trainer(
            tmp_path, source, tokenizer, env_factory=planned(*plans), settings=settings, **changes
        )
        trainer.frugal = frugal
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
        return trainer

    return build


def window(trainer: Any) -> list[dict[str, Any]]:
    """The micro-batches of one generation."""
    rows = inputs(trainer) * trainer.args.steps_per_generation
    torch.manual_seed(0)  # TRL shuffles by torch's generator
    found = []
    for step in range(trainer.args.steps_per_generation):
        trainer._step = step
        found.append(trainer._prepare_inputs(rows))
    return found


def update(trainer: Any) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and the gradient of every optimizer step, without stepping."""
    trainer.model.zero_grad()
    losses: list[float] = []
    gradients: dict[str, torch.Tensor] = {}
    steps = trainer.args.gradient_accumulation_steps
    for start in range(0, trainer.args.steps_per_generation, steps):
        total = 0.0
        for batch in window(trainer)[start : start + steps]:
            loss = trainer._compute_loss(trainer.model, batch)
            loss.backward()
            total += loss.item()
        losses.append(total)
        for name, parameter in trainer.model.named_parameters():
            if parameter.grad is not None:
                gradients[f"{start} {name}"] = parameter.grad.clone()
        trainer.model.zero_grad()
    return losses, gradients


def assert_equal_updates(frugal: Any, plain: Any) -> None:
    losses, gradients = update(frugal)
    expected_losses, expected = update(plain)
    assert losses == pytest.approx(expected_losses, abs=1e-5)
    assert gradients.keys() == expected.keys()
    largest = max(g.abs().max().item() for g in expected.values())
    assert largest > 1e-3  # there is something to compare
    for name, gradient in gradients.items():
        torch.testing.assert_close(
            gradient,
            expected[name],
            rtol=1e-5,
            atol=1e-5 * largest,
            msg=lambda m, n=name: f"{n}: {m}",
        )


@pytest.mark.parametrize(
    "loss_type", ["grpo", "dapo", "bnpo", "dr_grpo", "cispo", "sapo", "luspo", "vespo"]
)
def test_loss_and_gradient_are_those_of_trls_path(
    build: Callable[..., Any], loss_type: str
) -> None:
    plans = UNPAID if loss_type in ("luspo", "vespo") else PLANS
    settings = {"loss_type": loss_type, "beta": 0.1}
    assert_equal_updates(
        build(True, plans, settings=settings), build(False, plans, settings=settings)
    )


@pytest.mark.parametrize(
    "settings",
    [
        pytest.param({"importance_sampling_level": "sequence", "loss_type": "grpo"}, id="sequence"),
        pytest.param({"entropy_coef": 0.1}, id="entropy bonus"),
        pytest.param({"top_entropy_quantile": 0.5}, id="entropy quantile"),
        pytest.param({"mask_truncated_completions": True, "max_turns": 3}, id="masked rows"),
        # Two windows to a generation, the second with old log-probabilities.
        pytest.param({"gradient_accumulation_steps": 2, "steps_per_generation": 4}, id="windows"),
        pytest.param({"gradient_accumulation_steps": 3, "steps_per_generation": 4}, id="uneven"),
        pytest.param({"pad_to_multiple_of": 64}, id="padding"),
        # Old log-probabilities of padded completions.
        pytest.param({"pad_to_multiple_of": 64, "num_iterations": 2}, id="padding, old"),
    ],
)
def test_settings_that_look_at_a_whole_micro_batch_keep_their_meaning(
    build: Callable[..., Any], settings: dict[str, Any]
) -> None:
    assert_equal_updates(build(True, settings=settings), build(False, settings=settings))


def test_an_adapter_gets_the_same_gradient(build: Callable[..., Any]) -> None:
    from peft import LoraConfig

    def with_adapter(frugal: bool) -> Any:
        torch.manual_seed(0)
        trainer = build(frugal, peft_config=LoraConfig(r=4, target_modules="all-linear"))
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        return trainer

    assert_equal_updates(with_adapter(True), with_adapter(False))


@pytest.fixture
def projected(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many places each call of TRL's head has projected."""
    counts: list[int] = []
    real = ChunkedLogProbFunction.apply

    def counted(hidden: torch.Tensor, *rest: Any) -> Any:
        counts.append(len(hidden))
        return real(hidden, *rest)

    monkeypatch.setattr(ChunkedLogProbFunction, "apply", counted)
    return counts


def test_only_places_under_the_mask_are_projected(
    build: Callable[..., Any], projected: list[int]
) -> None:
    trainer = build(True)
    batches = window(trainer)
    for batch in batches:
        trainer._compute_loss(trainer.model, batch)
    trained = [int((b["completion_mask"] * b["tool_mask"]).sum()) for b in batches]
    assert projected == trained
    places = sum(b["completion_mask"].numel() for b in batches)
    assert sum(trained) < 0.7 * places


def test_old_and_reference_passes_project_no_more(
    build: Callable[..., Any], projected: list[int]
) -> None:
    trainer = build(True, settings={"beta": 0.1, "num_iterations": 2})
    batches = window(trainer)
    trained = sum(int((b["completion_mask"] * b["tool_mask"]).sum()) for b in batches)
    assert sum(projected) == 2 * trained  # the reference's and the old ones


def test_micro_batches_shrink_with_their_rows(build: Callable[..., Any]) -> None:
    widths = [b["completion_ids"].shape[1] for b in window(build(True))]
    assert widths == sorted(widths, reverse=True)
    assert widths[-1] < widths[0] / 2
    assert len({b["completion_ids"].shape[1] for b in window(build(False))}) == 1


def test_a_micro_batch_without_a_trained_token_has_a_gradient_of_zero(
    build: Callable[..., Any],
) -> None:
    trainer = build(True)
    batch = window(trainer)[0]
    batch["tool_mask"] = torch.zeros_like(batch["tool_mask"])
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or not p.grad.any() for p in trainer.model.parameters())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, 4),
        ({"loss_type": "bnpo"}, 1),
        ({"entropy_coef": 0.1}, 1),
        ({"use_adaptive_entropy": True}, 1),
        ({"top_entropy_quantile": 0.2}, 1),
        ({"gradient_accumulation_steps": 2, "steps_per_generation": 8}, 2),
        ({"gradient_accumulation_steps": 8, "steps_per_generation": 4}, 4),
        ({"gradient_accumulation_steps": 4, "steps_per_generation": 6, "num_generations": 4}, 1),
    ],
)
def test_rows_move_only_where_gradients_are_summed(
    tmp_path: Path, settings: dict[str, Any], expected: int
) -> None:
    config = AgentConfig(str(tmp_path), use_cpu=True, bf16=False, **(SETTINGS | settings))
    assert regrouping_window(config) == expected
