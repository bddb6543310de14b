"""Our rollout against the tool loop of TRL 1.16, on the same work in one process.

Both sides get equal weights, the same tokenizer, template, tool and prompts, and a model whose
logits are forced after its full compute, so that both emit the same tokens: checked before
anything is timed. What is compared is the way from prompts to token ids and masks:
`rollout_batch` and `flatten` here, `GRPOTrainer._generate` there, with whichever of its engines
and kinds of tools is fastest in a trial.

    python -m benchmarks.rollout --json rollout.json
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import dataclasses
import inspect
import itertools
import json
import logging
import os
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer

from agentr1.codec import Codec
from agentr1.data import find_corpus, find_split, load_rows
from agentr1.engines.base import Sampling
from agentr1.engines.in_process import InProcessEngine
from agentr1.envs.tool_env import ToolEnv
from agentr1.models import load_model, load_tokenizer, resolve_model
from agentr1.recipe import find_path, search_roots
from agentr1.retrieval.base import Passage, load_passages
from agentr1.rollout import Limits, rollout_batch
from agentr1.segments import flatten
from agentr1.tools.base import ToolRunner, schema, tool
from agentr1.types import Message, Row
from benchmarks.comparison import Comparison, finish, medians

SYSTEM_PROMPT = "Answer with the tool's help. Reply with the answer alone."
TARGETS = {0.0: 1.0, 0.5: 6.0}
"""Tool latency in seconds to the least ratio."""
TRIAL_LATENCY = 0.05
"""At this latency TRL's ways are tried; its engines and its kinds of tools both show."""
PAGE = 32
"""Tokens of a page of TRL's continuous batching; its default of 256 shares no short prefix."""


class Tokens(NamedTuple):
    """What a rollout hands to a trainer; equal on both sides."""

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    masks: list[list[int]]


@dataclasses.dataclass
class SlowTool:
    """A search that takes `latency` seconds and always finds the same, in both kinds."""

    found: str
    latency: float = 0.0

    def functions(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """The tool as a synchronous and as an asynchronous function."""

        # No return type: TRL would show it to the policy, and prompts are to be equal.
        def search(query: str):
            """Search the corpus for passages.

            Args:
                query: What to look for.
            """
            time.sleep(self.latency)
            return self.found

        synchronous = search

        async def search(query: str):  # type: ignore[no-redef]
            await asyncio.sleep(self.latency)
            return self.found

        search.__doc__ = synchronous.__doc__
        return synchronous, search


@dataclasses.dataclass(frozen=True)
class Script:
    """The work: rows whose prompts have one length, so that the position alone tells what is said.

    Attributes:
        rows: one per rollout.
        prompts: their messages.
        action_ids: what the policy says, turn by turn; the last is the answer.
        observation_ids: what comes back from each but the last.
        prompt_length: tokens of every prompt.
    """

    rows: list[Row]
    prompts: list[list[dict[str, str]]]
    action_ids: list[tuple[int, ...]]
    observation_ids: list[tuple[int, ...]]
    prompt_length: int

    @property
    def completion_ids(self) -> list[int]:
        """The whole episode after the prompt."""
        pairs = zip(self.action_ids, [*self.observation_ids, ()], strict=True)
        return [token for pair in pairs for part in pair for token in part]


def write_script(
    codec: Codec, rows: Sequence[Row], passages: Sequence[Passage], options: argparse.Namespace
) -> Script:
    """Choose the rows and say what happens in them."""
    of_length: dict[int, list[Row]] = defaultdict(list)
    for row in rows:
        length = len(codec.prompt(_opening(row)))
        of_length[length].append(row)
        if len(of_length[length]) == options.rollouts:
            break
    else:
        raise ValueError(
            f"{len(rows)} rows hold no {options.rollouts} prompts of one length; ask for fewer "
            "--rollouts"
        )
    calls = [
        {"name": "search", "arguments": {"query": passage.title}}
        for passage in passages[: options.calls]
    ]
    said = "\n".join(f"<tool_call>\n{json.dumps(call)}\n</tool_call>" for call in calls)
    action = codec.action(said)
    results = [Message("tool", _found(passages), name="search")] * len(calls)
    return Script(
        rows=of_length[length],
        prompts=[
            [{"role": m.role, "content": m.content} for m in _opening(row)]
            for row in of_length[length]
        ],
        action_ids=[action] * options.turns + [codec.action(passages[0].title)],
        observation_ids=[codec.observation(results, action)] * options.turns,
        prompt_length=length,
    )


def _opening(row: Row) -> list[Message]:
    return [Message("system", SYSTEM_PROMPT), Message("user", row["question"])]


def _found(passages: Sequence[Passage]) -> str:
    return "\n".join(f"{passage.title}: {passage.text}" for passage in passages[:2])


def force(model: PreTrainedModel, script: Script) -> PreTrainedModel:
    """Make a copy that follows the script: its own logits, and at each position one far above."""
    model = copy.deepcopy(model)
    spoken = torch.tensor(script.completion_ids)
    first = script.prompt_length - 1  # the position that foretells the completion's first token

    def overrule(module: Any, arguments: Any, keywords: dict[str, Any], output: Any) -> None:
        kept = keywords.get("logits_to_keep", 0)
        positions = keywords["position_ids"]  # (B, q)
        positions = positions[:, kept if isinstance(kept, torch.Tensor) else slice(-kept, None)]
        following = spoken[(positions - first).clamp(0, len(spoken) - 1)]  # (B, k)
        output.logits.scatter_(-1, following[..., None], 1e4)  # (B, k, V)

    model.register_forward_hook(overrule, with_kwargs=True)
    return model


class Ours:
    """`rollout_batch` with the in-process engine."""

    def __init__(self, model: PreTrainedModel, codec: Codec, script: Script, search: Any) -> None:
        self.script, self.codec = script, codec
        self.model = force(model, script).eval()
        self.engine = InProcessEngine(self.model, sorted(codec.stop_ids))
        self.runner = ToolRunner([tool(search)])
        self.limits = Limits(len(script.action_ids), 2 * len(script.completion_ids))

    def play(self) -> Tokens:
        """From rows to tokens, with nothing kept from the last time."""
        self.engine.sync(self.model)
        samplings = [Sampling(1, seed=i) for i in range(len(self.script.rows))]
        trajectories = asyncio.run(
            rollout_batch(
                self.script.rows,
                lambda: ToolEnv(self.runner, SYSTEM_PROMPT),
                self.codec,
                self.engine,
                limits=self.limits,
                samplings=samplings,
            )
        )
        segments = [segment for trajectory in trajectories for segment in flatten(trajectory)]
        return Tokens(
            [list(s.prompt_ids) for s in segments],
            [list(s.completion_ids) for s in segments],
            [list(s.loss_mask) for s in segments],
        )


class Theirs:
    """`GRPOTrainer._generate`: first turn, `_tool_call_loop`, token lists and metrics."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        script: Script,
        search: Any,
        paged: bool,
    ) -> None:
        self.script = script
        waits = inspect.iscoroutinefunction(search)
        engine = "continuous batching" if paged else "generate"
        self.name = f"{engine}, {'async' if waits else 'sync'} tool"
        length = script.prompt_length + 2 * len(script.completion_ids)
        pages = len(script.rows) * (length // PAGE + 2)
        self._folder = tempfile.TemporaryDirectory()
        config = GRPOConfig(
            self._folder.name,
            use_cpu=not torch.cuda.is_available(),
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            num_generations=2,
            max_completion_length=2 * len(script.completion_ids),
            use_transformers_continuous_batching=paged,
            transformers_continuous_batching_config={
                "page_size": PAGE,
                "num_blocks": pages,
                "max_batch_tokens": len(script.rows) * length,
            },
        )
        self.trainer = GRPOTrainer(
            model=force(model, script),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=config,
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in script.prompts]),
            processing_class=copy.deepcopy(tokenizer),
            tools=[search],
        )
        # What `_generate_and_score_completions` sets before it calls `_generate`.
        mine, none = [{"search": search}] * len(script.rows), [{}] * len(script.rows)
        self.trainer._sync_tool_dicts, self.trainer._async_tool_dicts = (
            (none, mine) if waits else (mine, none)
        )

    def play(self) -> Tokens:
        """From prompts to tokens."""
        prompt_ids, completion_ids, masks, *_ = self.trainer._generate(self.script.prompts)
        return Tokens(*(list(map(list, part)) for part in (prompt_ids, completion_ids, masks)))


def seconds(play: Callable[[], Tokens]) -> float:
    """How long one run takes."""
    start = time.perf_counter()
    play()
    return time.perf_counter() - start


def check_equal(ours: Tokens, theirs: Tokens, script: Script) -> None:
    """Refuse to time two sides that do different work."""
    for name, one, other in zip(Tokens._fields, ours, theirs, strict=True):
        if one != other:
            raise RuntimeError(f"both sides must have the same {name}, got {one[0]} and {other[0]}")
    said = [token for action in script.action_ids for token in action]
    for ids, mask in zip(ours.completion_ids, ours.masks, strict=True):
        if list(itertools.compress(ids, mask)) != said:
            raise RuntimeError("the policy's tokens are not the script's, so the turns differ")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and return 1 where a target is missed."""
    options = _parser().parse_args(argv)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    roots = search_roots()
    source = resolve_model(options.policy, roots)
    tokenizer, model = load_tokenizer(source, roots), load_model(source, attn_implementation="sdpa")
    folder = find_path(options.data, "dataset folder")
    passages = load_passages(find_corpus(folder))
    slow = SlowTool(_found(passages))
    functions = slow.functions()
    codec = Codec(tokenizer, [schema(tool(functions[0]))], options.policy)
    script = write_script(codec, load_rows(find_split(folder, "train")), passages, options)
    ours = Ours(model, codec, script, functions[0])
    ways = [
        Theirs(model, tokenizer, script, function, paged)
        for paged in (False, True)
        for function in functions
    ]
    tokens = ours.play()
    for way in ways:
        check_equal(tokens, way.play(), script)
    theirs = fastest(ways, slow)
    comparisons = []
    for latency in options.latency:
        slow.latency = latency
        both = medians(lambda: seconds(ours.play), lambda: seconds(theirs.play), options.repeats)
        comparisons.append(
            Comparison(
                f"rollout, {latency:g} s tool",
                *both,
                workload=describe(script, options, latency, theirs.name),
                target=TARGETS.get(latency),
            )
        )
    return finish(comparisons, options.json)


def fastest(ways: Sequence[Theirs], slow: SlowTool) -> Theirs:
    """The best of TRL's ways on this machine, each tried three times in turn."""
    slow.latency = TRIAL_LATENCY
    took = {way: [] for way in ways}
    for _ in range(3):
        for way in ways:
            took[way].append(seconds(way.play))
    found = {way: statistics.median(times) for way, times in took.items()}
    print(f"TRL's ways at {TRIAL_LATENCY:g} s:", end=" ")
    print(", ".join(f"{way.name} {median:.2f} s" for way, median in found.items()))
    return min(ways, key=found.__getitem__)


def describe(
    script: Script, options: argparse.Namespace, latency: float, way: str
) -> dict[str, Any]:
    """The work in numbers."""
    return {
        "rollouts": len(script.rows),
        "tool_turns": options.turns,
        "calls_per_turn": options.calls,
        "tool_latency_s": latency,
        "prompt_tokens": script.prompt_length,
        "action_tokens": [len(ids) for ids in script.action_ids],
        "observation_tokens": [len(ids) for ids in script.observation_ids],
        "repeats": options.repeats,
        "policy": options.policy,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "theirs": f"TRL {version('trl')}, {way}",
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rollout",
        description="Time our rollout against the tool loop of TRL on the same work.",
    )
    parser.add_argument("--policy", default="data/quickstart/policy", help="a model's folder")
    parser.add_argument("--data", default="data/quickstart", help="folder with rows and corpus")
    parser.add_argument("--latency", type=float, nargs="+", default=[0.0, 0.1, 0.5])
    parser.add_argument("--rollouts", type=int, default=16)
    parser.add_argument("--turns", type=int, default=3, help="turns that call; an answer follows")
    parser.add_argument("--calls", type=int, default=1, help="calls of one turn")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", help="file to write the result to")
    return parser


if __name__ == "__main__":
    sys.exit(main())
