"""Ending an episode by a call that gives the answer.

Layer 1. Named in a recipe's `tools` and as its `finish_tool: answer`. That a successful call ends
the episode is the environment's doing; `parsing.answer_text` reads the answer from the call.
"""

from __future__ import annotations

from agentr1.parsing import ANSWER_CALL
from agentr1.tools.base import ToolError, tool


@tool(name=ANSWER_CALL)
async def answer(text: str) -> str:
    """Give the final answer and finish.

    Args:
        text: The answer alone: a name, a number, a date, yes or no.
    """
    # Not a plain function: it takes no time, less than a thread would cost.
    if not text.strip():
        raise ToolError("the answer is empty, expected a name, a number, a date, yes or no")
    return text.strip()
