"""What a rollout asks of an inference engine: one action for one prompt, many at once.

An engine knows token ids and sampling, nothing of messages, tools or rewards. Requests of many
episodes are in flight at the same time and none waits for another's tools. No collective
operation may run inside `generate`: ranks meet before the first turn and after the last.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal


@dataclasses.dataclass(frozen=True, slots=True)
class Sampling:
    """How to draw the tokens of one action.

    Attributes:
        max_tokens: at most so many ids, the end of turn included; at least 1.
        temperature: 0 is greedy. Logprobs are those of softmax(logits / temperature), the
            distribution that is sampled from and trained; of softmax(logits) where greedy.
        seed: of this request alone, so that other requests cannot change its draws.
        episode: equal for all turns of one episode, different between episodes that run at the
            same time; an engine of several servers sends them where their prefix is cached.
    """

    max_tokens: int
    temperature: float = 1.0
    seed: int = 0
    episode: int = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1 or self.temperature < 0:
            raise ValueError(
                "sampling needs max_tokens >= 1 and temperature >= 0, got "
                f"max_tokens={self.max_tokens}, temperature={self.temperature}"
            )


@dataclasses.dataclass(frozen=True, slots=True)
class Generation:
    """One sampled action.

    Attributes:
        ids: sampled token ids, the stop id included where one came; never empty.
        logprobs: one for each id.
        finish_reason: "stop" if a stop id ended it, "length" if `max_tokens` did.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: Literal["stop", "length"]


class Engine(ABC):
    """An inference backend.

    Attributes:
        samples_from_model: `generate` runs the very model given to `sync`, whose parameters must
            then stay whole until `release`; otherwise it has a copy of its own elsewhere.
    """

    samples_from_model: bool = False

    @abstractmethod
    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Generation:
        """Sample one action after `prompt_ids`; many calls may be in flight at once."""

    @abstractmethod
    def sync(self, model: Any) -> None:
        """Make the weights of `model` live and drop everything cached under the old ones.

        Called on every process, between rollouts, with whole parameters.
        """

    def release(self) -> None:  # noqa: B027 (an engine elsewhere takes no memory from training)
        """Free what only a rollout needs, so that the update has the memory."""

    def close(self) -> None:  # noqa: B027 (an engine without resources has nothing to close)
        """Release what the engine holds."""
