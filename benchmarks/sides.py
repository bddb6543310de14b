"""Three ways to play a script: ours, TRL's, and the least that has to be computed.

All get equal weights, tokenizer, template, tool and prompts, and a policy whose logits are forced,
so that they emit the same tokens: `check_equal` looks before anything is timed. What is compared
is the way from rows to token ids and masks: `rollout_batch` and `flatten` here,
`GRPOTrainer._generate` there.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from datasets import Dataset
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from trl import GRPOConfig, GRPOTrainer

from agentr1.codec import Codec
from agentr1.engines.base import Sampling
from agentr1.engines.in_process import InProcessEngine
from agentr1.envs.tool_env import ToolEnv
from agentr1.rollout import Limits, rollout_batch
from agentr1.segments import flatten
from agentr1.tools.base import tool
from agentr1.tools.policy import ToolPolicy
from agentr1.tools.runner import ToolRunner
from benchmarks.script import Script, forced
from benchmarks.slow import SlowSearch

PAGE = 32
"""Tokens in a page of TRL's continuous batching: the default, 256, shares no prefix this short."""
PASS_TOKENS = 512
"""Most tokens of one of its passes on a CPU: its dense mask grows with it, 512 was the fastest."""
SHORTEST_STEM = 16
"""Shared tokens below this are computed for each prompt: a pass of their own would cost more."""
HOPELESS = 1.5
"""A way of TRL's that takes so many times the fastest's time is not tried again."""
TRIAL_SECONDS = 20.0
"""A way of TRL's that has taken so long in the trial is not tried again either."""


class Tokens(NamedTuple):
    """What a rollout hands to a trainer, one list per rollout."""

    prompt_ids: list[list[int]]
    completion_ids: list[list[int]]
    masks: list[list[int]]


class Ours:
    """`rollout_batch` over the in-process engine."""

    def __init__(
        self, model: PreTrainedModel, codec: Codec, script: Script, slow: SlowSearch
    ) -> None:
        self.script, self.codec, self.slow = script, codec, slow
        self.model = forced(model, script).eval()
        self.engine = InProcessEngine(self.model, sorted(codec.stop_ids))
        count = len(script.rows)
        # No limit that the other side does not have.
        policy = ToolPolicy(timeout=3600, concurrency=count)
        self.runner = ToolRunner([tool(slow.functions()[0])], default_policy=policy)
        self.limits = Limits(len(script.action_ids), 2 * len(script.completion_ids))
        self.samplings = [Sampling(1, seed=i, episode=i) for i in range(count)]

    def play(self) -> Tokens:
        """From rows to tokens; nothing is kept from the last time."""
        self.engine.sync(self.model)
        self.slow.begin()
        started = itertools.count()

        def env() -> ToolEnv:
            self.slow.called_by(next(started))
            return ToolEnv(self.runner, self.script.system_prompt)

        trajectories = asyncio.run(
            rollout_batch(
                self.script.rows,
                env,
                self.codec,
                self.engine,
                limits=self.limits,
                samplings=self.samplings,
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
        slow: SlowSearch,
        *,
        paged: bool,
        waits: bool,
    ) -> None:
        engine = "continuous batching" if paged else "generate"
        self.name = f"{engine} with {'async' if waits else 'sync'} tools"
        self.paged, self.waits, self.slow = paged, waits, slow
        self.prompts = [
            [{"role": m.role, "content": m.content} for m in script.opening(row)]
            for row in script.rows
        ]
        self._folder = tempfile.TemporaryDirectory()  # lives as long as the trainer
        search = slow.functions()[waits]
        self.trainer = GRPOTrainer(
            model=forced(model, script),
            reward_funcs=lambda completions, **_: [0.0] * len(completions),
            args=_their_config(model, script, self._folder.name, paged),
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in self.prompts]),
            processing_class=copy.deepcopy(tokenizer),
            tools=[search],
        )
        # What `_generate_and_score_completions` sets before it calls `_generate`.
        mine = [{"search": slow.of(i, search)} for i in range(len(script.rows))]
        none: list[dict[str, Any]] = [{}] * len(script.rows)
        self.trainer._sync_tool_dicts = none if waits else mine
        self.trainer._async_tool_dicts = mine if waits else none

    def play(self) -> Tokens:
        """From prompts to tokens."""
        self.slow.begin()
        made: Any = self.trainer._generate(self.prompts)  # ids of prompts, completions, masks, ...
        return Tokens(*(list(map(list, part)) for part in made[:3]))


def _their_config(model: PreTrainedModel, script: Script, folder: str, paged: bool) -> GRPOConfig:
    on_cpu = model.device.type == "cpu"
    length = script.prompt_length + 2 * len(script.completion_ids)
    # A GPU's memory it can size itself; here every turn would allocate half of what is free.
    sizes = {
        "page_size": PAGE,
        "num_blocks": len(script.rows) * (length // PAGE + 2),
        "max_batch_tokens": max(PASS_TOKENS, len(script.rows)),
    }
    return GRPOConfig(
        folder,
        use_cpu=on_cpu,
        bf16=model.dtype == torch.bfloat16,
        gradient_checkpointing=False,
        report_to="none",
        num_generations=max(2, script.group),
        max_completion_length=2 * len(script.completion_ids),
        use_transformers_continuous_batching=paged,
        transformers_continuous_batching_config=sizes if on_cpu else {},
    )


class Floor:
    """The same tokens in lock step: every prefix once, every pass with all rollouts.

    A rollout whose tools take no time cannot compute less with this model; tools add the waits of
    the longest trajectory. A plain `DynamicCache` does, since all rows are equally long.
    """

    def __init__(self, model: PreTrainedModel, script: Script) -> None:
        self.script = script
        self.model = forced(model, script).eval()

    @torch.no_grad()
    def play(self) -> Tokens:
        """All rollouts at once, their observations known beforehand."""
        script, device = self.script, self.model.device
        cache = DynamicCache()
        prompts = torch.tensor(script.prompt_ids, device=device)  # (B, P)
        groups = prompts[:: script.group]  # (B / G, P)
        stem = script.stem if len(groups) > 1 and script.stem >= SHORTEST_STEM else 0
        if stem:
            self._pass(groups[:1, :stem], 0, cache)
            cache.batch_repeat_interleave(len(groups))
        logits = self._pass(groups[:, stem:], stem, cache)  # (B / G, V)
        cache.batch_repeat_interleave(script.group)
        logits = logits.repeat_interleave(script.group, 0)  # (B, V)
        told: list[torch.Tensor] = []
        masks: list[int] = []
        place = script.prompt_length
        for action, shown in zip(script.action_ids, [*script.observation_ids, ()], strict=True):
            for _ in action[:-1]:
                told.append(_draw(logits))
                logits = self._pass(told[-1], place, cache)
                place += 1
            told.append(_draw(logits))
            masks += [1] * len(action) + [0] * len(shown)
            if shown:  # the action's last token is computed along with what follows it
                told.append(torch.tensor([shown] * len(prompts), device=device))
                logits = self._pass(torch.cat(told[-2:], 1), place, cache)
                place += 1 + len(shown)
        completions = torch.cat(told, 1).tolist()  # (B, T)
        return Tokens(prompts.tolist(), completions, [masks] * len(completions))

    def _pass(self, ids: torch.Tensor, place: int, cache: DynamicCache) -> torch.Tensor:
        """Compute `(B, q)` tokens at `place` and return the logits after the last, `(B, V)`."""
        positions = torch.arange(place, place + ids.shape[1], device=ids.device)
        output = self.model(
            input_ids=ids,
            position_ids=positions.expand(len(ids), -1),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1].float()


def _draw(logits: torch.Tensor) -> torch.Tensor:
    """Sample `(B, 1)` tokens from `(B, V)` logits, with their logprobs."""
    logprobs = torch.log_softmax(logits, -1)
    cdf = logprobs.exp().cumsum(-1)
    drawn = torch.rand(len(logits), 1, device=logits.device)
    tokens = torch.searchsorted(cdf, drawn).clamp(max=logits.shape[-1] - 1)
    logprobs.gather(-1, tokens).tolist()  # a rollout hands them on
    return tokens


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


def fastest(ways: Sequence[Theirs], expected: Tokens, script: Script) -> Theirs:
    """Check each of TRL's ways and return the best here, by the least disturbed run of each."""
    best: dict[str, float] = {}
    for way in ways:
        start = time.perf_counter()
        check_equal(expected, way.play(), script)
        best[way.name] = time.perf_counter() - start
    hopeful = [way for way in ways if best[way.name] <= HOPELESS * min(best.values())]
    for way in hopeful:
        if best[way.name] < TRIAL_SECONDS:
            best[way.name] = min(best[way.name], seconds(way.play), seconds(way.play))
    print("TRL's ways, one run with short waits:")
    for name, took in best.items():
        print(f"  {name:<44}{took:>8.2f} s")
    return min(hopeful, key=lambda way: best[way.name])
