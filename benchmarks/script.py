"""Scripted episodes: what is said in them is fixed, what it costs is not.

A policy with forced logits does its full compute and then says what the script says. Two rollouts
given the same script therefore do the same work, which can be checked token by token.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import os
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from agentr1.codec import Codec
from agentr1.types import Message, Row


@dataclasses.dataclass(frozen=True)
class Script:
    """Episodes whose prompts have one length, so that the position alone tells what is said.

    Attributes:
        rows: one per rollout.
        system_prompt: opens each of them.
        action_ids: what the policy says, turn by turn; the last is the answer.
        observation_ids: what comes back from each action but the last.
        prompt_ids: of each row.
        group: so many neighbouring rows are one row of the dataset.
    """

    rows: list[Row]
    system_prompt: str
    action_ids: list[tuple[int, ...]]
    observation_ids: list[tuple[int, ...]]
    prompt_ids: list[tuple[int, ...]]
    group: int = 1

    @property
    def prompt_length(self) -> int:
        """Tokens of every prompt."""
        return len(self.prompt_ids[0])

    @property
    def stem(self) -> int:
        """Tokens that all prompts begin with (system prompt and tools), less than a whole one."""
        return len(os.path.commonprefix([ids[:-1] for ids in self.prompt_ids]))

    @property
    def policy_ids(self) -> list[int]:
        """What the policy says in one episode."""
        return [token for action in self.action_ids for token in action]

    @property
    def completion_ids(self) -> list[int]:
        """Everything after the prompt, observations included."""
        pairs = zip(self.action_ids, [*self.observation_ids, ()], strict=True)
        return [token for pair in pairs for part in pair for token in part]

    def opening(self, row: Row) -> list[Message]:
        """The messages a row's episode begins with."""
        return [Message("system", self.system_prompt), Message("user", row["question"])]


def write_script(
    codec: Codec,
    rows: Sequence[Row],
    *,
    system_prompt: str,
    rollouts: int,
    group: int,
    turns: int,
    queries: Sequence[str],
    found: str,
    answer: str,
    thought: str = "",
) -> Script:
    """Choose rows and say what happens in them.

    Args:
        codec: shows the policy one tool, `search(query)`.
        rows: the first of one prompt length are taken.
        system_prompt: opens the episodes.
        rollouts: how many.
        group: rollouts of one row.
        turns: how many turns call the tool, before the one that answers.
        queries: one per call of a turn.
        found: what every call returns.
        answer: the last turn's text.
        thought: what the policy says before it calls.
    """
    if rollouts % group:
        raise ValueError(f"{rollouts} rollouts are no whole groups of {group}; change one of them")
    script = Script([], system_prompt, [], [], [], group)
    of_length: dict[int, list[tuple[Row, tuple[int, ...]]]] = defaultdict(list)
    for row in rows:
        prompt = codec.prompt(script.opening(row))
        of_length[len(prompt)].append((row, prompt))
        if len(of_length[len(prompt)]) == rollouts // group:
            break
    else:
        raise ValueError(
            f"{len(rows)} rows hold no {rollouts // group} prompts of one length; ask for fewer "
            "rollouts"
        )
    chosen = [pair for pair in of_length[len(prompt)] for _ in range(group)]
    calls = [json.dumps({"name": "search", "arguments": {"query": query}}) for query in queries]
    markup = "\n".join(f"<tool_call>\n{call}\n</tool_call>" for call in calls)
    action = codec.action(f"{thought}\n{markup}" if thought else markup)
    results = [Message("tool", found, name="search")] * len(calls)
    return dataclasses.replace(
        script,
        rows=[row for row, _ in chosen],
        prompt_ids=[prompt for _, prompt in chosen],
        action_ids=[action] * turns + [codec.action(answer)],
        observation_ids=[codec.observation(results, action)] * turns,
    )


def forced(model: PreTrainedModel, script: Script) -> PreTrainedModel:
    """A copy of the model that follows the script, whoever calls it and however batched.

    Each forward pass is computed in full; then, at every position, the script's next token gets a
    logit far above the others, so that sampling has its usual cost and one outcome. A training
    step, which has no logits, is left as it is.
    """
    model = copy.deepcopy(model)
    spoken = torch.tensor(script.completion_ids, device=model.device)
    before = script.prompt_length - 1  # the position that foretells the completion's first token

    def overrule(module: Any, arguments: Any, keywords: dict[str, Any], output: Any) -> None:
        if keywords.get("fused_lm_head"):  # TRL's way to score tokens: no logits, no sampling
            return
        kept = keywords.get("logits_to_keep", 0)
        columns = kept if isinstance(kept, torch.Tensor) else slice(-kept, None)
        positions = keywords["position_ids"][:, columns]  # (B, k)
        following = spoken[(positions - before).clamp(0, len(spoken) - 1)]  # (B, k)
        output.logits.scatter_(-1, following[..., None], 1e4)  # (B, k, V)

    model.register_forward_hook(overrule, with_kwargs=True)
    return model
