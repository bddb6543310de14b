"""Our rollout against the tool loop of TRL 1.16, on the same work in one process.

Both sides get equal weights, tokenizer, template, tool and prompts, and a policy whose logits are
forced, so that both emit the same tokens: checked before anything is timed. What is compared is
the way from rows to token ids and masks: `rollout_batch` and `flatten` here,
`GRPOTrainer._generate` there, with the fastest in a trial of its engines and kinds of tools.

    python -m benchmarks.rollout --json rollout.json
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import functools
import inspect
import itertools
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from typing import Any, NamedTuple

import torch
import transformers
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
from agentr1.retrieval.base import load_passages
from agentr1.rollout import Limits, rollout_batch
from agentr1.segments import flatten
from agentr1.tools.base import ToolRunner, schema, tool
from benchmarks.comparison import Comparison, finish, medians
from benchmarks.script import Script, forced, write_script

SYSTEM_PROMPT = "Answer with the tool's help. Reply with the answer alone."
TARGETS = {0.0: 1.0, 0.5: 6.0}
"""Seconds a tool takes -> the least ratio."""
TRIAL_LATENCY = 0.05
"""At this latency TRL's ways are tried: its engines and its kinds of tools both show."""
PAGE = 32
"""Tokens in a page of TRL's continuous batching: the default, 256, shares no prefix this short."""


class Tokens(NamedTuple):
    """What a rollout hands to a trainer, one list per rollout."""

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    masks: list[list[int]]


class SlowSearch:
    """A search that takes `latency` seconds and always finds the same."""

    def __init__(self, found: str) -> None:
        self.found = found
        self.latency = 0.0

    def functions(self) -> tuple[Callable[..., Any], Callable[..., Any]]:
        """The tool as a blocking and as an asynchronous function, alike to the policy."""

        # No return type: TRL would show it to the policy, and the prompts are to be equal.
        def search(query: str):
            """Search the corpus for passages.

            Args:
                query: What to look for.
            """
            time.sleep(self.latency)
            return self.found

        @functools.wraps(search)
        async def search_async(query: str):
            await asyncio.sleep(self.latency)
            return self.found

        return search, search_async


class Ours:
    """`rollout_batch` over the in-process engine."""

    def __init__(self, model: PreTrainedModel, codec: Codec, script: Script, search: Any) -> None:
        self.script, self.codec = script, codec
        self.model = forced(model, script).eval()
        self.engine = InProcessEngine(self.model, sorted(codec.stop_ids))
        self.runner = ToolRunner([tool(search)])
        self.limits = Limits(len(script.action_ids), 2 * len(script.completion_ids))

    def play(self) -> Tokens:
        """From rows to tokens; nothing is kept from the last time."""
        self.engine.sync(self.model)
        trajectories = asyncio.run(
            rollout_batch(
                self.script.rows,
                lambda: ToolEnv(self.runner, self.script.system_prompt),
                self.codec,
                self.engine,
                limits=self.limits,
                samplings=[Sampling(1, seed=i) for i in range(len(self.script.rows))],
            )
        )
        segments = [segment for trajectory in trajectories for segment in flatten(trajectory)]
        return Tokens(
            [list(s.prompt_ids) for s in segments],
            [list(s.completion_ids) for s in segments],
            [list(s.loss_mask) for s in segments],
        )


class Theirs:
    """`GRPOTrainer._generate`: the first turn, `_tool_call_loop`, lists of ids and masks."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        script: Script,
        search: Any,
        paged: bool,
    ) -> None:
        waits = inspect.iscoroutinefunction(search)
        engine = "continuous batching" if paged else "generate"
        self.name = f"{engine} with {'async' if waits else 'sync'} tools"
        self.prompts = [
            [{"role": m.role, "content": m.content} for m in script.opening(row)]
            for row in script.rows
        ]
        self._folder = tempfile.TemporaryDirectory()  # lives as long as the trainer
        self.trainer = GRPOTrainer(
            model=forced(model, script),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=_their_config(script, self._folder.name, paged),
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in self.prompts]),
            processing_class=copy.deepcopy(tokenizer),
            tools=[search],
        )
        # What `_generate_and_score_completions` sets before it calls `_generate`.
        mine, none = [{"search": search}] * len(script.rows), [{}] * len(script.rows)
        self.trainer._sync_tool_dicts = none if waits else mine
        self.trainer._async_tool_dicts = mine if waits else none

    def play(self) -> Tokens:
        """From prompts to tokens."""
        prompt_ids, completion_ids, masks, *_ = self.trainer._generate(self.prompts)
        return Tokens(*(list(map(list, part)) for part in (prompt_ids, completion_ids, masks)))


def _their_config(script: Script, folder: str, paged: bool) -> GRPOConfig:
    length = script.prompt_length + 2 * len(script.completion_ids)
    return GRPOConfig(
        folder,
        use_cpu=not torch.cuda.is_available(),
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        num_generations=2,
        max_completion_length=2 * len(script.completion_ids),
        use_transformers_continuous_batching=paged,
        # Sized to the work: unsized, every turn would allocate half of the free memory.
        transformers_continuous_batching_config={
            "page_size": PAGE,
            "num_blocks": len(script.rows) * (length // PAGE + 2),
            "max_batch_tokens": len(script.rows) * length,
        },
    )


def seconds(play: Callable[[], Tokens]) -> float:
    """How long one run takes."""
    start = time.perf_counter()
    play()
    return time.perf_counter() - start


def check_equal(ours: Tokens, theirs: Tokens, script: Script) -> None:
    """Refuse to time two sides that do different work, or other work than the script's."""
    for name, one, other in zip(Tokens._fields, ours, theirs, strict=True):
        if one != other:
            raise RuntimeError(f"both sides must have the same {name}, got {one[0]} and {other[0]}")
    for ids, mask in zip(ours.completion_ids, ours.masks, strict=True):
        if ids != script.completion_ids or [*itertools.compress(ids, mask)] != script.policy_ids:
            raise RuntimeError(f"expected the script {script.completion_ids}, got {ids}")


def fastest(ways: Sequence[Theirs], slow: SlowSearch) -> Theirs:
    """The best of TRL's ways here, by the least disturbed of three runs in turn."""
    slow.latency = TRIAL_LATENCY
    runs = [[seconds(way.play) for way in ways] for _ in range(3)]
    best = [min(column) for column in zip(*runs, strict=True)]
    print(f"TRL with a tool of {TRIAL_LATENCY:g} s:")
    for way, took in zip(ways, best, strict=True):
        print(f"  {way.name:<44}{took:>8.2f} s")
    return ways[best.index(min(best))]


def describe(script: Script, options: argparse.Namespace, way: str) -> dict[str, Any]:
    """The work in numbers."""
    return {
        "rollouts": options.rollouts,
        "tool_turns": options.turns,
        "calls_per_turn": options.calls,
        "prompt_tokens": script.prompt_length,
        "action_tokens": [len(ids) for ids in script.action_ids],
        "observation_tokens": [len(ids) for ids in script.observation_ids],
        "repeats": options.repeats,
        "policy": options.policy,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "threads": torch.get_num_threads(),
        "theirs": f"TRL {version('trl')}, {way}",
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and return 1 where a target is missed."""
    options = _parser().parse_args(argv)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    torch.set_num_threads(options.threads)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning)
    roots = search_roots()
    source = resolve_model(options.policy, roots)
    tokenizer, model = load_tokenizer(source, roots), load_model(source, attn_implementation="sdpa")
    folder = find_path(options.data, "dataset folder")
    passages = load_passages(find_corpus(folder))
    slow = SlowSearch("\n".join(f"{p.title}: {p.text}" for p in passages[:2]))
    search, search_async = slow.functions()
    codec = Codec(tokenizer, [schema(tool(search))], options.policy)
    script = write_script(
        codec,
        load_rows(find_split(folder, "train")),
        system_prompt=SYSTEM_PROMPT,
        rollouts=options.rollouts,
        turns=options.turns,
        queries=[passage.title for passage in passages[: options.calls]],
        found=slow.found,
        answer=passages[0].title,
    )
    ours = Ours(model, codec, script, search)
    ways = [
        Theirs(model, tokenizer, script, function, paged)
        for paged in (False, True)
        for function in (search, search_async)
    ]
    for way in ways:  # warms both sides up, too
        check_equal(ours.play(), way.play(), script)
    theirs = fastest(ways, slow)
    workload = describe(script, options, theirs.name)
    comparisons = []
    for slow.latency in options.latency:
        both = medians(lambda: seconds(ours.play), lambda: seconds(theirs.play), options.repeats)
        name, target = f"rollout, tool {slow.latency:g} s", TARGETS.get(slow.latency)
        comparisons.append(Comparison(name, *both, workload, target))
    return finish(comparisons, options.json)


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
    # A second thread gains nothing at the policy's size and waits for its core on a busy machine.
    parser.add_argument("--threads", type=int, default=1, help="of the model's compute")
    parser.add_argument("--json", help="file to write the result to")
    return parser


if __name__ == "__main__":
    sys.exit(main())
