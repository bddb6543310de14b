"""The environment's side of the decision process.

An environment knows messages and never tokens. It is made for one episode: `reset` once, `step`
after every assistant message until it ends, `close` in any case. The rollout is its only caller.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

from agentr1.types import Message, Row, StepResult


class Env(ABC):
    """One episode. Write one by filling in `reset` and `step`."""

    @property
    def tool_schemas(self) -> Sequence[dict[str, Any]]:
        """JSON schemas of the tools the policy is told about; none unless overridden."""
        return ()

    @abstractmethod
    async def reset(self, row: Row) -> Sequence[Message]:
        """Begin the episode of a dataset row.

        Returns:
            The messages the policy sees first; the last one must not be the assistant's.
        """

    @abstractmethod
    async def step(self, message: Message) -> StepResult:
        """Answer one assistant message.

        Args:
            message: raw text of the policy's turn; `message.cut` tells a turn that hit its cap.

        Returns:
            Observation, process reward, and whether the episode ended. An exception raised here
            is taken for a bug and stops the run; a failing service is `StepResult.fault`.
        """

    async def close(self) -> None:  # noqa: B027 (most environments hold nothing)
        """Release what the episode holds; called once, also after a failure."""


EnvFactory = Callable[[], Env]
"""Called once per episode; share what is expensive (an index, a tool runner) in its closure."""
