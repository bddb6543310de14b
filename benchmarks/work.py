"""The work that benchmarks of rollouts share: a policy, a tool, a script, and who plays it."""

from __future__ import annotations

import argparse
import os
import warnings
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from agentr1.codec import Codec
from agentr1.data import find_corpus, find_split, load_rows
from agentr1.models import load_model, load_tokenizer, resolve_model
from agentr1.recipe import find_path, search_roots
from agentr1.retrieval.base import load_passages
from agentr1.tools.base import schema, tool
from benchmarks import comparison
from benchmarks.script import Script, write_script
from benchmarks.sides import Floor, Ours, Theirs, Tokens, check_equal, fastest
from benchmarks.slow import SlowSearch

SYSTEM_PROMPT = "Answer with the tool's help. Reply with the answer alone."
QUICKSTART = "data/quickstart/policy"
SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
TRIAL_WAIT = 0.05
"""Seconds of a call when TRL's ways are tried: its engines and its kinds of tools both show."""


class Work(NamedTuple):
    """What is played, and how long its tool takes."""

    tokenizer: PreTrainedTokenizerBase
    codec: Codec
    script: Script
    slow: SlowSearch


class Players(NamedTuple):
    """Three sides that have been seen to do equal work."""

    ours: Ours
    theirs: Theirs
    floor: Floor


def arguments(name: str, description: str, repeats: int = 5) -> argparse.ArgumentParser:
    """Options of a benchmark that plays scripted rollouts."""
    parser = comparison.arguments(name, description, repeats)
    parser.add_argument("--policy", default=QUICKSTART, help="a model's folder, or its Hub id")
    parser.add_argument("--data", default="data/quickstart", help="folder with rows and corpus")
    parser.add_argument("--rollouts", type=int, default=16)
    parser.add_argument("--group", type=int, default=4, help="rollouts of one row, as in GRPO")
    parser.add_argument("--turns", type=int, default=3, help="turns that call; an answer follows")
    parser.add_argument("--calls", type=int, default=1, help="calls of one turn")
    return parser


def quiet(threads: int) -> None:
    """Set the threads of the model's compute and keep upstream's chatter out of the table."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    torch.set_num_threads(threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)


def tokenizer_of(policy: str) -> PreTrainedTokenizerBase:
    """The policy's tokenizer."""
    roots = search_roots()
    return load_tokenizer(resolve_model(policy, roots), roots)


def model_of(policy: str) -> PreTrainedModel:
    """The policy in float32."""
    return load_model(resolve_model(policy, search_roots()), attn_implementation="sdpa")


def write(options: argparse.Namespace, thought: str = "") -> Work:
    """Write the script that the options ask for."""
    tokenizer = tokenizer_of(options.policy)
    folder = find_path(options.data, "dataset folder")
    passages = load_passages(find_corpus(folder))
    slow = SlowSearch("\n".join(f"{p.title}: {p.text}" for p in passages[:2]))
    codec = Codec(tokenizer, [schema(tool(slow.functions()[0]))], options.policy)
    tokenizer.chat_template = codec.template  # SmolLM2's own has no tools, so TRL refuses it
    script = write_script(
        codec,
        load_rows(find_split(folder, "train")),
        system_prompt=SYSTEM_PROMPT,
        rollouts=options.rollouts,
        group=options.group,
        turns=options.turns,
        queries=[passage.title for passage in passages[: options.calls]],
        found=slow.found,
        answer=passages[0].title,
        thought=thought,
    )
    work = Work(tokenizer, codec, script, slow)
    wait_equally(work, options, 0.0)
    return work


def wait_equally(work: Work, options: argparse.Namespace, latency: float) -> None:
    """Let every call take `latency` seconds."""
    waits = [latency] * options.turns * options.calls
    work.slow.takes([waits] * len(work.script.rows), options.calls)


def gather(
    work: Work, model: PreTrainedModel, options: argparse.Namespace, trial: Work | None = None
) -> Players:
    """Build all sides, check that they do equal work, choose the fastest of TRL's ways.

    Args:
        work: what is played.
        model: its policy.
        options: of the command.
        trial: smaller work of the same kind to choose TRL's way by; None for `work` itself.
    """
    _, codec, script, slow = work
    ours, floor = Ours(model, codec, script, slow), Floor(model, script)
    wait_equally(work, options, 0.0)
    expected = ours.play()
    check_equal(expected, floor.play(), script)
    if trial is None:
        return Players(ours, _fastest(work, model, options, expected), floor)
    tried = Ours(model, trial.codec, trial.script, trial.slow)
    chosen = _fastest(trial, model, options, tried.play())
    theirs = Theirs(model, work.tokenizer, script, slow, paged=chosen.paged, waits=chosen.waits)
    check_equal(expected, theirs.play(), script)
    return Players(ours, theirs, floor)


def _fastest(
    work: Work, model: PreTrainedModel, options: argparse.Namespace, expected: Tokens
) -> Theirs:
    """The best of TRL's ways; asynchronous tools only where it gathers several calls."""
    wait_equally(work, options, TRIAL_WAIT)
    ways = [
        Theirs(model, work.tokenizer, work.script, work.slow, paged=paged, waits=waits)
        for paged in (False, True)
        for waits in ((False, True) if options.calls > 1 else (False,))
    ]
    return fastest(ways, expected, work.script)


def describe(work: Work, options: argparse.Namespace, theirs: str = "") -> dict[str, Any]:
    """The work in numbers; `theirs` is TRL's way, where it takes part."""
    script = work.script
    opponent = {"theirs": f"TRL {version('trl')}, {theirs}"} if theirs else {}
    return opponent | {
        "rollouts": options.rollouts,
        "group": options.group,
        "tool_turns": options.turns,
        "calls_per_turn": options.calls,
        "prompt_tokens": script.prompt_length,
        "action_tokens": [len(ids) for ids in script.action_ids],
        "observation_tokens": [len(ids) for ids in script.observation_ids],
        "repeats": options.repeats,
        "policy": options.policy,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
    }


def short_name(policy: str) -> str:
    """How tables name a policy."""
    if "smollm2" in policy.lower():
        return "SmolLM2-135M"
    return "quickstart" if policy == QUICKSTART else policy
