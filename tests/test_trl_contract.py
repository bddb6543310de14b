"""What agentr1 rests on in TRL and transformers, one test per fact: a version bump fails here.

The list is the one in `AgentTrainer`'s docstring, and then what the other modules use.
"""

from __future__ import annotations

import dataclasses
import inspect
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import trl
from accelerate import Accelerator
from datasets import Dataset
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from trl import GRPOConfig, GRPOTrainer, ModelConfig, SFTConfig, SFTTrainer, TrlParser
from trl.chat_template_utils import get_training_chat_template, qwen2_5_chat_template
from trl.models import unwrap_model_for_generation
from trl.trainer.utils import split_tensor_dict

from agentr1.checkpoints import WholeCheckpoints, surplus
from agentr1.config import TRLS_SAMPLING_MODE
from agentr1.rollout_trainer import RolloutTrainer
from agentr1.row_weights import RowWeights
from agentr1.step_ratio import StepRatio
from agentr1.trainer import AgentTrainer
from agentr1.update import FrugalUpdate
from trainers import SETTINGS, inputs, make_trainer, silent_reward, unequal_reward

PROMPT_IDS = [5, 6, 7]
# Two sampled tokens, one of the environment's, two sampled ones: the second row is shorter.
ROLLOUTS = [([10, 11, 12, 13, 2], [1, 1, 0, 1, 1]), ([20, 2], [1, 1])]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trl")


@pytest.fixture
def build(
    folder: Path, make_model: Callable[..., Any], tokenizer: Any
) -> Callable[..., GRPOTrainer]:
    def build(**changes: Any) -> GRPOTrainer:
        given = {"trainer": GRPOTrainer, "config": GRPOConfig, "rollout_func": play} | changes
        trainer = make_trainer(folder, make_model(), tokenizer, **given)
        trainer.model.train()
        trainer.current_gradient_accumulation_steps = 1  # set by the training loop
        return trainer

    return build


def play(prompts: list[Any], trainer: Any) -> dict[str, Any]:
    chosen = [ROLLOUTS[i % 2] for i in range(len(prompts))]
    return {
        "prompt_ids": [PROMPT_IDS] * len(prompts),
        "completion_ids": [ids for ids, _ in chosen],
        "logprobs": [[-1.0] * len(ids) for ids, _ in chosen],
        "env_mask": [mask for _, mask in chosen],
    }


def score(trainer: GRPOTrainer) -> dict[str, Any]:
    return trainer._generate_and_score_completions(inputs(trainer))


# Signatures ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("_generate_and_score_completions", ["inputs"]),
        ("_calculate_rewards", ["inputs", "prompts", "completions", "completion_ids_list"]),
        ("_compute_loss", ["model", "inputs"]),
        ("_prepare_inputs", ["generation_batch"]),
        ("_save_checkpoint", ["model", "trial"]),
        ("_get_output_dir", ["trial"]),
        ("_log_metric", ["name", "value"]),
        ("evaluate", ["eval_dataset", "ignore_keys", "metric_key_prefix"]),
        ("log", ["logs", "start_time"]),
        ("save_model", ["output_dir", "_internal_call"]),
    ],
)
def test_the_methods_we_override_or_call_have_these_parameters(
    method: str, parameters: list[str]
) -> None:
    found = inspect.signature(getattr(GRPOTrainer, method)).parameters
    assert list(found)[1:] == parameters


def test_a_run_ends_as_accelerate_ends_it() -> None:
    assert list(inspect.signature(Accelerator.end_training).parameters) == ["self"]


def test_the_arguments_of_grpo_trainer_are_these() -> None:
    assert list(inspect.signature(GRPOTrainer.__init__).parameters)[1:] == [
        *("model", "reward_funcs", "args", "train_dataset", "eval_dataset", "processing_class"),
        *("reward_processing_classes", "callbacks", "optimizers", "quantization_config"),
        *("peft_config", "tools", "rollout_func", "environment_factory"),
    ]


def test_agent_trainer_overrides_what_its_docstring_lists_and_nothing_else() -> None:
    ours = (AgentTrainer, RolloutTrainer, RowWeights, StepRatio, WholeCheckpoints, FrugalUpdate)
    own = {name for part in ours for name in vars(part) if hasattr(GRPOTrainer, name)}
    own = {name for name in own if not name.startswith("__")} | {"end"}  # 5.17 has none yet
    assert own == {
        *("_generate_and_score_completions", "_calculate_rewards", "_prepare_inputs"),
        *("_compute_loss", "_get_per_token_logps_and_entropies", "evaluate", "end"),
        *("_save_checkpoint", "_get_output_dir", "_get_train_sampler"),
    }
    said = " ".join(str(part.__doc__) for part in ours)
    assert all(name in said for name in own)


def test_the_attributes_we_read_and_write_exist(build: Callable[..., Any]) -> None:
    trainer = build()
    for name in (
        "rollout_func",
        "reward_funcs",
        "reward_func_names",
        "reward_processing_classes",
        "use_vllm",
        "vllm_importance_sampling_correction",
        "vllm_importance_sampling_mode",
        "loss_type",
        "max_completion_length",
        "train_dataset",
        "_logs",
        "mask_truncated_completions",
        "temperature",
        "num_generations",
        "reward_weights",
        "eos_token_ids",
        "model_wrapped",
        "processing_class",
        "eval_dataset",
    ):
        assert hasattr(trainer, name), name


def test_the_config_fields_we_check_exist() -> None:
    names = {field.name for field in dataclasses.fields(GRPOConfig)}
    sampling = {"top_p", "top_k", "min_p", "repetition_penalty", "generation_kwargs", "temperature"}
    engines = {"use_vllm", "use_transformers_continuous_batching"}
    credit = {"loss_type", "off_policy_mask_threshold", "reward_weights", "num_generations"}
    batch = {"per_device_train_batch_size", "steps_per_generation", "generation_batch_size"}
    ours = {"max_completion_length", "model_init_kwargs", "ds3_gather_for_generation", "fsdp"}
    assert names >= sampling | engines | credit | batch | ours


def test_unwrap_model_for_generation_takes_model_accelerator_and_the_zero3_switch() -> None:
    parameters = list(inspect.signature(unwrap_model_for_generation).parameters)
    assert parameters[:3] == ["model", "accelerator", "gather_deepspeed3_params"]
    assert "gradient_checkpointing_kwargs" in parameters


# The rollout function --------------------------------------------------------------------------


def test_prompts_hold_the_num_generations_duplicates_in_the_order_of_inputs(
    build: Callable[..., Any],
) -> None:
    seen = {}

    def record(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        seen.update(prompts=prompts, trainer=trainer)
        return play(prompts, trainer)

    trainer = build(rollout_func=record)
    rows = inputs(trainer)
    trainer._generate_and_score_completions(rows)
    assert len(seen["prompts"]) == 4
    assert seen["prompts"] == [row["prompt"] for row in rows]
    assert seen["trainer"] is trainer


def test_the_sampler_hands_over_whole_groups_side_by_side(build: Callable[..., Any]) -> None:
    trainer = build(settings={"per_device_train_batch_size": 2, "steps_per_generation": 2})
    batch = next(iter(trainer.get_train_dataloader()))
    names = [row["id"] for row in batch]
    assert len(names) == 4
    assert names[0] == names[1] != names[2] == names[3]


@pytest.mark.parametrize("key", ["prompt_ids", "completion_ids", "logprobs"])
def test_a_missing_key_is_refused(build: Callable[..., Any], key: str) -> None:
    def partial(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        return {k: v for k, v in play(prompts, trainer).items() if k != key}

    with pytest.raises(ValueError, match=key):
        score(build(rollout_func=partial))


def test_env_mask_becomes_tool_mask_where_1_is_trained(build: Callable[..., Any]) -> None:
    batch = score(build())
    assert batch["tool_mask"][0].tolist() == [1, 1, 0, 1, 1]
    # Padding of the mask is 1: only the completion's own mask keeps it out of the loss.
    assert batch["tool_mask"][1].tolist() == [1, 1, 1, 1, 1]
    assert batch["completion_mask"][1].tolist() == [1, 1, 0, 0, 0]
    assert batch["num_items_in_batch"] == 2 * (4 + 2)


def test_ids_come_back_padded_prompts_left_completions_right(build: Callable[..., Any]) -> None:
    batch = score(build())
    assert batch["prompt_ids"].tolist() == [PROMPT_IDS] * 4
    assert batch["completion_ids"][0].tolist() == ROLLOUTS[0][0]
    assert batch["completion_ids"][1].tolist() == [20, 2, 0, 0, 0]
    assert batch["sampling_per_token_logps"][1].tolist() == [-1.0, -1.0, 0.0, 0.0, 0.0]


def test_extra_fields_and_columns_reach_rewards_row_by_row(build: Callable[..., Any]) -> None:
    seen: dict[str, Any] = {}

    def extra(prompts: list[Any], trainer: Any) -> dict[str, Any]:
        return play(prompts, trainer) | {"trajectories": [f"t{i}" for i in range(len(prompts))]}

    def reward(**given: Any) -> list[float]:
        seen.update(given)
        return [0.0] * len(given["prompts"])

    score(build(rollout_func=extra, rewards=reward))
    assert seen["trajectories"] == ["t0", "t1", "t2", "t3"]
    assert seen["id"] == ["r0", "r0", "r1", "r1"]
    assert {"prompts", "completions", "completion_ids", "trainer_state"} < seen.keys()
    assert {"log_extra", "log_metric"} < seen.keys()
    assert "env_mask" not in seen


def test_rows_are_written_to_after_the_rollout(build: Callable[..., Any]) -> None:
    """Why `AgentTrainer` keeps copies of its rows."""
    trainer = build(rollout_func=lambda p, t: play(p, t) | {"extra": list(range(len(p)))})
    rows = inputs(trainer)
    trainer._generate_and_score_completions(rows)
    assert [row["extra"] for row in rows] == [0, 1, 2, 3]


def test_rewards_are_a_gathered_table_and_none_is_nan(build: Callable[..., Any]) -> None:
    def some(prompts: list[Any], **_: Any) -> list[float | None]:
        return [1.0, None, 2.0, 3.0]

    trainer = build(rewards=[some, silent_reward])
    rows = inputs(trainer)
    prompts = [row["prompt"] for row in rows]
    table = trainer._calculate_rewards(rows, prompts, [[]] * 4, [[2]] * 4)
    assert table.shape == (4, 2)
    assert table[:, 0].nan_to_num(nan=-1.0).tolist() == [1.0, -1.0, 2.0, 3.0]


def test_logged_metrics_are_averaged_when_rewards_are_done(build: Callable[..., Any]) -> None:
    def reward(prompts: list[Any], log_metric: Any, **_: Any) -> list[float]:
        log_metric("mine", 1.0)
        log_metric("mine", 3.0)
        return [0.0] * len(prompts)

    trainer = build(rewards=reward)
    score(trainer)
    assert trainer._metrics["train"]["mine"] == [2.0]


def test_log_takes_along_the_numbers_of_the_models_mode(build: Callable[..., Any]) -> None:
    """Why `AgentTrainer.evaluate` logs in eval mode."""
    trainer = build()
    trainer._metrics["train"]["reward"].append(1.0)
    trainer.model.eval()
    trainer.log({"eval_x": 1.0})
    assert "reward" not in trainer.state.log_history[-1]
    trainer.model.train()
    trainer.log({"eval_x": 1.0})
    assert trainer.state.log_history[-1]["reward"] == 1.0


# Advantages ------------------------------------------------------------------------------------


@pytest.mark.parametrize("loss_type", ["grpo", "dapo", "bnpo", "dr_grpo", "cispo", "sapo"])
def test_advantages_per_token_are_accepted_and_a_constant_one_changes_nothing(
    build: Callable[..., Any], loss_type: str
) -> None:
    trainer = build(settings={"loss_type": loss_type})
    batch = score(trainer)
    flat = batch["advantages"]
    assert flat.shape == (4,)
    assert flat.any()
    per_token = batch | {"advantages": flat.unsqueeze(1).expand(batch["completion_ids"].shape)}
    losses, gradients = [], []
    for given in (batch, per_token):
        trainer.model.zero_grad()
        loss = trainer._compute_loss(trainer.model, given)
        loss.backward()
        losses.append(loss.detach())
        gradients.append([p.grad.clone() for p in trainer.model.parameters()])
    assert torch.equal(*losses)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_an_advantage_counts_at_its_own_token_only(build: Callable[..., Any]) -> None:
    trainer = build(settings={"loss_type": "dr_grpo"})
    batch = score(trainer)
    one = torch.zeros(batch["completion_ids"].shape)
    one[0, 1] = 1.0
    loss = trainer._compute_loss(trainer.model, batch | {"advantages": one})
    size = 4 * trainer.max_completion_length  # the constant normaliser of dr_grpo
    assert loss.item() == pytest.approx(-1.0 / size)
    one[0, 2] = 5.0  # masked
    assert torch.equal(trainer._compute_loss(trainer.model, batch | {"advantages": one}), loss)


def test_mask_truncated_completions_looks_at_the_last_id_only(build: Callable[..., Any]) -> None:
    """Why `AgentTrainer` decides it from the stop reason instead."""
    trainer = build(settings={"mask_truncated_completions": True})
    assert trainer.mask_truncated_completions is True
    trainer.rollout_func = lambda p, t: {
        "prompt_ids": [PROMPT_IDS] * 4,
        "completion_ids": [[10, 2], [20, 11]] * 2,
        "logprobs": [[-1.0] * 2] * 4,
    }
    assert score(trainer)["completion_mask"].tolist() == [[1, 1], [0, 0]] * 2


# Checkpoints -----------------------------------------------------------------------------------


def test_a_checkpoint_is_written_where_get_output_dir_says(
    build: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = build()
    trainer.create_optimizer_and_scheduler(1)
    monkeypatch.setattr(trainer, "_get_output_dir", lambda trial: str(tmp_path / "aside"))
    trainer._save_checkpoint(trainer.model, None)
    saved = tmp_path / "aside" / f"{PREFIX_CHECKPOINT_DIR}-0"
    assert (saved / "model.safetensors").exists()
    assert (saved / "trainer_state.json").exists()


@pytest.mark.parametrize("limit", [None, 0, 1, 2, 3, 9])
@pytest.mark.parametrize("best", [None, 1, 2, 4])
def test_what_we_delete_is_what_rotate_checkpoints_would(
    tmp_path: Path, limit: int | None, best: int | None
) -> None:
    for step in (1, 2, 3, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
        os.utime(tmp_path / f"checkpoint-{step}", (step, step))
    kept = str(tmp_path / f"checkpoint-{best}") if best else None
    ours = surplus(tmp_path, limit, kept)
    before = set(tmp_path.iterdir())
    rotate_checkpoints(str(tmp_path), limit, kept, use_mtime=True)
    assert set(ours) == before - set(tmp_path.iterdir())


# Other modules ---------------------------------------------------------------------------------


def test_sft_trainer_takes_ready_made_labels_as_they_are(
    tmp_path: Path, make_model: Callable[..., Any], tokenizer: Any
) -> None:
    rows = [
        {"input_ids": [5, 6, 7, 8], "labels": [-100, -100, 7, 8]},
        {"input_ids": [5, 9], "labels": [-100, 9]},
    ]
    settings = {k: SETTINGS[k] for k in ("use_cpu", "bf16", "report_to", "disable_tqdm")}
    args = SFTConfig(
        output_dir=str(tmp_path), dataset_kwargs={"skip_prepare_dataset": True}, **settings
    )
    trainer = SFTTrainer(
        model=make_model(),
        args=args,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    found = sorted(batch["labels"].tolist())
    assert found == [[-100, -100, 7, 8], [-100, 9, -100, -100]]
    assert sorted(batch["input_ids"].tolist()) == [[5, 6, 7, 8], [5, 9, 0, 0]]


def test_trl_parser_refuses_unknown_keys(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("no_such_key: 1\n")
    with pytest.raises(ValueError, match="no_such_key"):
        TrlParser((ModelConfig,)).parse_args_and_config(["--config", str(recipe)])


def test_trl_parser_converts_and_lets_the_command_line_win(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("lora_dropout: '1e-1'\nlora_r: 8\n")
    parser = TrlParser((ModelConfig,))
    (model,) = parser.parse_args_and_config(["--config", str(recipe), "--lora_r", "4"])
    assert (model.lora_dropout, model.lora_r) == (0.1, 4)


def test_env_is_a_reserved_key_of_a_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Why recipes must be flat, and why the field is called `environment`."""
    monkeypatch.delenv("AGENTR1_TEST", raising=False)
    recipe = tmp_path / "r.yaml"
    recipe.write_text("env: {AGENTR1_TEST: '1'}\n")
    TrlParser((ModelConfig,)).parse_args_and_config(["--config", str(recipe)])
    assert os.environ.pop("AGENTR1_TEST") == "1"


def test_the_chat_templates_we_borrow_have_these_names(tokenizer: Any) -> None:
    assert tokenizer.chat_template == qwen2_5_chat_template
    assert get_training_chat_template(tokenizer)  # recognised by its exact text


def test_the_default_output_folder_is_the_one_we_replace(monkeypatch: pytest.MonkeyPatch) -> None:
    from agentr1.launch import DEFAULT_OUTPUT

    assert GRPOConfig(use_cpu=True, bf16=False).output_dir == DEFAULT_OUTPUT


def test_the_versions_are_the_ones_these_tests_were_written_for() -> None:
    assert re.match(r"1\.16\.", trl.__version__)
    assert int(transformers.__version__.split(".")[0]) == 5


def more_rows(prompts: list[Any], trainer: Any) -> dict[str, Any]:
    """A rollout that makes six training rows of four prompts."""
    found = play([*prompts, *prompts[:2]], trainer)
    return found | {"whose": [str(i) for i in range(len(prompts))]}


def test_more_rows_than_prompts_are_scored_and_trained_and_rewards_see_the_prompts(
    build: Callable[..., Any],
) -> None:
    seen: dict[str, Any] = {}

    def reward(prompts: Any, completions: Any, whose: Any, **_: object) -> list[float]:
        seen.update(prompts=len(prompts), completions=len(completions), whose=whose)
        return [float(i % 3) for i in range(len(prompts))]

    trainer = build(rollout_func=more_rows, rewards=reward, settings={"num_iterations": 2})
    batch = score(trainer)
    assert seen == {"prompts": 4, "completions": 6, "whose": ["0", "1", "2", "3"]}
    assert batch["advantages"].shape == (4,)
    for name in ("prompt_ids", "completion_ids", "tool_mask", "old_per_token_logps"):
        assert len(batch[name]) == 6, name
    assert batch["num_items_in_batch"] == 3 * (4 + 2)
    batch["advantages"] = torch.ones(6, batch["completion_ids"].shape[1])
    assert trainer._compute_loss(trainer.model, batch).isfinite()


def test_rows_that_do_not_divide_evenly_are_dropped_without_a_word() -> None:
    batch = {"rows": torch.arange(11), "count": torch.tensor(11)}
    parts = split_tensor_dict(batch, 2)
    assert [len(part["rows"]) for part in parts] == [5, 5]
    assert [part["count"].item() for part in parts] == [11, 11]  # scalars are for all


def test_dapo_sums_mask_times_loss_over_the_number_of_items(build: Callable[..., Any]) -> None:
    trainer = build(settings={"loss_type": "dapo"})
    batch = score(trainer)
    plain = trainer._compute_loss(trainer.model, batch)
    weighed = trainer._compute_loss(
        trainer.model,
        batch | {"tool_mask": 2.5 * batch["tool_mask"], "num_items_in_batch": torch.tensor(5.0)},
    )
    torch.testing.assert_close(weighed, plain * batch["num_items_in_batch"] * 2.5 / 5)


def test_old_log_probabilities_are_read_after_the_new_ones_are_known(
    build: Callable[..., Any],
) -> None:
    trainer = build(settings={"loss_type": "dapo", "num_iterations": 2})
    batch = score(trainer)
    passed = trainer._get_per_token_logps_and_entropies

    def move_old(*args: Any, **kwargs: Any) -> Any:
        found = passed(*args, **kwargs)
        batch["old_per_token_logps"] = found[0].detach() - 1.0
        return found

    plain = trainer._compute_loss(trainer.model, batch)
    trainer._get_per_token_logps_and_entropies = move_old
    assert not torch.isclose(plain, trainer._compute_loss(trainer.model, batch))


def test_trl_corrects_for_any_engine_once_it_is_told_to(build: Callable[..., Any]) -> None:
    trainer = build()
    assert "importance_sampling_ratio" not in score(trainer)
    trainer.use_vllm = trainer.vllm_importance_sampling_correction = True
    trainer.vllm_importance_sampling_mode = "token_truncate"
    trainer._last_loaded_step = trainer.state.global_step  # or it would load weights
    batch = score(trainer)
    assert batch["importance_sampling_ratio"].shape == batch["completion_ids"].shape
    assert GRPOConfig.vllm_importance_sampling_mode == TRLS_SAMPLING_MODE


def test_one_generation_a_prompt_is_refused_by_the_config_and_trained_by_the_trainer(
    build: Callable[..., Any],
) -> None:
    with pytest.raises(ValueError, match="at least 2 generations"):
        build(settings={"num_generations": 1})
    trainer = build()
    trainer.num_generations = 1
    assert not score(trainer)["advantages"].any()  # alone in its group
    sampler = trainer._get_train_sampler()
    assert len(set(list(sampler)[:4])) == 4


def test_unequal_rewards_make_trls_own_advantages(build: Callable[..., Any]) -> None:
    batch = score(build(rewards=unequal_reward, settings={"scale_rewards": "none"}))
    assert batch["advantages"].tolist() == [-0.5, 0.5, 1.0, -1.0]
