"""Messages to tokens and back, for one tokenizer.

Sits between the rollout and the model: `Codec.prompt` opens an episode, `Codec.observation`
encodes what comes between two actions, `Codec.message` reads an action. What the policy emitted
is never decoded and encoded again: ids are concatenated, so sampled and trained tokens are the
same (TRL#5224 is what happens otherwise). The codec must not know environments, limits or masks.

Text from outside (questions, tool results) can name special tokens. `_fence` cuts such names
apart before the template is rendered, so no control id can come out of foreign text; the text
itself is unchanged, and text without such names is encoded exactly as the template would. Only
what an environment's author stands for (`Message.trusted`) is encoded like an action.
"""

from __future__ import annotations

import contextlib
import dataclasses
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from trl.chat_template_utils import get_training_chat_template, qwen2_5_chat_template

from agentr1.types import Message

BORROWED_TEMPLATES: dict[str, str] = {"smollm2": qwen2_5_chat_template}
"""Templates for families whose own has no tools, by a lower-case part of the model's name."""

_OWN_MARKUP = re.compile(r"</?(tool_call|think)>")
_MARKUP = re.compile(r"</?(tool_call|tool_response|think)>|<\|[^|]+\|>")
_PROBE_ANSWER = "agentr1 probe answer"
_PROBE = (Message("user", "agentr1 probe question"), Message("assistant", _PROBE_ANSWER))


class Codec:
    """Translate between messages and token ids of one tokenizer.

    Args:
        tokenizer: its chat template must keep earlier messages unchanged when later ones are
            appended, and must render `role="tool"` messages.
        tools: JSON schemas shown to the policy in the prompt.
        name: the model's name, for error messages and the table of borrowed templates.

    Raises:
        ValueError: the template rewrites history or cannot render tools, and neither TRL nor
            `BORROWED_TEMPLATES` has one for this model.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        tools: Sequence[Mapping[str, Any]] = (),
        name: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.name = name or str(tokenizer.name_or_path)
        self.tools = [dict(schema) for schema in tools]
        self._special_ids = frozenset(tokenizer.all_special_ids)
        self._fences = _control_pattern(tokenizer)
        self.template = self._working_template()
        self._opening = self._render(_PROBE)
        after_answer = self._opening.rpartition(_PROBE_ANSWER)[2]
        self.end_of_turn_ids = self._end_of_turn(after_answer)
        self._after_end = after_answer[len(self._text(self.end_of_turn_ids)) :]
        if self._text(self._encode(("a", "<", "b"))) != "a<b":
            raise ValueError(
                f"the tokenizer of {self.name!r} adds characters where encoded pieces meet, so an "
                "observation cannot be appended to sampled tokens; use a byte-level tokenizer"
            )

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids at which generation of a turn stops: the template's end of turn and the eos."""
        eos: Any = self.tokenizer.eos_token_id
        return frozenset({self.end_of_turn_ids[-1], eos})

    def prompt(
        self, messages: Sequence[Message], said: Sequence[tuple[Message, Sequence[int]]] = ()
    ) -> tuple[int, ...]:
        """Encode a whole conversation up to the policy's next action.

        Args:
            messages: anything an environment may open with or rewrite to.
            said: the policy's messages so far with their ids, in order. Where `messages` repeats
                one of them, its ids stand there as they were sampled; any other text is foreign,
                but for assistant messages marked `trusted`.
                Of equal messages the last are the policy's: an opening may hold the same words.

        Returns:
            Token ids that end with the template's generation prompt.
        """
        sampled = _as_sampled(messages, said) | self._trusted(messages)
        ids: tuple[int, ...] = ()
        foreign: list[Message] = []  # since the last action
        for i, message in enumerate(messages):
            if i in sampled:
                ids += self._before(foreign, ids) + sampled[i]
                foreign = []
            else:
                foreign.append(message)
        return ids + self._before(foreign, ids)

    def _trusted(self, messages: Sequence[Message]) -> dict[int, tuple[int, ...]]:
        """The ids of assistant messages that stand as if the policy had said them, by place."""
        return {
            i: self.action(m.content)
            for i, m in enumerate(messages)
            if m.trusted and m.role == "assistant" and i
        }

    def _before(self, foreign: Sequence[Message], context: Sequence[int]) -> tuple[int, ...]:
        """What stands before an action: an opening, or after `context` an observation."""
        if context:
            return self.observation(foreign, context)
        fenced, mark = self._fence(foreign)
        return self._encode(self._render(fenced, generation_prompt=True).split(mark))

    def observation(
        self, observation: Sequence[Message], action_ids: Sequence[int]
    ) -> tuple[int, ...]:
        """Encode what stands between an action and the next one.

        Args:
            observation: the environment's messages, in order.
            action_ids: the sampled ids, to see whether the policy ended its turn itself.

        Returns:
            Ids to concatenate after `action_ids`: the end of turn if the policy did not sample
            it, the messages, the next generation prompt.
        """
        fenced, mark = self._fence(observation)
        text = self._render((*_PROBE, *fenced), generation_prompt=True)
        if not text.startswith(self._opening):
            raise ValueError(
                f"the chat template of {self.name!r} changes earlier messages when it is shown "
                f"{observation!r}; use a template that only appends, for example Qwen2.5's"
            )
        suffix = self._after_end + text[len(self._opening) :]
        ended = bool(action_ids) and action_ids[-1] == self.end_of_turn_ids[-1]
        return (*(() if ended else self.end_of_turn_ids), *self._encode(suffix.split(mark)))

    def message(self, action_ids: Sequence[int], cut: bool = False) -> Message:
        """Decode an action to the assistant message an environment sees.

        Args:
            action_ids: the sampled ids.
            cut: the turn hit its cap before it ended. Otherwise a special token at its end is what
                ended it, be it the template's or another of the model's stop ids.
        """
        ended = not cut and action_ids and action_ids[-1] in self._special_ids
        text = self._text(action_ids[:-1] if ended else action_ids)
        return Message("assistant", text, cut=cut, length=len(action_ids) - bool(ended))

    def action(self, content: str) -> tuple[int, ...]:
        """Encode text that is to be the policy's own: control tokens are live here.

        Args:
            content: an assistant message's raw text, calls included, without its end of turn.
        """
        return (*self._encode((content,)), *self.end_of_turn_ids)

    def forged(self, content: str) -> list[str]:
        """Control tokens named in text that is to be the policy's own, but for calls and thoughts.

        `action` would make them live: a recorded text that holds one ends its turn, or begins
        another's.
        """
        return [name for name in self._fences.findall(content) if not _OWN_MARKUP.fullmatch(name)]

    def _working_template(self) -> str:
        """The first template that appends without rewriting: own, borrowed, TRL's training one."""
        own = self.tokenizer.chat_template
        candidates: list[str | None] = [own] if isinstance(own, str) else []
        lowered = self.name.lower()
        candidates += [text for part, text in BORROWED_TEMPLATES.items() if part in lowered]
        if candidates:
            with contextlib.suppress(ValueError):  # TRL has none for this family
                candidates.append(get_training_chat_template(self.tokenizer))
        for template in filter(None, candidates):
            if self._appends(template):
                return template
        raise ValueError(
            f"the chat template of {self.name!r} does not keep earlier messages unchanged when "
            f"{'tool' if self.tools else 'user'} messages are appended, and TRL ships no training "
            "template for it; set tokenizer.chat_template to one that does, for example "
            "trl.chat_template_utils.qwen2_5_chat_template, or use a Qwen2.5 or Qwen3 model"
        )

    def _appends(self, template: str) -> bool:
        """Whether appended messages leave what came before as it was, and are shown."""
        for role in ("tool", "user") if self.tools else ("user",):
            observation = Message(role, "agentr1 probe observation", name="probe")
            try:
                opening = self._render(_PROBE, template=template)
                whole = self._render((*_PROBE, observation), template=template)
            except (TemplateError, TypeError):
                return False
            if not whole.startswith(opening) or observation.content not in whole:
                return False
            if self.tools and self.tools[0]["function"]["name"] not in opening:
                return False
        return True

    def _end_of_turn(self, after_answer: str) -> tuple[int, ...]:
        ids = self._encode((after_answer,))
        first = next((i for i, token in enumerate(ids) if token in self._special_ids), None)
        if first is None:
            raise ValueError(
                f"the chat template of {self.name!r} ends an assistant turn with "
                f"{after_answer!r}, which holds no special token, so the end of a turn cannot be "
                "recognised; use a template that ends turns with a special token"
            )
        return ids[: first + 1]

    def _render(
        self,
        messages: Sequence[Message],
        generation_prompt: bool = False,
        template: str | None = None,
    ) -> str:
        tools: Any = self.tools or None  # the stubs want a list of another type
        rendered = self.tokenizer.apply_chat_template(
            [_as_dict(message) for message in messages],
            tools=tools,
            chat_template=template or self.template,
            add_generation_prompt=generation_prompt,
            tokenize=False,
        )
        return str(rendered)

    def _fence(self, messages: Sequence[Message]) -> tuple[list[Message], str]:
        """Put a mark around every character of each control token's name in the messages."""
        texts = [self._opening, *(text for m in messages for text in (m.content, m.name or ""))]
        private_use = map(chr, range(0xE000, 0xF8FF))
        mark = next(c for c in private_use if not any(c in text for text in texts))

        def fence(text: str) -> str:
            return self._fences.sub(lambda hit: mark + mark.join(hit[0]) + mark, text)

        # The name too: some templates show it, and the policy writes it.
        fenced = [
            dataclasses.replace(m, content=fence(m.content), name=m.name and fence(m.name))
            for m in messages
        ]
        return fenced, mark

    def _encode(self, pieces: Sequence[str]) -> tuple[int, ...]:
        encoded = self.tokenizer(list(pieces), add_special_tokens=False)["input_ids"]
        return tuple(token for piece in encoded for token in piece)

    def _text(self, ids: Sequence[int]) -> str:
        return str(
            self.tokenizer.decode(
                list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )


def _as_sampled(
    messages: Sequence[Message], said: Sequence[tuple[Message, Sequence[int]]]
) -> dict[int, tuple[int, ...]]:
    """The ids of those messages that the policy said, by place; never the first one."""
    waiting: defaultdict[Message, list[Sequence[int]]] = defaultdict(list)
    for message, action_ids in said:
        waiting[message].append(action_ids)
    places = [i for i in range(len(messages) - 1, 0, -1) if messages[i].role == "assistant"]
    return {i: tuple(waiting[messages[i]].pop()) for i in places if waiting[messages[i]]}


def _as_dict(message: Message) -> dict[str, Any]:
    shown = {"role": message.role, "content": message.content}
    return shown | ({"name": message.name} if message.name else {})


def _control_pattern(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Match the names of all tokens that steer a conversation: special ones and call markup."""
    added = tokenizer.added_tokens_decoder.values()
    names = {str(t.content) for t in added if t.special or _MARKUP.fullmatch(t.content)}
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")
