"""The data model of one episode: messages, turns, trajectories, segments.

Layer 0: everything else imports from here, this module imports nothing of the package.
Environments speak in `Message`s and never see tokens; the rollout writes `Turn`s; the trainer
only ever sees the four equal lists of a `Segment`. Every record is a frozen dataclass: an
episode is written once and explained many times (loss, metrics, files, reports).
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from typing import Any, Literal

Row = Mapping[str, Any]
"""One dataset example. `prompt` and `answer` are customary, further columns are free."""

Role = Literal["system", "user", "assistant", "tool"]


class StopReason(enum.StrEnum):
    """Why a trajectory ended. `is_terminal` decides whether a critic may bootstrap."""

    ENVIRONMENT = "environment"
    """The environment ended the episode: an answer was given, a goal reached or lost."""
    ENVIRONMENT_LIMIT = "environment_limit"
    """The environment cut the episode by a limit of its own (`StepResult.truncated`)."""
    MAX_TURNS = "max_turns"
    """The rollout's turn limit was reached before the environment ended the episode."""
    MAX_TOKENS = "max_tokens"
    """The completion budget (policy tokens and observations together) is used up."""
    MAX_OBSERVATION_TOKENS = "max_observation_tokens"
    """The observations of the trajectory together reached their own limit."""
    MAX_TIME = "max_time"
    """The wall-clock limit of one trajectory was reached."""

    @property
    def is_terminal(self) -> bool:
        """True where the environment ended it (terminated), False where a limit did (truncated)."""
        return self is StopReason.ENVIRONMENT


@dataclasses.dataclass(frozen=True, slots=True)
class ToolCall:
    """One call the policy asked for, already parsed but not yet validated.

    Attributes:
        id: unique within the trajectory, repeated by the observation that answers it.
        name: the tool's name as the policy wrote it.
        arguments: the JSON object the policy wrote.
    """

    id: str
    name: str
    arguments: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, slots=True)
class Message:
    """One message of a conversation.

    Attributes:
        role: who speaks.
        content: the text. For an assistant message this is the *raw* text the policy emitted,
            calls and thinking included, without the end-of-turn token.
        tool_call_id: for `role="tool"`, the call that this message answers.
        name: for `role="tool"`, the tool's name.
        cut: True for an assistant message that hit its per-turn cap before it ended.
        trusted: True for an assistant message of a prompt that the environment's author stands
            for, an example say: control tokens named in it are live, as if the policy had said it.
            Never to be read from a row or a service.
        length: tokens that were sampled for an assistant message, which may be more than its text
            takes when encoded anew; None for a message that nobody sampled.
    """

    role: Role
    content: str
    tool_call_id: str | None = None
    name: str | None = None
    cut: bool = False
    trusted: bool = False
    length: int | None = dataclasses.field(default=None, compare=False)


@dataclasses.dataclass(frozen=True, slots=True)
class ToolResult:
    """What a tool may return instead of plain text, to pay for the turn that called it.

    Attributes:
        content: text, or a list of content blocks (`{"type": "text", "text": ...}`).
        reward: process reward for the calling turn, None for no opinion.
    """

    content: str | Sequence[Mapping[str, Any]]
    reward: float | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class ToolOutcome:
    """What became of one call, as process rewards, metrics and observations see it.

    Attributes:
        call_id: the call's id.
        name: the tool's name as the policy wrote it, or "" where the call could not be read.
        arguments: the parsed arguments, empty where the call could not be read.
        content: the text the policy is shown, already bounded.
        reward: process reward paid by the tool itself.
        failure: None for success, "mistake" for the model's, "fault" for our infrastructure's.
        seconds: time the tool took, all attempts together; waiting for a slot or before a retry
            is not in it.
        attempts: how often the tool was run for this call; 0 where it never was.
        cached: the result is that of an equal call and the tool was not run for this one; then
            `seconds` is the wait for it.
        waited: seconds spent waiting for a free slot.
    """

    call_id: str
    name: str
    arguments: Mapping[str, Any]
    content: str
    reward: float = 0.0
    failure: Literal["mistake", "fault"] | None = None
    seconds: float = 0.0
    attempts: int = 0
    cached: bool = False
    waited: float = 0.0


@dataclasses.dataclass(frozen=True, slots=True)
class StepResult:
    """An environment's answer to one assistant message.

    Attributes:
        observation: messages appended to the conversation, in this order; empty at the end.
        reward: process reward of this turn.
        terminated: the environment ended the episode.
        truncated: a limit of the environment's own ended it.
        info: numbers for metrics, by name; write-only, nothing reads them to decide.
        fault: our infrastructure failed during this turn (DESIGN: kind 2); a short reason.
        rewrite: the whole context of the next turn, where the environment replaces it.
        anchor: names the state the next turn starts from, for algorithms that compare turns taken
            from equal states (GiGPO); None: this state is compared with no other.
    """

    observation: tuple[Message, ...] = ()
    reward: float = 0.0
    terminated: bool = False
    truncated: bool = False
    info: Mapping[str, float] = dataclasses.field(default_factory=dict)
    fault: str | None = None
    rewrite: tuple[Message, ...] | None = None
    anchor: str | None = None


@dataclasses.dataclass(frozen=True, slots=True)
class Turn:
    """One model call plus what came back.

    Attributes:
        action_ids: ids the policy sampled, its end-of-turn token included where it came.
        logprobs: log-probability of each action id under the sampling distribution.
        observation_ids: what follows the action before the next one: a missing end of turn,
            the encoded observation and the next generation prompt. Empty after termination.
        prompt_ids: the whole prompt, only on the turns that begin a new context (the first, and
            each one after a rewrite); None where the context is the previous turn's, extended.
        message: the decoded action.
        observation: the environment's messages.
        reward: process reward.
        fault: reason of an infrastructure fault; such a turn is masked from the loss.
        info: numbers for metrics.
        anchor: names the state the action was taken in; see `StepResult.anchor`. The first turn's
            is that of the row itself.
    """

    action_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    message: Message
    observation_ids: tuple[int, ...] = ()
    prompt_ids: tuple[int, ...] | None = None
    observation: tuple[Message, ...] = ()
    reward: float = 0.0
    fault: str | None = None
    info: Mapping[str, float] = dataclasses.field(default_factory=dict)
    anchor: str | None = None

    def __post_init__(self) -> None:
        if len(self.action_ids) != len(self.logprobs):
            raise ValueError(
                f"a turn needs one logprob per sampled id, got {len(self.action_ids)} ids and "
                f"{len(self.logprobs)} logprobs"
            )


@dataclasses.dataclass(frozen=True, slots=True)
class Trajectory:
    """The record of one episode.

    Attributes:
        row: the dataset row it was started from.
        prompt: the messages `Env.reset` returned.
        turns: at least one.
        stop_reason: why it ended.
        seconds: wall-clock time of the whole episode.
    """

    row: Row
    prompt: tuple[Message, ...]
    turns: tuple[Turn, ...]
    stop_reason: StopReason
    seconds: float = 0.0

    @property
    def messages(self) -> tuple[Message, ...]:
        """The conversation in order: prompt, then each turn's message and observation."""
        spoken = [m for turn in self.turns for m in (turn.message, *turn.observation)]
        return (*self.prompt, *spoken)

    @property
    def final_text(self) -> str:
        """The policy's last message, raw."""
        return self.turns[-1].message.content

    @property
    def process_rewards(self) -> tuple[float, ...]:
        """One process reward per turn, length K."""
        return tuple(turn.reward for turn in self.turns)


OBSERVATION_TURN = -1
"""`turn_ids` value at every token the policy did not sample."""


@dataclasses.dataclass(frozen=True, slots=True)
class Segment:
    """One training row: a prompt and four lists of one length.

    Attributes:
        prompt_ids: context of the first action.
        completion_ids: actions and observations, in order; length T.
        loss_mask: 1 = trained on; length T.
        logprobs: of the sampled ids, 0.0 where the mask is 0; length T.
        turn_ids: index of the turn that sampled the id, -1 elsewhere; length T.
    """

    prompt_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    loss_mask: tuple[int, ...]
    logprobs: tuple[float, ...]
    turn_ids: tuple[int, ...]

    def __post_init__(self) -> None:
        lengths = {
            name: len(getattr(self, name))
            for name in ("completion_ids", "loss_mask", "logprobs", "turn_ids")
        }
        if len(set(lengths.values())) != 1:
            raise ValueError(f"the lists of a segment must have one length, got {lengths}")
