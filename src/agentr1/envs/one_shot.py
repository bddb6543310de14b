"""Questions answered in one turn, without tools: what searching again is to be compared with.

Layer 2. Two baselines of multi-hop question answering. Their episodes end after the first turn, and
their answers are read like those of a policy that searches: `<answer>...</answer>`, or else all
that was said.
"""

from __future__ import annotations

from collections.abc import Sequence

from agentr1.envs.base import Env
from agentr1.retrieval.base import Retriever
from agentr1.retrieval.limits import LONGEST_QUERY
from agentr1.rewards import passages_in, titles_shown
from agentr1.tools.search import Search
from agentr1.types import Message, Row, StepResult

ANSWER_ALONE = "Reply with <answer>the answer alone</answer>: a name, a number, a date, yes or no."
"""Also said again behind the passages: a small model has forgotten it by then."""
CLOSED_BOOK = f"Answer the question. {ANSWER_ALONE}"
NAIVE_RAG = f"Answer the question with the help of the passages above it. {ANSWER_ALONE}"


class ClosedBookEnv(Env):
    """The question, and one answer from what the policy knows.

    Args:
        system_prompt: instructions; None for the default, "" for none at all.
    """

    def __init__(self, system_prompt: str | None = None) -> None:
        self.system_prompt = CLOSED_BOOK if system_prompt is None else system_prompt
        self._numbers = {"passages": 0.0, "gold_found": 0.0}

    async def reset(self, row: Row) -> Sequence[Message]:
        """Open with the instructions and the row's question."""
        return self._opening(_question(row))

    async def step(self, message: Message) -> StepResult:
        """End the episode; a turn that was cut at its limit is no answer."""
        info = {**self._numbers, "cut": float(message.cut)}
        return StepResult(terminated=not message.cut, truncated=message.cut, info=info)

    def _opening(self, text: str) -> list[Message]:
        system = [Message("system", self.system_prompt)] if self.system_prompt else []
        return [*system, Message("user", text)]


class NaiveRagEnv(ClosedBookEnv):
    """One retrieval with the question itself, and one answer.

    `info` has `passages`, how many were shown, and `gold_found`, the share of the row's supporting
    titles among them. A retriever that fails fails the episode: an answer without its passages
    would be another baseline's.

    Args:
        retriever: finds the passages.
        k: how many at most; for a fair comparison as many as the searches of an episode may show.
        system_prompt: as in `ClosedBookEnv`.
        passage_chars: as the policy's search tool has it.
    """

    def __init__(
        self,
        retriever: Retriever,
        k: int,
        system_prompt: str | None = None,
        passage_chars: int | None = None,
    ) -> None:
        super().__init__(NAIVE_RAG if system_prompt is None else system_prompt)
        self._again = f" {ANSWER_ALONE}" if system_prompt is None else ""
        self._search = Search(retriever, k, passage_chars)

    async def reset(self, row: Row) -> Sequence[Message]:
        """Open with the instructions, the passages as the search tool shows them, the question."""
        question = _question(row)
        found = await self._search(query=question[:LONGEST_QUERY])
        titles = set(row.get("supporting_titles") or ())
        gold = titles_shown(titles, found)
        self._numbers = {
            "passages": float(len(passages_in(found))),
            "gold_found": len(gold) / len(titles) if titles else 0.0,
        }
        return self._opening(f"{found}\n\n{question}{self._again}")


def _question(row: Row) -> str:
    if "question" in row:
        return str(row["question"])
    raise ValueError(
        f"row {row.get('id')!r} has columns {sorted(row)}, expected 'question' (text); add it, or "
        "leave this baseline out"
    )
