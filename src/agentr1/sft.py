"""`agentr1 sft`: supervised fine-tuning on tool conversations, with the rollout's own tokens.

A demonstration is turned into the trajectory a rollout would have recorded, and from there on the
codec and `segments.flatten` build ids and mask as for reinforcement learning. TRL's SFTTrainer
does the rest.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from accelerate import PartialState
from datasets import Dataset
from trl import SFTConfig, SFTTrainer, get_peft_config, get_quantization_config

from agentr1.codec import Codec
from agentr1.commandline import guarded, recipe_parser, split_arguments
from agentr1.data import read_objects
from agentr1.launch import launch_overrides, prepare_process, refuse_several_gpus, run_folder
from agentr1.models import load_tokenizer, model_init_kwargs, resolve_model
from agentr1.parsing import render_call
from agentr1.progress import MetricsFile, ProgressBar, use_our_progress
from agentr1.ranks import leave_processes
from agentr1.recipe import find_path, load_recipe, search_roots
from agentr1.runs import write_header
from agentr1.segments import flatten
from agentr1.task import build_task
from agentr1.types import Message, Role, StopReason, Trajectory, Turn

IGNORED = -100
"""Label of a place that is not trained on, as in torch's cross entropy."""


def sft(name: str, overrides: Sequence[str] = ()) -> Path:
    """Fine-tune a recipe's policy on its demonstrations.

    Args:
        name: recipe, see `recipe.find_recipe`; its `demonstrations` names a JSONL of
            `{"messages": [...]}` in the Hugging Face form.
        overrides: command-line options that overrule the recipe's keys.

    Returns:
        The run's folder; the policy is in `final/`.

    Raises:
        ValueError, FileNotFoundError: a mistake in the recipe, the command or a demonstration.
    """
    prepare_process()
    recipe = load_recipe(name, [*launch_overrides(), *overrides], training=SFTConfig)
    refuse_several_gpus(recipe.training)
    if recipe.arguments.demonstrations is None:
        raise ValueError(f"recipe {recipe.name} names no demonstrations; set `demonstrations:`")
    demonstrations = find_path(recipe.arguments.demonstrations, "demonstrations")
    task = build_task(recipe.arguments)
    source = resolve_model(recipe.model.model_name_or_path, search_roots())
    tokenizer = load_tokenizer(source, search_roots())
    codec = Codec(tokenizer, task.env_factory().tool_schemas, source.path_or_id)
    tokenizer.chat_template = codec.template  # a saved policy carries what it was taught
    dataset = Dataset.from_list(list(training_rows(read_conversations(demonstrations), codec)))
    config = recipe.training
    folder = run_folder(recipe, resume=False)
    config.output_dir = str(folder)
    config.model_init_kwargs = model_init_kwargs(recipe.model) | (config.model_init_kwargs or {})
    config.dataset_kwargs = {"skip_prepare_dataset": True}
    if PartialState().is_main_process:
        write_header(folder, recipe.text, ["agentr1", "sft", name, *overrides])
    trainer = SFTTrainer(
        model=source.path_or_id,
        args=config,
        train_dataset=dataset,
        processing_class=tokenizer,
        quantization_config=get_quantization_config(recipe.model),
        peft_config=get_peft_config(recipe.model),
    )
    use_our_progress(trainer, [ProgressBar(), MetricsFile(folder)])
    trainer.train(resume_from_checkpoint=config.resume_from_checkpoint)
    trainer.save_model(str(folder / "final"))
    if trainer.is_world_process_zero():
        print(f"the policy is in {folder / 'final'}")
    leave_processes(trainer.accelerator)
    return folder


def read_conversations(path: Path) -> Iterator[tuple[str, list[Any]]]:
    """Read `{"messages": [...]}` lines; each conversation comes with its place, file and line.

    Args:
        path: see `data.read_objects`.

    Raises:
        ValueError: a line is no such object; the message names file and line.
    """
    for place, record in read_objects(path):
        messages = record.get("messages")
        if not isinstance(messages, list):
            raise ValueError(f"{place}: expected {{'messages': [...]}}, got {str(record)[:80]}")
        yield place, messages


def training_rows(
    conversations: Iterable[tuple[str, Sequence[Any]]], codec: Codec
) -> Iterator[dict[str, list[int]]]:
    """Ids and labels of each conversation; only the assistant's own tokens are labelled.

    Args:
        conversations: place and messages, see `read_conversations`.
        codec: of the policy's tokenizer.

    Raises:
        ValueError: with the place of what is no conversation.
    """
    for place, conversation in conversations:
        try:
            trajectory = recorded(conversation, codec)
        except ValueError as error:
            raise ValueError(f"{place}: {error}") from error
        for segment in flatten(trajectory):
            unlabelled = [IGNORED] * len(segment.prompt_ids)
            pairs = zip(segment.completion_ids, segment.loss_mask, strict=True)
            yield {
                "input_ids": [*segment.prompt_ids, *segment.completion_ids],
                "labels": unlabelled + [token if kept else IGNORED for token, kept in pairs],
            }


def recorded(conversation: Sequence[Mapping[str, Any]], codec: Codec) -> Trajectory:
    """The trajectory of which a conversation is the transcript.

    Args:
        conversation: messages in the Hugging Face form; assistant messages may hold `tool_calls`.
        codec: of the policy's tokenizer.

    Raises:
        ValueError: a message is malformed, there is no assistant's, one opens the conversation,
            follows another or names a control token that would be live.
    """
    messages = [_message(m) for m in conversation]
    roles = [m.role for m in messages]
    spoken = [i for i, role in enumerate(roles) if role == "assistant"]
    if not spoken or spoken[0] == 0 or any(b - a == 1 for a, b in itertools.pairwise(spoken)):
        raise ValueError(
            "a demonstration needs a question, then assistant messages with something said to each "
            f"but the last, got roles {roles}"
        )
    for name in itertools.chain(*(codec.forged(messages[i].content) for i in spoken)):
        raise ValueError(
            f"an assistant message names the control token {name!r}, which would be live in it; "
            "take it out, or leave the demonstration out"
        )
    prompt = tuple(messages[: spoken[0]])
    turns = []
    for k, start in enumerate(spoken):
        end = spoken[k + 1] if k + 1 < len(spoken) else len(messages)
        action_ids, shown = codec.action(messages[start].content), tuple(messages[start + 1 : end])
        turns.append(
            Turn(
                action_ids=action_ids,
                logprobs=(0.0,) * len(action_ids),
                message=messages[start],
                observation_ids=codec.observation(shown, action_ids) if shown else (),
                prompt_ids=codec.prompt(prompt) if k == 0 else None,
                observation=shown,
            )
        )
    return Trajectory({}, prompt, tuple(turns), StopReason.ENVIRONMENT)


def _message(message: Any) -> Message:
    try:
        content = message.get("content") or ""
        calls = [
            render_call(call["function"]["name"], call["function"]["arguments"])
            for call in message.get("tool_calls") or ()
        ]
        if message["role"] not in get_args(Role) or not isinstance(content, str):
            raise ValueError(f"role {message['role']!r} or content {content!r}")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"expected a message with a role among {get_args(Role)}, text as its content and "
            f"tool_calls of {{'function': {{'name': ..., 'arguments': {{...}}}}}}, got {message!r}"
        ) from error
    text = "\n".join(part for part in (content, *calls) if part)
    return Message(message["role"], text, name=message.get("name"))


def main(argv: Sequence[str] | None = None) -> int:
    """`agentr1 sft RECIPE [--key value ...]`."""
    parser = recipe_parser("sft", "Fine-tune a policy on demonstrations.", "SFTConfig")
    args, overrides = split_arguments(parser, argv)
    return guarded(lambda: sft(args.recipe, overrides), args.debug)


if __name__ == "__main__":
    sys.exit(main())
