"""An episode that is cut into several training rows is trained as if it were one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from agentr1.types import Trajectory
from trainers import inputs, make_trainer, planned, save_policy

# Two groups of two; the third episode is paid for one turn, so credit differs within it.
PLANS = ([0.0] * 3, [0.0], [0.0, 1.0], [0.0] * 4)


@pytest.fixture
def build(tmp_path: Path, make_model: Callable[..., Any], tokenizer: Any) -> Callable[..., Any]:
    model = str(save_policy(tmp_path / "policy", make_model(), tokenizer))

    def build(**settings: Any) -> Any:
        trainer = make_trainer(
            tmp_path, model, tokenizer, env_factory=planned(*PLANS), settings=settings
        )
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = settings.get("gradient_accumulation_steps", 1)
        return trainer

    return build


def cut(trajectory: Trajectory) -> Trajectory:
    """The same episode as an environment would make it that rewrites the context to itself."""
    turns, context = [], ()
    for turn in trajectory.turns:
        context = turn.prompt_ids or context
        turns.append(dataclasses.replace(turn, prompt_ids=context))
        context = (*context, *turn.action_ids, *turn.observation_ids)
    return dataclasses.replace(trajectory, turns=tuple(turns))


def loss_of(trainer: Any, episodes: Sequence[Trajectory] | None = None) -> tuple[Any, ...]:
    """Loss, gradient and what TRL logs of KL and entropy, for one batch."""
    if episodes is not None:
        trainer._play_training = lambda rows: list(episodes)
    batch = trainer._generate_and_score_completions(inputs(trainer))
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    gradient = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
    logged = {n: trainer._metrics["train"][n][-1] for n in ("kl", "entropy")}
    return loss.detach(), gradient, logged, batch


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "cispo"])
def test_loss_kl_and_gradient_do_not_see_where_an_episode_was_cut(
    build: Callable[..., Any], loss_type: str
) -> None:
    settings = {"loss_type": loss_type, "beta": 0.3}  # a sequence's ratio is that of its row
    whole = build(**settings)
    with torch.no_grad():  # a KL of 0 would hide what happens to it
        for parameter in whole.ref_model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    loss, gradient, logged, batch = loss_of(whole)
    rows = build(**settings)
    rows.ref_model.load_state_dict(whole.ref_model.state_dict())
    cut_loss, cut_gradient, cut_logged, cut_batch = loss_of(
        rows, [cut(episode) for episode in whole._episodes]
    )
    assert len(batch["completion_ids"]) == 4
    assert len(cut_batch["completion_ids"]) == sum(len(e.turns) for e in whole._episodes) > 4
    assert loss.abs() > 1e-3
    torch.testing.assert_close(cut_loss, loss, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(cut_gradient, gradient, rtol=1e-4, atol=1e-5)
    if loss_type != "grpo":  # there an episode's tokens weigh by its length, in the log too
        assert cut_logged == pytest.approx(logged, rel=1e-4)


def test_rows_are_filled_up_to_equal_parts_and_none_is_lost_or_trained_twice(
    build: Callable[..., Any],
) -> None:
    settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    trainer = build(**settings, loss_type="dapo")
    play = trainer._play_training
    trainer._play_training = lambda rows: [cut(episode) for episode in play(rows)]
    trainer.args.max_steps = 1
    trained: list[tuple[int, ...]] = []
    seen = trainer._compute_loss

    def note(model: Any, batch: Any) -> Any:
        mask = batch["completion_mask"] * batch["tool_mask"]
        for ids, kept in zip(batch["completion_ids"], mask.bool(), strict=True):
            trained.append(tuple(ids[kept].tolist()))
        return seen(model, batch)

    trainer._compute_loss = note
    trainer.train()
    actions = [t.action_ids for episode in trainer._episodes for t in episode.turns]
    blanks = len(actions) % 2
    assert len(trainer._segments) == len(actions) + blanks
    assert sorted(trained) == sorted([*actions, *[()] * blanks])


def test_a_loss_that_takes_an_episode_for_one_row_is_refused_when_it_is_cut(
    build: Callable[..., Any],
) -> None:
    trainer = build(loss_type="sapo")
    play = trainer._play_training
    trainer._play_training = lambda rows: [cut(episode) for episode in play(rows)]
    with pytest.raises(ValueError, match="sapo.*rewrote the context.*dr_grpo"):
        loss_of(trainer)


@pytest.mark.parametrize("settings", [{"top_entropy_quantile": 0.5}, {"entropy_coef": 0.1}])
def test_entropies_that_the_weights_of_rows_would_bend_are_refused(
    build: Callable[..., Any], settings: dict[str, float]
) -> None:
    trainer = build(loss_type="grpo", **settings)
    trainer.model.train()
    trainer._generate_and_score_completions(inputs(trainer))  # one row an episode: allowed
    play = trainer._play_training
    trainer._play_training = lambda rows: [cut(episode) for episode in play(rows)]
    with pytest.raises(ValueError, match="with loss_type grpo; unset them"):
        loss_of(trainer)
