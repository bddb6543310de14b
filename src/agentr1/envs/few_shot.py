"""Examples before the question: a wrapper for any environment.

Layer 2. The baseline that shows an untrained policy how other rows were solved. Knows messages,
and no files of demonstrations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from agentr1.envs.base import Env
from agentr1.types import Message, Row, StepResult


class FewShot(Env):
    """An episode that opens with worked examples.

    Args:
        env: the environment itself, for the same one episode.
        messages: question, calls, results and answer of each example, as they stand in a
            conversation: calls as `<tool_call>` in the assistant's text. They come after the
            environment's system prompt and before its question. What the assistant says there is
            trusted: its calls are encoded as the policy's own would be.
    """

    def __init__(self, env: Env, messages: Sequence[Message]) -> None:
        roles = [message.role for message in messages]
        if "system" in roles or (roles and (roles[0], roles[-1]) != ("user", "assistant")):
            raise ValueError(
                "examples must begin with a user message, end with an assistant's and hold no "
                f"system prompt, got roles {roles}; leave out what is before the question"
            )
        self.env = env
        self.messages = tuple(
            dataclasses.replace(m, trusted=True) if m.role == "assistant" else m for m in messages
        )

    @property
    def tool_schemas(self) -> Sequence[dict[str, Any]]:
        """Those of the environment itself."""
        return self.env.tool_schemas

    async def reset(self, row: Row) -> Sequence[Message]:
        """Open as the environment does, with the examples after its system prompt."""
        opening = list(await self.env.reset(row))
        place = next((i for i, m in enumerate(opening) if m.role != "system"), len(opening))
        return [*opening[:place], *self.messages, *opening[place:]]

    async def step(self, message: Message) -> StepResult:
        """Step the environment itself."""
        return await self.env.step(message)

    async def close(self) -> None:
        """Close the environment itself."""
        await self.env.close()
