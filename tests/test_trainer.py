"""AgentTrainer: TRL's trainer where nothing of ours is asked for, credit per turn where it is."""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import inspect
import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from agentr1.config import AgentConfig
from agentr1.envs.tool_env import ToolEnv
from agentr1.tools.runner import ToolRunner
from agentr1.trainer import AgentTrainer
from agentr1.types import Message, StepResult, StopReason, ToolOutcome, ToolResult
from fakes import CountingTool
from trainers import (
    ROWS,
    PlannedEnv,
    Script,
    by_turn,
    inputs,
    make_trainer,
    planned,
    save_policy,
    silent_reward,
    unequal_reward,
)

PLANS = ([1.0, 0.0, 2.0], [0.5], [0.0, 0.0], [0.0, 1.0])
CALL = '<tool_call>\n{"name": "lookup", "arguments": {"key": "%s"}}\n</tool_call>'


@pytest.fixture(scope="module")
def model(make_model: Callable[..., Any]) -> Any:
    return make_model()


@pytest.fixture(scope="module")
def policy(model: Any, tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model as a folder."""
    return save_policy(tmp_path_factory.mktemp("policy"), model, tokenizer)


@pytest.fixture
def build(tmp_path: Path, model: Any, tokenizer: Any) -> Callable[..., Any]:
    def build(model: Any = model, **changes: Any) -> Any:
        trainer = make_trainer(tmp_path, model, tokenizer, **changes)
        trainer.model.train()
        return trainer

    return build


def generate(trainer: Any) -> dict[str, Any]:
    return trainer._generate_and_score_completions(inputs(trainer))


def with_script(trainer: Any, texts: Sequence[Sequence[str]]) -> Any:
    trainer._engine = Script(trainer.codec, texts)
    return trainer


def standardised(rewards: Sequence[float]) -> list[float]:
    """TRL's advantages of one group."""
    mean = sum(rewards) / len(rewards)
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - 1))
    return [(r - mean) / (std + 1e-4) for r in rewards]


# The loss mask ---------------------------------------------------------------------------------


def loss_and_gradient(trainer: Any, batch: dict[str, Any], shift: torch.Tensor) -> tuple[Any, Any]:
    """Loss and gradients when the last hidden states, and so the logits, are moved by `shift`."""

    def move(module: Any, args: Any, output: Any) -> Any:
        output.last_hidden_state = output.last_hidden_state + shift
        return output

    hook = trainer.model.model.register_forward_hook(move)
    trainer.model.zero_grad()
    loss = trainer._compute_loss(trainer.model, batch)
    loss.backward()
    hook.remove()
    gradients = {n: p.grad.clone() for n, p in trainer.model.named_parameters()}
    return loss.detach(), gradients


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "dr_grpo", "bnpo", "cispo", "sapo"])
def test_changing_logits_at_mask_0_positions_changes_neither_loss_nor_gradient(
    build: Callable[..., Any], loss_type: str
) -> None:
    trainer = build(env_factory=planned(*PLANS), settings={"loss_type": loss_type})
    trainer.current_gradient_accumulation_steps = 1  # set by the training loop
    batch = generate(trainer)
    mask = batch["completion_mask"] * batch["tool_mask"]
    assert 0 < mask.sum() < batch["completion_mask"].sum()  # there are observations
    # The logits at place p - 1 belong to the token at p: trained ones must stay as they are.
    prompt = batch["prompt_ids"].shape[1]
    trained = torch.zeros(len(mask), prompt + mask.shape[1], dtype=torch.bool)
    trained[:, prompt - 1 : -1] = mask.bool()
    noise = torch.randn(*trained.shape, 32, generator=torch.Generator().manual_seed(0))

    still, still_gradient = loss_and_gradient(trainer, batch, torch.zeros_like(noise))
    moved, moved_gradient = loss_and_gradient(trainer, batch, noise * ~trained[..., None])
    assert torch.equal(still, moved)
    for name, gradient in still_gradient.items():
        assert torch.equal(gradient, moved_gradient[name]), name
    assert any(g.any() for g in still_gradient.values())

    # The same noise on one trained token is felt, so the comparison above can fail.
    one = torch.zeros_like(trained)
    place = trained.nonzero()[0]
    one[place[0], place[1]] = True
    _, felt = loss_and_gradient(trainer, batch, noise * one[..., None])
    assert any(not torch.equal(still_gradient[name], felt[name]) for name in felt)


def test_sampled_tokens_are_trained_and_observations_are_not(build: Callable[..., Any]) -> None:
    trainer = build(env_factory=planned(*PLANS))
    batch = generate(trainer)
    width = batch["completion_ids"].shape[1]
    for i, episode in enumerate(trainer._episodes):
        ids = [t for turn in episode.turns for t in (*turn.action_ids, *turn.observation_ids)]
        assert batch["completion_ids"][i, : len(ids)].tolist() == ids
        trained = batch["completion_mask"][i] * batch["tool_mask"][i]
        assert trained.tolist() == by_turn(episode, [1.0] * len(episode.turns), width)


def test_recorded_logprobs_are_those_of_the_trained_model(build: Callable[..., Any]) -> None:
    trainer = build(env_factory=planned(*PLANS), settings={"temperature": 0.7})
    batch = generate(trainer)
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    attention = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    width = batch["completion_ids"].shape[1]
    with torch.no_grad():
        logps, _, _ = trainer._get_per_token_logps_and_entropies(
            trainer.model, ids, attention, width
        )
    mask = (batch["completion_mask"] * batch["tool_mask"]).bool()
    recorded = batch["sampling_per_token_logps"]
    torch.testing.assert_close(recorded[mask], logps[mask], atol=1e-4, rtol=1e-4)


def test_actions_are_sampled_without_dropout(
    build: Callable[..., Any], make_model: Callable[..., Any]
) -> None:
    with_dropout = make_model(attention_dropout=0.5)
    trainer = build(model=with_dropout, env_factory=planned([0.0]))
    without = build(env_factory=planned([0.0]))
    assert trainer.model.training
    texts = [
        [s.trajectory.turns[0].action_ids for s in t.play_greedily(ROWS)]
        for t in (trainer, without)
    ]
    assert texts[0] == texts[1]
    assert trainer.model.training  # as it was before


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_is_as_set_after_a_rollout(
    build: Callable[..., Any], reentrant: bool
) -> None:
    kwargs = {"use_reentrant": reentrant}
    settings = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": kwargs}
    trainer = build(env_factory=planned([0.0]), settings=settings)
    trainer.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
    trainer.play_greedily(ROWS[:1])
    layer = trainer.model.model.layers[0]
    assert layer.gradient_checkpointing
    assert layer._gradient_checkpointing_func.keywords == kwargs


def test_rows_without_ids_are_evaluated_in_their_order(build: Callable[..., Any]) -> None:
    rows = [{"prompt": row["prompt"]} for row in ROWS[:3]]
    played = build(env_factory=planned([0.0])).play_greedily(rows)
    assert [s.trajectory.row["prompt"] for s in played] == [row["prompt"] for row in rows]


def test_credit_stays_with_its_tokens_when_batches_are_shuffled_and_split(
    build: Callable[..., Any],
) -> None:
    seen: dict[int, set[float]] = {}

    class Watching(AgentTrainer):
        def _compute_loss(self, model: Any, inputs: Any) -> Any:
            trained = (inputs["completion_mask"] * inputs["tool_mask"]).bool()
            assert not inputs["advantages"][~trained].any()
            for row, mask in zip(inputs["advantages"], trained, strict=True):
                seen.setdefault(int(mask.sum()), set()).update(row[mask].tolist())
            return super()._compute_loss(model, inputs)

    # One row is one turn long and gets -1.25, its sibling is three turns long: 1.25, 1, 1.
    trainer = build(
        trainer=Watching,
        env_factory=planned([1.0, 0.0, 2.0], [0.5]),
        rewards=silent_reward,
        settings={
            "max_steps": 2,
            "per_device_train_batch_size": 1,
            "gradient_accumulation_steps": 4,
            "num_iterations": 2,
            "max_turn_tokens": 1,
        },
    )
    trainer.train()
    assert seen == {1: {-1.25}, 3: {1.25, 1.0}}


def test_mask_truncated_completions_masks_exactly_the_truncated_trajectories(
    build: Callable[..., Any],
) -> None:
    # All end with the same end-of-turn token; episodes 1 and 2 are cut by the turn limit.
    trainer = build(
        env_factory=planned([0.0, 0.0], ends=lambda i: True),
        settings={"max_turns": 2, "mask_truncated_completions": True},
    )
    plans = iter([[0.0, 0.0], [0.0] * 9, [0.0] * 9, [0.0]])
    trainer._env_factory = lambda: PlannedEnv(plans)
    with_script(trainer, [["a", "aa"], ["b", "bb"], ["c", "cc"], ["d"]])
    batch = generate(trainer)
    reasons = [episode.stop_reason for episode in trainer._episodes]
    terminal, cut = StopReason.ENVIRONMENT, StopReason.MAX_TURNS
    assert reasons == [terminal, cut, cut, terminal]
    trained = (batch["completion_mask"] * batch["tool_mask"]).sum(dim=1).tolist()
    sampled = [sum(len(t.action_ids) for t in e.turns) for e in trainer._episodes]
    assert trained == [sampled[0], 0, 0, sampled[3]]
    assert batch["num_items_in_batch"] == sum(trained)


def test_a_batch_of_truncated_trajectories_leaves_the_loss_finite(
    build: Callable[..., Any],
) -> None:
    trainer = build(
        env_factory=planned([0.0], ends=lambda i: False),
        settings={"max_turns": 1, "mask_truncated_completions": True},
    )
    trainer.current_gradient_accumulation_steps = 1
    batch = generate(trainer)
    assert not (batch["completion_mask"] * batch["tool_mask"]).any()
    assert trainer._compute_loss(trainer.model, batch).item() == 0.0


# GRPOTrainer -----------------------------------------------------------------------------------


def train(trainer: Any) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    trainer.train()
    timed = ("time", "runtime", "per_second")
    logs = [
        {k: v for k, v in record.items() if not any(word in k for word in timed)}
        for record in trainer.state.log_history
    ]
    return {n: p.detach() for n, p in trainer.model.named_parameters()}, logs


@pytest.mark.parametrize(("config", "beta"), [(AgentConfig, 0.0), (GRPOConfig, 0.1)])
def test_without_an_environment_agent_trainer_equals_grpo_trainer_bit_for_bit(
    build: Callable[..., Any], policy: Path, config: type, beta: float
) -> None:
    settings = {"max_steps": 3, "max_completion_length": 8, "beta": beta, "num_iterations": 2}
    # One after the other: each draws from the process's generator, which its constructor seeds.
    arguments = {"settings": settings, "model": str(policy)}
    theirs = train(build(trainer=GRPOTrainer, config=GRPOConfig, **arguments))
    ours = train(build(trainer=AgentTrainer, config=config, **arguments))
    (their_weights, their_logs), (our_weights, our_logs) = theirs, ours
    assert our_weights.keys() == their_weights.keys()
    for name, weight in our_weights.items():
        assert torch.equal(weight, their_weights[name]), name
    assert our_logs == their_logs
    assert len(our_logs) == 4  # three steps and the summary
    before = load_file(policy / "model.safetensors")
    assert not any(torch.equal(w, before[n]) for n, w in our_weights.items())  # it did train


def test_every_argument_of_grpo_trainer_is_accepted_by_position_and_by_name(
    tmp_path: Path, model: Any, tokenizer: Any
) -> None:
    parameters = list(inspect.signature(GRPOTrainer.__init__).parameters)[1:]
    config = GRPOConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", num_generations=2
    )
    values: dict[str, Any] = {
        "model": model,
        "reward_funcs": unequal_reward,
        "args": config,
        "train_dataset": build_dataset(),
        "eval_dataset": build_dataset(),
        "processing_class": tokenizer,
        "callbacks": [TrainerCallback()],
        "optimizers": (None, None),
    }
    positional = [values.get(name) for name in parameters]
    AgentTrainer(*positional)
    AgentTrainer(**{name: values.get(name) for name in parameters})


def build_dataset() -> Any:
    from datasets import Dataset

    return Dataset.from_list([dict(row) for row in ROWS])


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"algorithm": "remax"}, "greedy episode per group, which needs an environment"),
        ({"algorithm": "dapo"}, "overlong_share=0.2|refill_rounds=3"),
        ({"turn_discount": 0.5}, "turn_discount=0.5 is about episodes"),
        ({"process_credit": "trajectory"}, "set process_credit to 'turn'"),
    ],
)
def test_without_an_environment_settings_of_episodes_are_refused(
    build: Callable[..., Any], settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        build(settings=settings)


def test_without_an_environment_tools_work_as_in_grpo_trainer(build: Callable[..., Any]) -> None:
    def add(a: int, b: int) -> int:
        """Add two numbers.

        Args:
            a: one.
            b: the other.
        """
        return a + b

    settings = {"max_steps": 1, "max_completion_length": 8}
    given = {"config": GRPOConfig, "settings": settings, "tools": [add]}
    their_weights, their_logs = train(build(trainer=GRPOTrainer, **given))
    our_weights, our_logs = train(build(trainer=AgentTrainer, **given))
    assert all(torch.equal(w, their_weights[n]) for n, w in our_weights.items())
    assert our_logs == their_logs
    assert "tools/call_frequency" in our_logs[0]


def test_without_an_environment_trl_syncs_its_engine_itself(build: Callable[..., Any]) -> None:
    trainer = build()
    trainer._last_loaded_step = -1  # as TRL's constructor leaves it with an engine
    generate(trainer)
    assert trainer._last_loaded_step == -1


def test_without_an_environment_a_rollout_function_works_as_in_grpo_trainer(
    build: Callable[..., Any],
) -> None:
    def rollout(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        return {
            "prompt_ids": [[5, 6]] * len(prompts),
            "completion_ids": [[7, 2]] * len(prompts),
            "logprobs": [[-1.0, -1.0]] * len(prompts),
        }

    weights = [
        train(build(trainer=cls, settings={"max_steps": 1}, rollout_func=rollout))[0]
        for cls in (GRPOTrainer, AgentTrainer)
    ]
    assert all(torch.equal(w, weights[1][n]) for n, w in weights[0].items())


def test_without_an_environment_an_environment_factory_works_as_in_grpo_trainer(
    build: Callable[..., Any],
) -> None:
    class Counter:
        def reset(self, **row: Any) -> str:
            return " Count."

        def count(self, upto: int) -> int:
            """Count.

            Args:
                upto: where to stop.
            """
            return upto

    ours = build(settings={"max_steps": 1, "max_completion_length": 8}, environment_factory=Counter)
    ours.train()
    assert ours.state.global_step == 1


@pytest.mark.parametrize("way", ["tools", "rollout_func", "environment_factory"])
def test_an_environment_excludes_trls_own_ways(build: Callable[..., Any], way: str) -> None:
    def lookup(key: str) -> str:
        """Look up.

        Args:
            key: what.
        """
        return key

    class Factory:
        def reset(self, **row: Any) -> None: ...

        def look(self, key: str) -> str:
            """Look up.

            Args:
                key: what.
            """
            return key

    given = {"tools": [lookup], "rollout_func": lambda p, t: {}, "environment_factory": Factory}
    with pytest.raises(ValueError, match=f"excludes .* and .'{way}'.; keep one way"):
        build(env_factory=planned([1.0]), **{way: given[way]})


def test_what_clashes_with_an_environment_is_said_before_weights_are_loaded(
    build: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "model.safetensors").write_text("garbage")
    with pytest.raises(ValueError, match="keep one way"):
        build(model=str(tmp_path), env_factory=planned([1.0]), rollout_func=lambda p, t: {})
    with pytest.raises(ValueError, match="top_p=0.9"):
        build(model=str(tmp_path), env_factory=planned([1.0]), settings={"top_p": 0.9})


def test_an_environment_needs_an_agent_config(build: Callable[..., Any]) -> None:
    with pytest.raises(ValueError, match="env_factory needs an AgentConfig"):
        build(config=GRPOConfig, env_factory=planned([1.0]))


# Process rewards -------------------------------------------------------------------------------


def test_a_steps_reward_reaches_exactly_its_turns_tokens(build: Callable[..., Any]) -> None:
    trainer = build(env_factory=planned(*PLANS), rewards=silent_reward)
    batch = generate(trainer)
    # Returns-to-go [3 2 2] and [0.5 0 0], [0 0] and [1 1], less the mean of both at each turn.
    expected = [[1.25, 1.0, 1.0], [-1.25], [-0.5, -0.5], [0.5, 0.5]]
    width = batch["completion_ids"].shape[1]
    by_hand = [by_turn(e, v, width) for e, v in zip(trainer._episodes, expected, strict=True)]
    assert batch["advantages"].tolist() == by_hand


def test_whole_numbers_before_them_do_not_cut_fractions(build: Callable[..., Any]) -> None:
    trainer = build(env_factory=planned([1], [0.5], [0], [0.25]), rewards=silent_reward)
    advantages = generate(trainer)["advantages"]  # (4, T)
    assert advantages[:, 0].tolist() == [0.25, -0.25, -0.125, 0.125]


def test_process_rewards_are_discounted_per_turn(build: Callable[..., Any]) -> None:
    trainer = build(
        env_factory=planned(*PLANS), rewards=silent_reward, settings={"turn_discount": 0.5}
    )
    batch = generate(trainer)
    expected = [[0.5, 0.5, 1.0], [-0.5], [-0.25, -0.5], [0.25, 0.5]]
    width = batch["completion_ids"].shape[1]
    by_hand = [by_turn(e, v, width) for e, v in zip(trainer._episodes, expected, strict=True)]
    assert batch["advantages"].tolist() == by_hand


def test_a_tools_reward_reaches_the_turn_that_called_it(build: Callable[..., Any]) -> None:
    tool = CountingTool(ToolResult("found", reward=0.5))
    settings = {"max_completion_length": 256}
    environment = functools.partial(ToolEnv, ToolRunner([tool]))
    trainer = build(env_factory=environment, rewards=silent_reward, settings=settings)
    with_script(trainer, [[CALL % "x", "end"], ["b"], ["c"], [CALL % "y", "end"]])
    batch = generate(trainer)
    assert tool.calls == ["x", "y"]
    expected = [[0.25, 0.0], [-0.25], [-0.25], [0.25, 0.0]]
    width = batch["completion_ids"].shape[1]
    by_hand = [by_turn(e, v, width) for e, v in zip(trainer._episodes, expected, strict=True)]
    assert batch["advantages"].tolist() == by_hand


def test_a_process_reward_function_reaches_the_turn_it_judges(build: Callable[..., Any]) -> None:
    def second_call(
        row: Any, outcomes: tuple[ToolOutcome, ...], past: tuple[ToolOutcome, ...]
    ) -> float:
        return float(bool(outcomes) and len(past) == 1)

    def environment() -> ToolEnv:
        return ToolEnv(ToolRunner([CountingTool()]), process_rewards=[(second_call, 2.0)])

    settings = {"max_completion_length": 256}
    trainer = build(env_factory=environment, rewards=silent_reward, settings=settings)
    with_script(trainer, [[CALL % "x", CALL % "y", "end"], ["b"], ["c"], ["d"]])
    batch = generate(trainer)
    expected = [[1.0, 1.0, 0.0], [-1.0], [0.0], [0.0]]
    width = batch["completion_ids"].shape[1]
    by_hand = [by_turn(e, v, width) for e, v in zip(trainer._episodes, expected, strict=True)]
    assert batch["advantages"].tolist() == by_hand


def test_outcome_and_process_advantages_are_added(build: Callable[..., Any]) -> None:
    trainer = build(env_factory=planned(*PLANS), rewards=unequal_reward)
    batch = generate(trainer)
    outcome = [*standardised([0.0, 1.0]), *standardised([2.0, 0.0])]
    process = [[1.25, 1.0, 1.0], [-1.25], [-0.5, -0.5], [0.5, 0.5]]
    width = batch["completion_ids"].shape[1]
    by_hand = [
        by_turn(episode, [value + outcome[i] for value in process[i]], width)
        for i, episode in enumerate(trainer._episodes)
    ]
    torch.testing.assert_close(batch["advantages"], torch.tensor(by_hand))


def test_without_process_rewards_the_advantages_are_trls_own(build: Callable[..., Any]) -> None:
    trainer = build(env_factory=planned([0.0, 0.0, 0.0], [0.0]))
    batch = generate(trainer)
    by_hand = [*standardised([0.0, 1.0]), *standardised([2.0, 0.0])]
    assert batch["advantages"].shape == (4,)
    assert batch["advantages"].tolist() == list(trainer._logs["advantages"])  # TRL's, as it logs
    torch.testing.assert_close(batch["advantages"], torch.tensor(by_hand))


@pytest.mark.parametrize(
    ("algorithm", "expected"),
    [
        ("grpo", [*standardised([0.0, 1.0]), *standardised([2.0, 0.0])]),
        ("rloo", [-1.0, 1.0, 2.0, -2.0]),
        ("reinforce++", standardised([0.0, 1.0, 2.0, 0.0])),
        ("reinforce++_baseline", standardised([-0.5, 0.5, 1.0, -1.0])),
    ],
)
def test_each_algorithm_turns_rewards_into_its_advantages(
    build: Callable[..., Any], algorithm: str, expected: list[float]
) -> None:
    trainer = build(env_factory=planned([0.0, 0.0], [0.0]), settings={"algorithm": algorithm})
    credited = generate(trainer)["advantages"]
    first = credited if credited.dim() == 1 else credited[:, 0]
    torch.testing.assert_close(first, torch.tensor(expected))


def test_reward_weights_count_and_none_is_no_opinion(build: Callable[..., Any]) -> None:
    def partial(prompts: Sequence[Any], **_: object) -> list[float | None]:
        return [1.0, None, 1.0, None]

    def another(prompts: Sequence[Any], **_: object) -> list[float | None]:
        return [None, 1.0, 3.0, None]

    trainer = build(
        env_factory=planned([0.0]),
        rewards=[partial, another],
        settings={"algorithm": "rloo", "reward_weights": [2.0, 1.0]},
    )
    # Rewards 2, 1 | 5, none: the row without an opinion is in no baseline and has no credit.
    assert generate(trainer)["advantages"][:, 0].tolist() == [1.0, -1.0, 0.0, 0.0]


# Faults ----------------------------------------------------------------------------------------


def test_a_faulted_turn_is_masked_but_its_trajectory_stays_in_the_baseline(
    build: Callable[..., Any],
) -> None:
    trainer = build(env_factory=planned([None, 1.0], [0.0, 0.0], [0.0], [0.0]))
    batch = generate(trainer)
    width = batch["completion_ids"].shape[1]
    kept = [[0.0, 1.0], [1.0, 1.0], [1.0], [1.0]]
    masks = batch["completion_mask"] * batch["tool_mask"]
    by_hand = [by_turn(e, k, width) for e, k in zip(trainer._episodes, kept, strict=True)]
    assert masks.tolist() == by_hand
    # The sibling is measured against the outcome and the process reward of the faulted episode.
    outcome = standardised([0.0, 1.0])[1]
    sibling = by_turn(trainer._episodes[1], [outcome - 0.5, outcome - 0.5], width)
    torch.testing.assert_close(batch["advantages"][1], torch.tensor(sibling))


def test_stragglers_are_replaced_by_spare_rollouts_and_groups_stay_whole(
    build: Callable[..., Any],
) -> None:
    made: list[PlannedEnv] = []

    class Hangs(PlannedEnv):
        async def step(self, message: Message) -> StepResult:
            if made.index(self) % 3 == 1:  # the second of each group's three
                await asyncio.Event().wait()
            return await super().step(message)

    def make() -> PlannedEnv:
        made.append(Hangs(itertools.repeat([0.0, 0.0])))
        return made[-1]

    trainer = build(env_factory=make, settings={"spare_rollouts": 1})
    made.clear()  # one was asked for its tools
    output = generate(trainer)
    assert len(made) == 6
    assert [t.row["id"] for t in trainer._episodes] == ["r0", "r0", "r1", "r1"]
    assert all(t.stop_reason is StopReason.ENVIRONMENT for t in trainer._episodes)
    assert len(output["completion_ids"]) == 4
    assert output["advantages"].any()


def test_more_faults_than_max_fault_share_stop_the_run(build: Callable[..., Any]) -> None:
    trainer = build(
        env_factory=planned([None, 0.0], [None], [0.0], [0.0]), settings={"max_fault_share": 0.3}
    )
    with pytest.raises(RuntimeError) as stopped:
        generate(trainer)
    for part in ("2 of 5 turns", "max_fault_share=0.3", "the server is down", "check the tools"):
        assert part in str(stopped.value)


def test_as_many_faults_as_max_fault_share_do_not_stop_the_run(build: Callable[..., Any]) -> None:
    settings = {"max_fault_share": 0.4}
    trainer = build(env_factory=planned([None, 0.0], [None], [0.0], [0.0]), settings=settings)
    generate(trainer)


def test_a_policy_is_not_judged_by_a_test_of_too_many_faults(build: Callable[..., Any]) -> None:
    plans = [[None, 0.0], [None], [0.0], [0.0]]
    rows = [row | {"id": f"{row['id']}{i}"} for i in range(2) for row in ROWS]
    build(env_factory=planned(*plans), settings={"max_fault_share": 0.4}).play_greedily(rows)
    strict = build(env_factory=planned(*plans), settings={"max_fault_share": 0.3})
    for tested in (strict.play_greedily, strict.evaluate):
        with pytest.raises(RuntimeError, match="of 20 turns .* the server is down"):
            tested(rows)


# Refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [{"loss_type": "vespo"}, {"loss_type": "luspo"}, {"off_policy_mask_threshold": 0.5}],
)
def test_losses_that_read_one_advantage_per_sequence_are_refused_with_process_rewards(
    build: Callable[..., Any], settings: dict[str, Any]
) -> None:
    trainer = build(env_factory=planned(*PLANS), settings=settings)
    with pytest.raises(ValueError, match="process rewards give each turn its own advantage"):
        generate(trainer)
    silent = build(env_factory=planned([0.0], [0.0, 0.0]), settings=settings)
    generate(silent)  # and only with them


def test_every_context_of_a_rewriting_environment_is_a_row_with_its_turns_credit(
    build: Callable[..., Any],
) -> None:
    class Rewriting(PlannedEnv):
        async def step(self, message: Message) -> StepResult:
            result = await super().step(message)
            afresh = (Message("user", "Afresh."),)
            return result if result.terminated else dataclasses.replace(result, rewrite=afresh)

    plans = itertools.cycle(PLANS)
    trainer = build(env_factory=lambda: Rewriting(plans), settings={"loss_type": "dapo"})
    completions: list[Any] = []

    def indifferent(seen: Any) -> list[float]:
        completions.extend(seen)
        return [0.0] * len(seen)

    trainer.reward_funcs[0] = lambda completions, **_: indifferent(completions)
    batch = generate(trainer)
    turns = [(i, k) for i, e in enumerate(trainer._episodes) for k in range(len(e.turns))]
    assert len(batch["completion_ids"]) == len(turns) > len(completions) == 4
    credit = [
        values[mask.bool()].tolist()
        for values, mask in zip(batch["advantages"], batch["tool_mask"], strict=True)
    ]
    returns = [[sum(plan[k:]) for k in range(3)] for plan in PLANS]
    for row, (i, k) in zip(credit, turns, strict=True):
        sibling = i ^ 1
        length = len(trainer._episodes[i].turns[k].action_ids)
        assert row[:length] == pytest.approx([(returns[i][k] - returns[sibling][k]) / 2] * length)


def test_an_environments_own_exception_names_the_row(build: Callable[..., Any]) -> None:
    class Broken(PlannedEnv):
        async def step(self, message: Message) -> StepResult:
            raise ZeroDivisionError("not my day")

    plans = iter([[0.0, 0.0]] * 5)
    trainer = build(env_factory=lambda: Broken(plans))
    with pytest.raises(RuntimeError, match="row 'r0' failed: ZeroDivisionError: not my day"):
        generate(trainer)
    assert trainer.model.training  # as it was before


# Seeds and resuming ----------------------------------------------------------------------------


def test_seeds_are_a_function_of_run_seed_step_and_position(build: Callable[..., Any]) -> None:
    first, second = (build(env_factory=planned([0.0])) for _ in range(2))
    drawn = {}
    for step in (0, 0, 1, 2):
        first.state.global_step = step
        drawn.setdefault(step, []).append(first._seeds(4))
    second.state.global_step = 2  # a resumed run has drawn nothing before
    assert second._seeds(4) == drawn[2][0]
    all_of_them = [seed for batches in drawn.values() for seeds in batches for seed in seeds]
    assert len(set(all_of_them)) == 16
    other = build(env_factory=planned([0.0]), settings={"seed": 43})
    assert other._seeds(4) != drawn[0][0]


class Recording(TrainerCallback):
    """What a run logged, step by step."""

    def __init__(self) -> None:
        self.rewards: dict[int, float] = {}

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if "reward" in logs:
            self.rewards[state.global_step] = logs["reward"]


def length_reward(trajectories: Sequence[Any], **_: object) -> list[float]:
    """Something the policy's draws decide."""
    return [float(sum(t.turns[0].action_ids) % 17) for t in trajectories]


SAVING = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1}


def test_a_resumed_run_ends_with_the_weights_of_the_uninterrupted_one(
    build: Callable[..., Any], tmp_path: Path
) -> None:
    def run(checkpoint: str | None) -> tuple[Any, dict[int, float]]:
        trainer = build(env_factory=planned([0.5], [0.0]), rewards=length_reward, settings=SAVING)
        recording = Recording()
        trainer.add_callback(recording)
        trainer.train(resume_from_checkpoint=checkpoint)
        return trainer, recording.rewards

    whole, whole_rewards = run(None)
    assert sorted(p.name for p in tmp_path.glob("check*")) == ["checkpoint-2", "checkpoint-4"]
    resumed, resumed_rewards = run(str(tmp_path / "checkpoint-2"))
    assert resumed_rewards == {step: whole_rewards[step] for step in (3, 4)}
    for (name, ours), theirs in zip(
        resumed.model.named_parameters(), whole.model.parameters(), strict=True
    ):
        assert torch.equal(ours, theirs), name


@pytest.mark.parametrize("step", [3, 4, 5, 8])
def test_a_run_resumed_in_any_epoch_goes_on_with_its_rows(
    build: Callable[..., Any], tmp_path: Path, step: int
) -> None:
    saving = SAVING | {"max_steps": 10, "save_steps": 1, "collapse_guard": "off"}

    def run(checkpoint: str | None, env_factory: Any = None) -> list[list[str]]:
        rows: list[list[str]] = []

        def noted(prompts: Sequence[Any], **_: object) -> list[float]:
            rows.append([prompt[0]["content"] for prompt in prompts])
            return [0.0] * len(prompts)

        trainer = build(env_factory=env_factory, rewards=noted, settings=saving)
        trainer.train(resume_from_checkpoint=checkpoint)
        return rows

    whole = run(None, planned([0.5], [0.0]))  # eight rows, two a step: four steps an epoch
    assert len(whole) == 10
    assert whole[:4] != whole[4:8]
    assert run(str(tmp_path / f"checkpoint-{step}"), planned([0.5], [0.0])) == whole[step:]
    if step == 8:
        assert run(None) == whole  # TRL's own order


# Checkpoints -----------------------------------------------------------------------------------


def test_a_save_that_fails_leaves_no_folder_with_a_checkpoints_name(
    build: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = build(env_factory=planned([0.0]), settings=SAVING | {"max_steps": 2})

    def full_disk(folder: str) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr(trainer, "_save_rng_state", full_disk)  # after weights and optimizer
    with pytest.raises(OSError, match="no space left"):
        trainer.train()
    assert list(tmp_path.glob("checkpoint-*")) == []
    assert list(tmp_path.glob("_incomplete/checkpoint-2/model.safetensors"))  # it was on its way

    # The next run of this folder finds its way around what is left.
    again = build(env_factory=planned([0.0]), settings=SAVING | {"max_steps": 2})
    again.train()
    assert [p.name for p in tmp_path.glob("*checkpoint*")] == ["checkpoint-2"]
    assert not (tmp_path / "_incomplete").exists()


def test_checkpoints_rotate_and_the_best_one_is_kept(
    build: Callable[..., Any], tmp_path: Path
) -> None:
    def dev(trajectories: Sequence[Any], **_: object) -> list[float]:
        return [scores[trainer.state.global_step]] * len(trajectories)

    scores = {0: 0.0, 1: 0.1, 2: 0.9, 3: 0.2, 4: 0.3}
    settings = SAVING | {
        "save_steps": 1,
        "save_total_limit": 2,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_dev",
    }
    trainer = build(
        env_factory=planned([0.0]),
        metrics={"dev": dev},
        settings=settings,
        eval_dataset=build_dataset().select(range(2)),
    )
    trainer.train()
    assert sorted(p.name for p in tmp_path.glob("check*")) == ["checkpoint-2", "checkpoint-4"]
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-2")
    for folder in tmp_path.glob("checkpoint-*"):
        state = json.loads((folder / "trainer_state.json").read_text())
        assert Path(state["best_model_checkpoint"]).is_dir()
        assert (folder / "optimizer.pt").exists()


def test_saving_a_step_again_replaces_its_checkpoint(
    build: Callable[..., Any], tmp_path: Path
) -> None:
    trainer = build(env_factory=planned([0.0]), settings=SAVING | {"max_steps": 2})
    trainer.train()
    (tmp_path / "checkpoint-2" / "stale").write_text("of an older save")
    trainer._save_checkpoint(trainer.model, None)
    assert [p.name for p in tmp_path.glob("*checkpoint*")] == ["checkpoint-2"]
    assert not (tmp_path / "checkpoint-2" / "stale").exists()


# Evaluation and logs ---------------------------------------------------------------------------


def first_token(trajectories: Sequence[Any], **_: object) -> list[float]:
    return [float(t.turns[0].action_ids[0]) for t in trajectories]


def test_evaluation_plays_greedily_and_keeps_the_rows_order(build: Callable[..., Any]) -> None:
    trainer = build(env_factory=planned([0.0]), metrics={"first": first_token})
    once, twice = trainer.play_greedily(ROWS), trainer.play_greedily(list(reversed(ROWS)))
    assert [s.row_id for s in once] == [row["id"] for row in ROWS]
    assert [s.values for s in twice] == [s.values for s in reversed(once)]
    logits = trainer.model.eval()(torch.tensor([once[0].trajectory.turns[0].prompt_ids])).logits
    assert once[0].values["first"] == logits[0, -1].argmax().item()


def test_evaluate_reports_metrics_and_leaves_the_training_log_alone(
    build: Callable[..., Any],
) -> None:
    settings = {"max_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "logging_steps": 2}
    trainer = build(
        env_factory=planned([0.0, 1.0]),
        metrics={"first": first_token},
        settings=settings,
        eval_dataset=build_dataset().select(range(3)),
    )
    trainer.train()
    evaluations = [r for r in trainer.state.log_history if "eval_first" in r]
    assert [r["step"] for r in evaluations] == [1, 2]
    assert evaluations[0]["eval_turns"] == 2.0
    assert evaluations[0]["eval_process_reward"] == 1.0
    # Two steps are averaged in one record; an evaluation in between must not take its numbers.
    assert not any(name in r for r in evaluations for name in ("reward", "rollout/turns"))
    trained = [r for r in trainer.state.log_history if "reward" in r]
    assert [r["step"] for r in trained] == [2]
    assert trained[0]["rollout/turns"] == 2.0
    assert trained[0]["rollout/first"] > 0


def test_trajectories_are_written_every_so_many_steps(
    build: Callable[..., Any], tmp_path: Path
) -> None:
    trainer = build(
        env_factory=planned([0.5, 0.0]), settings={"max_steps": 3, "trajectory_steps": 2}
    )
    trainer.train()
    files = sorted(p.name for p in (tmp_path / "trajectories").iterdir())
    assert files == ["step_000000.jsonl", "step_000002.jsonl"]
    lines = (tmp_path / "trajectories" / files[0]).read_text().splitlines()
    assert len(lines) == 4
    turn = json.loads(lines[0])["turns"][0]
    assert turn["reward"] == 0.5
    assert len(turn["action_ids"]) == len(turn["logprobs"])
