"""AgentConfig and RecipeArguments: what may be set, and what is refused with a way out."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from trl import GRPOConfig

from agentr1.algorithms import ALGORITHMS
from agentr1.config import AgentConfig
from agentr1.recipe_arguments import RecipeArguments
from trainers import SETTINGS


def config(tmp_path: Path, **settings: Any) -> AgentConfig:
    return AgentConfig(output_dir=str(tmp_path), **(SETTINGS | settings))


def own_fields(kind: type, base: type | None = None) -> list[dataclasses.Field[Any]]:
    inherited = {f.name for f in dataclasses.fields(base)} if base else set()
    return [f for f in dataclasses.fields(kind) if f.name not in inherited]


def test_every_field_of_ours_says_what_it_is() -> None:
    for field in own_fields(AgentConfig, GRPOConfig) + own_fields(RecipeArguments):
        assert field.metadata["help"].endswith("."), field.name


def test_the_names_that_trl_parser_reserves_are_not_used() -> None:
    names = {f.name for f in (*dataclasses.fields(AgentConfig), *own_fields(RecipeArguments))}
    assert not names & {"config", "env"}


def test_no_name_means_two_things() -> None:
    assert not {f.name for f in dataclasses.fields(AgentConfig)} & {
        f.name for f in dataclasses.fields(RecipeArguments)
    }


def test_without_an_algorithm_trls_fields_are_left_alone(tmp_path: Path) -> None:
    ours, theirs = config(tmp_path), GRPOConfig(output_dir=str(tmp_path), **SETTINGS)
    for field in dataclasses.fields(GRPOConfig):
        if field.name not in ("logging_dir", "run_name"):
            assert str(getattr(ours, field.name)) == str(getattr(theirs, field.name)), field.name


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_an_algorithm_sets_the_fields_that_define_it(tmp_path: Path, name: str) -> None:
    found = config(tmp_path, algorithm=name)
    for key, value in ALGORITHMS[name].settings.items():
        assert getattr(found, key) == value, key


def test_an_algorithm_refuses_another_value_of_what_it_fixes(tmp_path: Path) -> None:
    with pytest.raises(ValueError) as refused:
        config(tmp_path, algorithm="rloo", loss_type="bnpo")
    for part in ("'rloo'", "loss_type='dr_grpo'", "'bnpo'", "remove loss_type"):
        assert part in str(refused.value)
    assert config(tmp_path, algorithm="rloo", loss_type="dr_grpo").loss_type == "dr_grpo"


def test_an_unknown_algorithm_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="unknown algorithm 'ppg'.*'grpo'.*leave `algorithm`"):
        config(tmp_path, algorithm="ppg")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_turns", 0),
        ("max_turns", 2.5),
        ("max_turn_tokens", 0),
        ("max_episode_seconds", 0),
        ("max_slots", 0),
        ("turn_discount", 0.0),
        ("turn_discount", 1.1),
        ("max_fault_share", -0.1),
        ("max_fault_share", 1.1),
        ("trajectory_steps", -1),
    ],
)
def test_a_value_out_of_its_range_is_refused(tmp_path: Path, name: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"{name} must be .*, got {value}"):
        config(tmp_path, **{name: value})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"top_p": 0.9}, "top_p=0.9"),
        ({"top_k": 50}, "top_k=50"),
        ({"min_p": 0.1}, "min_p=0.1"),
        ({"repetition_penalty": 1.1}, "repetition_penalty=1.1"),
        ({"generation_kwargs": {"num_beams": 2}}, "num_beams"),
        (
            {"use_vllm": True, "vllm_structured_outputs_regex": "a"},
            "vllm_structured_outputs_regex, got 'a'",
        ),
        ({"use_vllm": True, "vllm_tensor_parallel_size": 2}, "vllm_tensor_parallel_size, got 2"),
        ({"use_vllm": True, "vllm_mode": "colocate"}, "vLLM is not installed here"),
        (
            {"use_vllm": True, "vllm_mode": "server", "vllm_server_base_url": "localhost:8000"},
            r"got \['localhost:8000'\]",
        ),
        ({"use_vllm": True, "vllm_model_impl": "transformers"}, "vllm_model_impl, got"),
        ({"use_vllm": True, "vllm_enable_sleep_mode": True}, "vllm_enable_sleep_mode, got True"),
        ({"use_transformers_continuous_batching": True}, "agentr1's own engines"),
        ({"max_completion_length": None}, "max_completion_length is unset"),
        ({"fsdp": "full_shard"}, "fsdp=True"),
        ({"ds3_gather_for_generation": False}, "ds3_gather_for_generation=False"),
    ],
)
def test_what_an_environment_cannot_have_is_refused(
    tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    found = config(tmp_path)
    for name, value in settings.items():  # past the checks of TRL's own
        setattr(found, name, value)
    with pytest.raises(ValueError, match=said):
        found.check_for_environment()


def test_fsdp_of_the_launcher_is_refused_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError) as refused:
        config(tmp_path).check_for_environment()
    for part in ("fsdp=True", "different numbers of turns", "use DDP or DeepSpeed ZeRO"):
        assert part in str(refused.value)


def test_a_group_must_not_span_processes(tmp_path: Path) -> None:
    found = config(tmp_path)
    found.check_for_environment()
    found.num_generations = 8  # as on two processes of four rollouts each
    with pytest.raises(ValueError) as refused:
        found.check_for_environment()
    for part in ("group of 8", "4 x 1 = 4", "multiple of num_generations"):
        assert part in str(refused.value)


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "bnpo", "dr_grpo", "cispo", "sapo"])
def test_losses_that_read_one_advantage_per_token_take_process_rewards(
    tmp_path: Path, loss_type: str
) -> None:
    config(tmp_path, loss_type=loss_type).check_for_turn_advantages()


@pytest.mark.parametrize(
    "settings",
    [{"loss_type": "vespo"}, {"loss_type": "luspo"}, {"off_policy_mask_threshold": 0.1}],
)
def test_losses_that_read_one_advantage_per_sequence_refuse_process_rewards(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    with pytest.raises(ValueError, match="use grpo, dapo, bnpo"):
        config(tmp_path, **settings).check_for_turn_advantages()


def test_process_reward_weights_must_fit() -> None:
    with pytest.raises(ValueError, match="one weight per process reward"):
        RecipeArguments(process_rewards=["a.b"], process_reward_weights=[1.0, 2.0])
    RecipeArguments(process_rewards=["a.b"], process_reward_weights=[1.0])


@pytest.mark.parametrize("name", ["tools", "rewards", "process_rewards", "metrics"])
def test_a_list_written_as_one_text_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} must be a list.*write {name}: \[a\.b\]"):
        RecipeArguments(**{name: "a.b"})


@pytest.mark.parametrize("name", ["rewards", "metrics"])
def test_something_must_be_measured(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must name at least one function"):
        RecipeArguments(**{name: []})


@pytest.mark.parametrize(
    ("settings", "urls"),
    [
        ({}, ["http://0.0.0.0:8000"]),
        ({"vllm_server_host": "node1", "vllm_server_port": 9}, ["http://node1:9"]),
        ({"vllm_server_base_url": "http://a:1/, http://b:2"}, ["http://a:1", "http://b:2"]),
    ],
)
def test_servers_are_named_by_trls_fields(
    tmp_path: Path, settings: dict[str, Any], urls: list[str]
) -> None:
    assert config(tmp_path, use_vllm=True, vllm_mode="server", **settings).vllm_urls == urls


def test_vespo_needs_a_ratio_per_token(tmp_path: Path) -> None:
    made = config(tmp_path, use_vllm=True, vllm_mode="server", loss_type="vespo")
    made.sampling_correction = "sequence_mask"
    with pytest.raises(ValueError, match="got 'sequence_mask'"):
        made.check_for_environment()
    made.sampling_correction = "auto"
    made.check_for_environment()


@pytest.mark.parametrize(
    ("settings", "mode"),
    [
        ({}, None),
        ({"use_vllm": True, "vllm_mode": "server"}, "token_truncate"),
        ({"bf16": True}, "token_truncate"),
        ({"bf16": True, "sampling_correction": "off"}, None),
        ({"bf16": True, "vllm_importance_sampling_correction": False}, None),
        ({"sampling_correction": "sequence_truncate"}, "sequence_truncate"),
    ],
)
def test_sampling_is_corrected_wherever_engine_and_trainer_can_differ(
    tmp_path: Path, settings: dict[str, Any], mode: str | None
) -> None:
    assert config(tmp_path, **settings).sampling_mode == mode


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"vllm_importance_sampling_mode": "token_mask"}, "sampling_correction: token_mask"),
        ({"loss_mask": "all", "sampling_correction": "token_mask"}, "'off'"),
        ({"algorithm": "remax", "spare_rollouts": 2}, "greedy episode"),
    ],
)
def test_settings_of_credit_that_clash_name_the_way_out(
    tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        config(tmp_path, **settings).check_for_environment()


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"loss_mask": "some"}, "loss_mask must be one of"),
        ({"gae_lambda": 1.5}, "gae_lambda must be in"),
        ({"collapse_guard": "pray"}, "collapse_guard must be one of"),
        ({"algorithm": "grpo", "reward_kl": 0.1}, "reward_kl=0.1 is a setting of a critic"),
        ({"critic": "shared"}, "critic='shared' is a setting of a critic"),
        ({"algorithm": "grpo", "num_generations": 1}, "compares the rollouts of a prompt"),
        ({"algorithm": "gspo", "loss_type": "bnpo"}, "fixes loss_type"),
        ({"algorithm": "grpo", "anchor_weight": 0.5}, "a setting of gigpo"),
        ({"process_scale": "prime", "process_credit": "trajectory"}, "remove one of the two"),
        (
            {"algorithm": "reinforce++", "num_generations": 1, "refill_rounds": 2},
            "a group of one always is",
        ),
        ({"algorithm": "ppo", "critic_warmup_steps": 5, "weight_decay": 0.1}, "would shrink it"),
    ],
)
def test_settings_of_credit_out_of_range_are_refused(
    tmp_path: Path, settings: dict[str, Any], said: str
) -> None:
    with pytest.raises(ValueError, match=said):
        config(tmp_path, **settings)


def test_an_algorithms_proposals_give_way_to_the_recipe(tmp_path: Path) -> None:
    assert config(tmp_path, algorithm="dapo").epsilon_high == 0.28
    assert config(tmp_path, algorithm="dapo", epsilon_high=0.24).epsilon_high == 0.24
    assert config(tmp_path, algorithm="dapo").refill_rounds == 3
    plain = config(tmp_path, algorithm="dapo", refill_rounds=0, overlong_share=0.0)
    assert (plain.refill_rounds, plain.overlong_share) == (0, 0.0)
    assert (config(tmp_path).refill_rounds, config(tmp_path).overlong_share) == (0, 0.0)


def test_one_rollout_a_prompt_is_allowed_where_no_group_is_compared(tmp_path: Path) -> None:
    made = config(tmp_path, algorithm="reinforce++", num_generations=1)
    assert made.num_generations == 1
    made.check_for_environment()
    for size, steps in [(1, 2), (1, 3), (3, 1), (5, 3)]:
        sizes = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps}
        odd = config(tmp_path, algorithm="reinforce++", num_generations=1, **sizes)
        assert odd.generation_batch_size == size * steps
    with pytest.raises(ValueError, match="at least 2 generations"):
        config(tmp_path, num_generations=1)


def test_a_train_set_smaller_than_one_batch_of_rollouts_is_refused(tmp_path: Path) -> None:
    settings = {"per_device_train_batch_size": 8, "num_generations": 2, "steps_per_generation": 3}
    found = config(tmp_path, **settings)
    found.check_rows(12)
    with pytest.raises(ValueError, match=r"11 rows, .* takes 12 .*24 / num_generations 2.*lower"):
        found.check_rows(11)
