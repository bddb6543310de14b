"""What the tests play episodes with: a scripted policy, two tools and a small game.

None of them stands in for code of the package; they are what a user would bring.
"""

from __future__ import annotations

import asyncio
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from agentr1.engines.base import Engine, Generation, Sampling
from agentr1.envs.base import Env
from agentr1.types import Message, Row, StepResult


class ScriptedPolicy(Engine):
    """Says what it is told to, one text per turn, cut where `max_tokens` cuts it.

    `scripts` maps a text that the episode's prompt contains (its question; "" fits any) to the
    policy's turns. Each key is one episode. What was sampled is kept in `sampled`, by key; no two
    logprobs are equal, so a shifted one is seen.
    """

    def __init__(self, codec: Any, scripts: Mapping[str, Sequence[str]]) -> None:
        self.codec = codec
        self.scripts = scripts
        self.sampled: dict[str, list[Generation]] = defaultdict(list)
        self._drawn = 0

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Generation:
        key = self._key(self.codec.tokenizer.decode(list(prompt_ids)))
        step = len(self.sampled[key])
        assert step < len(self.scripts[key]), f"episode {key!r} has no text for turn {step}"
        said = self.codec.action(self.scripts[key][step])
        ids = said[: sampling.max_tokens]
        logprobs = tuple(-(self._drawn + i) / 1000 for i in range(1, len(ids) + 1))
        self._drawn += len(ids)
        reason = "stop" if len(ids) == len(said) else "length"
        self.sampled[key].append(Generation(ids, logprobs, reason))
        await asyncio.sleep(0)  # other episodes come between, as in a real engine
        return self.sampled[key][step]

    def sync(self, model: Any) -> None:
        raise AssertionError("a scripted policy has no weights")

    def _key(self, prompt: str) -> str:
        found = {key: prompt.find(key) for key in self.scripts if key in prompt}
        assert found, f"no script for the prompt {prompt!r}"
        return min(found, key=lambda key: (found[key], -len(key)))


class CountingTool:
    """Answers every call with `answer`, or raises it, and keeps the calls."""

    description = "Look something up."
    parameters = {"type": "object", "properties": {"key": {"type": "string"}}, "required": ["key"]}

    def __init__(self, answer: Any = "found", name: str = "lookup") -> None:
        self.name = name
        self.answer = answer
        self.calls: list[str] = []

    async def __call__(self, key: str) -> Any:
        self.calls.append(key)
        if isinstance(self.answer, BaseException):
            raise self.answer
        return self.answer


class SlowTool(CountingTool):
    """Nobody leaves before `together` calls are inside; then the last to enter leaves first.

    With fewer calls at once it hangs, so a test needs no clock: it finishes or it fails.
    """

    def __init__(self, together: int, name: str = "lookup") -> None:
        super().__init__(name=name)
        self.inside = self.most_inside = 0
        self.left: list[str] = []
        self._doors = [asyncio.Event() for _ in range(together + 1)]  # [k] lets the k-th leave

    async def __call__(self, key: str) -> str:
        self.calls.append(key)
        self.inside += 1
        place = len(self.calls)
        self.most_inside = max(self.most_inside, self.inside)
        if place == len(self._doors) - 1:
            self._doors[place].set()
        await self._doors[place].wait()
        self._doors[place - 1].set()
        self.inside -= 1
        self.left.append(key)
        return f"answer to {key}"


class GuessEnv(Env):
    """Guess the row's `secret` from 0 to 9: "higher" or "lower" until it is found.

    A guess inside what is still possible pays 0.1, the right one 1.
    """

    async def reset(self, row: Row) -> Sequence[Message]:
        self.secret, self.low, self.high = int(row["secret"]), 0, 9
        return [Message("user", f"{row.get('question', '')}Guess a number from 0 to 9.")]

    async def step(self, message: Message) -> StepResult:
        digit = re.search(r"\d", message.content)
        if message.cut or digit is None:
            return StepResult((Message("user", "Say one number."),))
        guess = int(digit[0])
        if guess == self.secret:
            return StepResult(reward=1.0, terminated=True)
        narrows = self.low <= guess <= self.high
        hint = "higher" if guess < self.secret else "lower"
        self.low = max(self.low, guess + 1) if hint == "higher" else self.low
        self.high = min(self.high, guess - 1) if hint == "lower" else self.high
        return StepResult((Message("user", hint),), reward=0.1 if narrows else 0.0)
