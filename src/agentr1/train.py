"""`agentr1 train`: a recipe, from its YAML to a tested policy. Read it top to bottom.

Run by the console script, or as `accelerate launch ... -m agentr1.train RECIPE`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from accelerate import PartialState
from transformers import (
    PreTrainedTokenizerBase,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint
from trl import get_peft_config, get_quantization_config

from agentr1.actor_critic import ActorCriticTrainer
from agentr1.algorithms import ALGORITHMS
from agentr1.codec import Codec
from agentr1.commandline import guarded, recipe_parser, split_arguments
from agentr1.compare import compare
from agentr1.context import with_context
from agentr1.data import to_dataset
from agentr1.hub import model_card, push_run
from agentr1.interrupts import Interrupts
from agentr1.launch import (
    assert_world,
    launch_overrides,
    prepare_process,
    refuse_several_gpus,
    run_folder,
)
from agentr1.models import load_tokenizer, model_init_kwargs, resolve_model
from agentr1.progress import MetricsFile, ProgressBar, use_our_progress
from agentr1.recipe import Recipe, load_recipe, metric_name, search_roots
from agentr1.runs import (
    drop_metrics_after,
    drop_results,
    write_header,
    write_json,
    write_scores,
    write_text,
)
from agentr1.scoring import summary
from agentr1.task import Task, build_task
from agentr1.trainer import AgentTrainer


def train(
    name: str, overrides: Sequence[str] = (), dry_run: bool = False, resume: bool = False
) -> Path | None:
    """Train a recipe's policy and test it before and after.

    Args:
        name: recipe, see `recipe.find_recipe`.
        overrides: command-line options that overrule the recipe's keys.
        dry_run: resolve everything, load no weights, make no folder.
        resume: continue the newest run of this recipe from its newest complete checkpoint.

    Returns:
        The run's folder, None for a dry run.

    Raises:
        ValueError, FileNotFoundError: a mistake in the recipe or the command.
        KeyboardInterrupt: stopped by a signal; it says what is kept and how to go on.
    """
    start = time.monotonic()
    prepare_process()
    recipe = load_recipe(name, [*launch_overrides(), *overrides])
    task, model, tokenizer, codec = resolve(recipe)
    if dry_run:
        print(_description(recipe, task, codec))
        return None
    folder = run_folder(recipe, resume)
    checkpoint = _last_checkpoint(folder, recipe.training.max_steps) if resume else None
    if PartialState().is_main_process:
        _prepare_folder(folder, recipe, checkpoint, ["agentr1", "train", name, *overrides])
    push = recipe.training.push_to_hub
    recipe.training.push_to_hub = False  # the whole run is pushed, once, at the end
    trainer = _make_trainer(recipe, task, model, tokenizer, folder)
    assert_world(trainer.accelerator)
    if checkpoint is None or not (folder / "evaluation" / "before.json").exists():
        _test(trainer, task, folder, "before")
    _fit(trainer, folder, checkpoint)
    _test(trainer, task, folder, "after")
    if trainer.accelerator.is_main_process:
        _finish(recipe, task.tested, folder, time.monotonic() - start, push)
        if checkpoint is not None:
            print(f"the seconds count from {checkpoint} on")
    trainer.accelerator.wait_for_everyone()
    trainer.end()
    return folder


class Resolved(NamedTuple):
    """What the names of a recipe stand for; no weights."""

    task: Task
    model: str
    tokenizer: PreTrainedTokenizerBase
    codec: Codec


def resolve(recipe: Recipe) -> Resolved:
    """Find everything a recipe names, and try its environment on a row.

    Raises:
        ValueError, FileNotFoundError: a mistake in the recipe, with the way out.
    """
    refuse_several_gpus(recipe.training)
    recipe.training.check_for_environment()
    if recipe.training.resume_from_checkpoint:
        raise ValueError(
            "resume_from_checkpoint is not used here, got "
            f"{recipe.training.resume_from_checkpoint!r}; write --resume, and --output_dir for a "
            "run other than the recipe's newest"
        )
    task = build_task(recipe.arguments)
    recipe.training.check_rows(len(task.train))
    _refuse_to_test_what_chose(recipe, task)
    source = resolve_model(recipe.model.model_name_or_path, search_roots())
    tokenizer = load_tokenizer(source, search_roots())
    codec = Codec(tokenizer, task.env_factory().tool_schemas, source.path_or_id)
    return Resolved(with_context(task, recipe, codec), source.path_or_id, tokenizer, codec)


def _refuse_to_test_what_chose(recipe: Recipe, task: Task) -> None:
    if recipe.training.load_best_model_at_end and task.tested == "dev":
        raise ValueError(
            f"load_best_model_at_end chooses a checkpoint by the dev rows of "
            f"{recipe.arguments.dataset}, which has no test rows, so that the final test would be "
            "of the very rows it was chosen by; put a test.jsonl there, or set "
            "load_best_model_at_end: false"
        )


def _make_trainer(
    recipe: Recipe, task: Task, model: str, tokenizer: PreTrainedTokenizerBase, folder: Path
) -> AgentTrainer:
    config = recipe.training
    config.output_dir = str(folder)
    config.model_init_kwargs = model_init_kwargs(recipe.model) | (config.model_init_kwargs or {})
    critic = config.algorithm is not None and ALGORITHMS[config.algorithm].needs_critic
    trainer = (ActorCriticTrainer if critic else AgentTrainer)(
        model=model,
        reward_funcs=task.rewards,
        args=config,
        train_dataset=to_dataset(task.train),
        eval_dataset=to_dataset(task.dev) if config.eval_strategy != "no" else None,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(recipe.model),
        peft_config=get_peft_config(recipe.model),
        env_factory=task.env_factory,
        metrics=task.metrics,
    )
    use_our_progress(trainer, [ProgressBar(), MetricsFile(folder)])
    return trainer


def _last_checkpoint(folder: Path, max_steps: int) -> str:
    found = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if found is None:
        raise FileNotFoundError(
            f"--resume found no checkpoint in {folder}; start without --resume, or name the folder "
            "of a run that has one"
        )
    at_the_end = 0 < max_steps <= int(found.rpartition("-")[2])
    if at_the_end and (folder / "eval.json").exists():
        raise ValueError(
            f"--resume: {found} is at the end already, max_steps is {max_steps}, and was tested; "
            "raise max_steps to train on, or evaluate the run with `agentr1 eval RECIPE --model "
            f"{folder}`"
        )
    return found


def _prepare_folder(
    folder: Path, recipe: Recipe, checkpoint: str | None, command: Sequence[str]
) -> None:
    drop_metrics_after(folder, int(checkpoint.rpartition("-")[2]) if checkpoint else -1)
    drop_results(folder)
    if checkpoint is not None:
        print(f"going on from {checkpoint}")
    if checkpoint is None:
        write_header(folder, recipe.text, command)


class _NoStepLeft(Exception):
    """A resumed run has done all its steps: only its test is missing."""


class _StopAtTheEnd(TrainerCallback):
    """Leaves the Trainer's loop once the weights are there: it would do a step too many."""

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """The same on every process."""
        if state.global_step >= state.max_steps:
            raise _NoStepLeft


def _fit(trainer: AgentTrainer, folder: Path, checkpoint: str | None) -> None:
    """Train and keep the policy; a signal stops between two steps, see `Interrupts`."""
    handler = trainer.callback_handler
    with Interrupts() as interrupts:
        trainer.add_callback(interrupts)
        trainer.add_callback(_StopAtTheEnd())
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        except KeyboardInterrupt:
            if interrupts.stopping:  # on every process: the bar, trackers and processes end
                handler.on_train_end(trainer.args, trainer.state, trainer.control)
                trainer.end()
            raise
        except _NoStepLeft:
            handler.on_train_end(trainer.args, trainer.state, trainer.control)
            if trainer.args.load_best_model_at_end and trainer.state.best_model_checkpoint:
                trainer._load_best_model()
        trainer.save_model(str(folder / "final"))
    if interrupts.stopping:
        trainer.end()
        way = "the same command with --resume"
        if not (folder / f"checkpoint-{trainer.state.global_step}").is_dir():
            way = f"`agentr1 eval RECIPE --model {folder}`"
        raise KeyboardInterrupt(
            f"stopped at the end of the training, before the final test; the policy is in "
            f"{folder / 'final'}, and {way} tests it"
        )


def _test(trainer: AgentTrainer, task: Task, folder: Path, name: str) -> None:
    """Greedy test of the current policy, kept in `evaluation/`."""
    path = folder / "evaluation" / f"{name}.jsonl"
    trainer.accelerator.print(
        f"testing the policy {name} training on {len(task.test)} {task.tested} rows"
    )
    try:
        scored = trainer.play_greedily(task.test)
    except RuntimeError as error:
        if name == "before":
            raise
        kept = f"the policy is in {folder / 'final'}, and --resume tests it"
        raise RuntimeError(f"{error}; {kept}") from error
    if trainer.accelerator.is_main_process:
        write_scores(path, scored)
        write_json(path.with_suffix(".json"), summary(scored))
    trainer.accelerator.wait_for_everyone()


def _finish(recipe: Recipe, split: str, folder: Path, seconds: float, push: bool) -> None:
    results = {
        name: json.loads((folder / "evaluation" / f"{name}.json").read_text(encoding="utf-8"))
        for name in ("before", "after")
    }
    write_json(folder / "eval.json", {"split": split, **results, "seconds": round(seconds, 1)})
    sides = [(n, folder / "evaluation" / f"{n}.jsonl") for n in ("before", "after")]
    metric = metric_name(recipe.arguments.metrics[0])
    compare(sides[0], sides[1], metric, title=f"{recipe.name} on {split} rows")
    print(f"{seconds:.0f} s in all; everything about this run is in {folder}")
    card = model_card(folder)
    for place in (folder, folder / "final"):  # in the place of the Trainer's, which knows no run
        write_text(place / "README.md", card)
    if push:
        repo = recipe.training.hub_model_id or recipe.name.replace("/", "-")
        print(f"pushed to {push_run(folder, repo, private=bool(recipe.training.hub_private_repo))}")


def _description(recipe: Recipe, task: Task, codec: Codec) -> str:
    """What a dry run resolved."""
    config = recipe.training
    tools = [schema["function"]["name"] for schema in codec.tools]
    rollouts = config.generation_batch_size
    return "\n".join(
        [
            f"recipe {recipe.name}: everything resolves",
            f"  policy     {recipe.model.model_name_or_path}",
            f"  rows       {len(task.train)} train, {len(task.dev)} dev, {len(task.test)} test"
            + (" (those of dev: the data set has no other)" if task.tested == "dev" else ""),
            f"  environment {recipe.arguments.environment}, tools {tools}",
            f"  rewards    {recipe.arguments.rewards} + process {recipe.arguments.process_rewards}",
            f"  algorithm  {config.algorithm}, loss {config.loss_type}",
            f"  rollouts   {rollouts} a batch = {rollouts // config.num_generations} rows x "
            f"{config.num_generations}, at most {config.max_turns} turns and "
            f"{config.max_completion_length} tokens each",
        ]
    )


def main(argv: Sequence[str] | None = None) -> int:
    """`agentr1 train RECIPE [--dry-run] [--resume] [--key value ...]`."""
    parser = recipe_parser("train", "Train a policy with reinforcement learning, then test it.")
    parser.add_argument("--dry-run", action="store_true", help="resolve everything, load nothing")
    parser.add_argument(
        "--resume", action="store_true", help="continue from the newest complete checkpoint"
    )
    args, overrides = split_arguments(parser, argv)
    return guarded(lambda: train(args.recipe, overrides, args.dry_run, args.resume), args.debug)


if __name__ == "__main__":
    sys.exit(main())
