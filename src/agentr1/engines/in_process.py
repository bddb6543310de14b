"""Sampling from the very model object that is being trained, one slot per episode.

Requests join and leave between any two decoding steps, so an episode that waits for a tool holds
up nobody. When its next prompt extends what its slot already holds, only the new tokens are
computed. Equal prompts that arrive together (a group's) are computed once, and so is the stem that
different prompts begin with (system prompt and tools). Called by the rollout inside one event loop;
between two steps it yields, so finished tools are seen at once.

Active slots occupy the first rows, idle ones (kept for a next turn) the rows after them.
"""

from __future__ import annotations

import asyncio
import dataclasses
import os
import random
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from agentr1.engines.base import Engine, Generation, Sampling
from agentr1.engines.slots import SlotCache

ADMIT_EVERY = 4
"""Decoding steps between two admissions: a prefill costs about a step, so newcomers share one."""
SETTLE_SECONDS = 0.001
"""Without a newcomer for so long, those who wait are admitted."""
PREFILL_TOKENS = 8192
"""Most tokens of one prefill pass, padding included; bounds its activations."""
SHORTEST_STEM = 16
"""Shared tokens below this do not pay for the pass of their own that computes them."""


@dataclasses.dataclass(eq=False, slots=True)
class _Request:
    prompt_ids: tuple[int, ...]
    sampling: Sampling
    future: asyncio.Future[Generation]
    draws: random.Random
    ids: list[int] = dataclasses.field(default_factory=list)
    logprobs: list[float] = dataclasses.field(default_factory=list)


@dataclasses.dataclass(eq=False, slots=True)
class _Slot:
    """`held` are the ids whose keys and values the row stores; `request` is None when idle.

    `retired` counts up from row to row that became idle: the lowest is the longest unused.
    """

    held: list[int]
    request: _Request | None = None
    retired: int = 0


@dataclasses.dataclass(frozen=True, slots=True)
class _Stem:
    """What the prompts of an admission begin with, and its keys and values."""

    ids: tuple[int, ...] = ()
    content: Any = None

    def begins(self, prompt_ids: tuple[int, ...]) -> bool:
        """Whether a prompt goes on from here; its last token must be left to give logits."""
        length = len(self.ids)
        return 0 < length < len(prompt_ids) and prompt_ids[:length] == self.ids


class InProcessEngine(Engine):
    """Batched decoding over a growing slot cache.

    Args:
        model: a causal language model with full attention in every layer, run by "sdpa" or
            "eager" attention. Its train/eval mode is the caller's business.
        stop_ids: ids that end an action.
        max_slots: most episodes decoded or kept at once; more wait their turn.

    Raises:
        ValueError: the model's attention cannot be run with a ready-made mask.
    """

    samples_from_model = True

    def __init__(self, model: Any, stop_ids: Sequence[int], max_slots: int = 256) -> None:
        self._stop_ids = frozenset(stop_ids)
        self._max_slots = max_slots
        self._waiting: list[_Request] = []
        self._slots = []
        self._pump: asyncio.Task[None] | None = None
        self.sync(model)

    def sync(self, model: Any) -> None:
        """Sample from `model` from now on; every cached prefix of the old weights is dropped."""
        _check_attention(model)
        if any(self._unanswered()):
            raise RuntimeError(
                "sync was called while actions were being sampled, which would mix two policies in "
                "one action; wait for the rollout to end"
            )
        self._model = model
        self.release()

    def release(self) -> None:
        """Drop the cache."""
        self._slots: list[_Slot] = []
        self._active = self._retired = 0
        self._stem = _Stem()
        self._cache = SlotCache(self._model.config.get_text_config().num_hidden_layers)

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Generation:
        """Sample one action; see `Engine.generate`."""
        loop = asyncio.get_running_loop()
        request = _Request(
            tuple(prompt_ids), sampling, loop.create_future(), random.Random(sampling.seed)
        )
        self._waiting.append(request)
        if self._pump is None or self._pump.done():
            self._pump = loop.create_task(self._run())
        return await request.future

    async def _run(self) -> None:
        steps = 0
        try:
            while self._waiting or self._active:
                if self._active:
                    await asyncio.sleep(0)
                else:
                    await self._let_them_come()
                if steps % ADMIT_EVERY == 0 or not self._active:
                    self._admit()
                if self._active:
                    self._decode()
                steps += 1
        except Exception as error:
            for request in self._unanswered():
                request.future.set_exception(error)
            self._waiting.clear()
            self.sync(self._model)

    async def _let_them_come(self) -> None:
        """While nothing is decoded, wait for those who come right behind the first.

        Tools that take equally long end within a few milliseconds of each other. Episodes that
        start together stay together, and each group of stragglers costs passes of its own.
        """
        came = 0
        while len(self._waiting) > came:
            came = len(self._waiting)
            await asyncio.sleep(SETTLE_SECONDS)

    def _unanswered(self) -> Iterator[_Request]:
        pending = [slot.request for slot in self._slots if slot.request] + self._waiting
        return (request for request in pending if not request.future.done())

    def _admit(self) -> None:
        """Give waiting requests a slot each and compute what their slots do not hold yet."""
        self._waiting = [r for r in self._waiting if not r.future.cancelled()]
        room = self._max_slots - self._active
        batch = self._waiting[:room]
        leaders: dict[tuple[int, ...], int] = {}
        followers: list[tuple[int, int]] = []
        first = self._active
        # Those that go on first: they must find their slots before others take them.
        found = [self._resume(request) for request in batch]
        self._activate([row for row in found if row is not None])
        fresh = [request for request, row in zip(batch, found, strict=True) if row is None]
        for request in fresh:
            row = self._claim(request)
            if request.prompt_ids in leaders:
                followers.append((leaders[request.prompt_ids], row))
            else:
                leaders[request.prompt_ids] = row
        self._waiting = self._waiting[room:]  # once each has a slot: an error reaches all
        follower_rows = {row for _, row in followers}
        rows = [row for row in range(first, self._active) if row not in follower_rows]
        self._begin_with_stem([row for row in rows if not self._slots[row].held])
        logits = dict(self._prefill(rows))
        for leader, row in followers:
            held = self._slots[leader].held
            self._cache.copy_row(leader, row, len(held))
            self._slots[row].held = list(held)
            logits[row] = logits[leader]
        if logits:
            order = sorted(logits)
            self._append(order, torch.stack([logits[row] for row in order]))

    def _resume(self, request: _Request) -> int | None:
        """Reuse the idle slot that holds the longest prefix of the prompt, if there is one."""
        prompt = request.prompt_ids
        best, best_length = None, 0
        for row in range(self._active, len(self._slots)):
            slot, length = self._slots[row], len(self._slots[row].held)
            if slot.request is not None or not best_length < length < len(prompt):
                continue
            if slot.held[-1] == prompt[length - 1] and tuple(slot.held) == prompt[:length]:
                best, best_length = row, length
        if best is not None:
            self._slots[best].request = request
        return best

    def _begin_with_stem(self, rows: Sequence[int]) -> None:
        """Fill fresh rows with the tokens their prompts share, computed once."""
        prompts = {row: self._prompt(row) for row in rows}
        strangers = [row for row in rows if not self._stem.begins(prompts[row])]
        if len(strangers) > 1:
            # A prompt's last token stays out: it has to give logits of its own.
            ids = tuple(os.path.commonprefix([prompts[row][:-1] for row in strangers]))
            if len(ids) >= SHORTEST_STEM:
                self._forward(strangers[0], [list(ids)], [list(range(len(ids)))])
                self._stem = _Stem(ids, self._cache.read_row(strangers[0], len(ids)))
        for row in rows:
            if self._stem.begins(prompts[row]):
                self._cache.plan.reserve(len(self._slots), len(self._stem.ids))
                self._cache.write_row(row, self._stem.content)
                self._slots[row].held = list(self._stem.ids)

    def _claim(self, request: _Request) -> int:
        """Take a new row, or the one that has been idle for the longest."""
        if len(self._slots) < self._max_slots:
            self._slots.append(_Slot([]))
            self._cache.plan.reserve(len(self._slots), 0)
            row = len(self._slots) - 1
        else:
            idle = range(self._active, len(self._slots))
            row = min(idle, key=lambda row: self._slots[row].retired)
        self._slots[row].held, self._slots[row].request = [], request
        self._activate([row])
        return self._active - 1

    def _activate(self, rows: Sequence[int]) -> None:
        """Make idle rows active; only those that do not stand at the border are moved."""
        border = range(self._active, self._active + len(rows))
        strays = [row for row in rows if row not in border]
        gaps = [row for row in border if row not in rows]
        for stray, gap in zip(strays, gaps, strict=True):
            self._swap(stray, gap)
        self._active += len(rows)

    def _swap(self, a: int, b: int) -> None:
        if a != b:
            length = max(len(self._slots[a].held), len(self._slots[b].held))
            self._cache.swap_rows(a, b, length)
            self._slots[a], self._slots[b] = self._slots[b], self._slots[a]

    def _prefill(self, rows: Sequence[int]) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield each row with the logits after its prompt; rows of one pass are neighbours."""
        for chunk in _neighbours(rows, [self._missing(row) for row in rows]):
            new = [self._prompt(row) for row in chunk]
            starts = [len(self._slots[row].held) for row in chunk]
            width = max(len(ids) - start for ids, start in zip(new, starts, strict=True))
            tokens, positions = [], []
            for ids, start in zip(new, starts, strict=True):
                padding = width - (len(ids) - start)
                tokens.append([0] * padding + list(ids[start:]))
                positions.append([-1] * padding + list(range(start, len(ids))))
            logits = self._forward(chunk[0], tokens, positions)
            for row, ids, row_logits in zip(chunk, new, logits, strict=True):
                self._slots[row].held = list(ids)
                yield row, row_logits

    def _prompt(self, row: int) -> tuple[int, ...]:
        request = self._slots[row].request
        assert request is not None  # only active rows are prefilled
        return request.prompt_ids

    def _missing(self, row: int) -> int:
        return len(self._prompt(row)) - len(self._slots[row].held)

    def _decode(self) -> None:
        """Write every active row's last sampled id and sample the next."""
        tokens, positions = [], []
        for slot in self._slots[: self._active]:
            assert slot.request is not None  # active rows have a request
            tokens.append([slot.request.ids[-1]])
            positions.append([len(slot.held)])
            slot.held.append(slot.request.ids[-1])
        logits = self._forward(0, tokens, positions)
        self._append(range(self._active), logits)

    @torch.no_grad()
    def _forward(
        self, first_row: int, tokens: list[list[int]], positions: list[list[int]]
    ) -> torch.Tensor:
        """Run the model on `(n, q)` tokens and return the last column's logits `(n, V)`."""
        device = self._model.device
        columns = 1 + max(row[-1] for row in positions)
        self._cache.plan.reserve(first_row + len(tokens), columns)
        shown, mask = self._cache.plan.aim(first_row, torch.tensor(positions, device=device))
        if self._model.config.get_text_config()._attn_implementation == "eager":
            lowest = torch.finfo(self._model.dtype).min
            mask = torch.where(mask, 0.0, lowest).to(self._model.dtype)
        output = self._model(
            input_ids=torch.tensor(tokens, device=device),
            position_ids=shown,
            attention_mask=mask,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1].float()

    def _append(self, rows: Sequence[int], logits: torch.Tensor) -> None:
        """Sample one id for each row, then retire the rows that are done."""
        requests = [self._slots[row].request for row in rows]
        ids, logprobs = _sample(logits, [r for r in requests if r is not None])
        done = []
        for row, request, token, logprob in zip(rows, requests, ids, logprobs, strict=True):
            assert request is not None
            request.ids.append(token)
            request.logprobs.append(logprob)
            stopped = token in self._stop_ids
            if stopped or len(request.ids) >= request.sampling.max_tokens:
                reason = "stop" if stopped else "length"
                if not request.future.done():
                    request.future.set_result(
                        Generation(tuple(request.ids), tuple(request.logprobs), reason)
                    )
            if request.future.done():  # answered, or its episode was cancelled
                done.append(row)
        for row in sorted(done, reverse=True):
            self._retire(row)

    def _retire(self, row: int) -> None:
        """Keep the row as the newest idle one: its episode may come back."""
        self._slots[row].request = None
        self._retired += 1
        self._slots[row].retired = self._retired
        self._active -= 1
        self._swap(row, self._active)


def _sample(logits: torch.Tensor, requests: Sequence[_Request]) -> tuple[list[int], list[float]]:
    """Draw by inverse CDF, `(n, V)` logits to n ids with their logprobs.

    One uniform number per row from the request's own generator: no draw depends on the batch,
    and a row costs one cumulative sum instead of a multinomial over the vocabulary.
    """
    temperatures = [r.sampling.temperature for r in requests]
    scale = torch.tensor([t or 1.0 for t in temperatures], device=logits.device)
    logprobs = torch.log_softmax(logits / scale[:, None], dim=-1)  # (n, V)
    cdf = logprobs.exp().cumsum(-1)  # (n, V)
    # 1 - u lies in (0, 1]: a target of exactly 0 would pick an id of probability 0.
    u = torch.tensor([1.0 - r.draws.random() for r in requests], device=logits.device)
    drawn = torch.searchsorted(cdf, (u.to(cdf.dtype) * cdf[:, -1])[:, None])[:, 0]
    greedy = torch.tensor([t == 0 for t in temperatures], device=logits.device)
    chosen = torch.where(greedy, logits.argmax(-1), drawn.clamp(max=logits.shape[-1] - 1))
    picked = logprobs.gather(-1, chosen[:, None])[:, 0]
    return chosen.tolist(), picked.tolist()


def _neighbours(rows: Sequence[int], lengths: Sequence[int]) -> Iterator[list[int]]:
    """Cut ascending rows into runs without gaps whose padded size fits one prefill pass."""
    chunk: list[int] = []
    widest = 0
    for row, length in zip(rows, lengths, strict=True):
        widest = max(widest, length)
        full = (len(chunk) + 1) * widest > PREFILL_TOKENS
        if chunk and (row != chunk[-1] + 1 or full):
            yield chunk
            chunk, widest = [], length
        chunk.append(row)
    if chunk:
        yield chunk


def _check_attention(model: Any) -> None:
    config = model.config.get_text_config()
    # Families without layer types say by `sliding_window` alone that every layer has one.
    window = "sliding_attention" if getattr(config, "sliding_window", None) else "full_attention"
    kinds = set(getattr(config, "layer_types", None) or [window])
    if kinds != {"full_attention"} or config._attn_implementation not in ("sdpa", "eager"):
        raise ValueError(
            "the in-process engine needs full attention in every layer and attn_implementation "
            f"'sdpa' or 'eager', got layers {sorted(kinds)} and "
            f"{config._attn_implementation!r}; load the model with attn_implementation='sdpa', or "
            "choose a model without sliding windows"
        )
