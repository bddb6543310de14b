"""Runs the calls of a turn, all at once and each under its tool's policy.

Layer 1. The one boundary where whatever a call does is turned into a `ToolOutcome`: the model's
mistake (an answer that says what was expected) or our infrastructure's fault. Nothing here knows
messages or tokens, and nothing a tool does or returns may stop the run, block the loop or reach
the policy unbounded. Tool environments are its callers.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import functools
import json
import logging
import random
import time
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from agentr1.parsing import MalformedCall
from agentr1.tools.base import Tool, ToolError
from agentr1.tools.policy import EpisodeCalls, Place, ToolPolicy
from agentr1.tools.rendering import bounded, render
from agentr1.tools.sharing import SharedResults, Slots
from agentr1.tools.signature import argument_problem, argument_validator
from agentr1.types import ToolCall, ToolOutcome

_LOGGER = logging.getLogger(__name__)
_KEPT_RESULTS = 4096
_LOOKS = 10
"""A loop that an engine's long forward holds up finds a tool's time over together with its answer.
So the time is given in so many parts, and a hold-up costs the tool one of them at most."""
_FAREWELL_SECONDS = 1.0
"""What an abandoned tool has to clean up in when the event loop ends."""


class ToolRunner:
    """Runs the calls of a turn, concurrently and each under its tool's policy.

    Build one per process and share it between environments: concurrency is limited per runner,
    over all event loops it is used from, and results are cached in it.

    An attempt that is over, by timeout or because its episode ended, gives its slot back at once,
    though a tool that ignores cancellation, or a function in a thread, may still be at work. Held
    back until such a call ends, `concurrency` hung calls would stop the tool, and with it every
    rollout, for good. The price: a tool may see more than `concurrency` calls while abandoned ones
    linger.
    """

    def __init__(
        self,
        tools: Sequence[Tool],
        policies: Mapping[str, ToolPolicy] | None = None,
        default_policy: ToolPolicy | None = None,
    ) -> None:
        policies = policies or {}
        for candidate in tools:
            if not isinstance(candidate, Tool):
                raise TypeError(f"{candidate!r} is no tool: make it one with @tool, or see `Tool`")
        names = [tool.name for tool in tools]
        if len(set(names)) < len(names):
            raise ValueError(f"tools need different names, got {names}: rename one by @tool(name=)")
        if unknown := sorted(policies.keys() - set(names)):
            raise ValueError(f"policies name unknown tools {unknown}, the tools are {names}")
        self.tools = tuple(tools)
        self._by_name = dict(zip(names, tools, strict=True))
        default = default_policy or ToolPolicy()
        self._policies = {name: policies.get(name, default) for name in names}
        self._validators = {t.name: argument_validator(t.name, t.parameters) for t in tools}
        self._slots = {name: Slots(policy.concurrency) for name, policy in self._policies.items()}
        self._results = SharedResults(_KEPT_RESULTS)
        self._jitter = random.Random()  # its own: a pause must not change what a seeded run draws
        self._logged: set[tuple[str, object]] = set()
        self._leaving: set[asyncio.Task[None]] = set()

    async def run(
        self, calls: Sequence[ToolCall | MalformedCall], episode: EpisodeCalls | None = None
    ) -> tuple[ToolOutcome, ...]:
        """Run all calls of a turn at once and return their outcomes in call order.

        Args:
            calls: as parsed.
            episode: counts the calls of the episode, and says where it stands.
        """
        episode = EpisodeCalls() if episode is None else episode
        outcomes: list[ToolOutcome | None] = []
        started = []
        for index, call in enumerate(calls):
            refused = self._refused(call, episode)
            outcomes.append(refused)
            if refused is None and isinstance(call, ToolCall):
                started.append(self.execute(call, Place(episode.row_id, episode.turn, index)))
        # One call, the usual case, needs no task of its own.
        ran = iter([await started[0]] if len(started) == 1 else await asyncio.gather(*started))
        return tuple(next(ran) if outcome is None else outcome for outcome in outcomes)

    def _refused(self, call: ToolCall | MalformedCall, episode: EpisodeCalls) -> ToolOutcome | None:
        """The answer to a call that is not run, None for one that is fit to run."""
        if isinstance(call, MalformedCall):
            text = (
                f"Error: this tool call could not be read: {call.reason}. Expected "
                '{"name": ..., "arguments": {...}} between <tool_call> and </tool_call>.'
            )
            return ToolOutcome(call.id, "", {}, bounded(text, 500), failure="mistake")
        if call.name not in self._by_name:
            known = ", ".join(self._by_name) or "none"
            problem = f"there is no tool {call.name[:80]!r}. Known tools: {known}."
        else:
            problem = argument_problem(self._validators[call.name], call.name, call.arguments)
            problem = problem or episode.refusal(call.name, self._policies[call.name].max_calls)
        if not problem:
            return None
        content = bounded(f"Error: {problem}", 1000)
        return ToolOutcome(call.id, call.name, call.arguments, content, failure="mistake")

    async def execute(self, call: ToolCall, place: Place) -> ToolOutcome:
        """Run one call that is fit to run; the step that recording and replaying override."""
        if not self._policies[call.name].cache:
            return await self._with_retries(call, place)
        started = time.perf_counter()
        key = json.dumps([call.name, dict(call.arguments)], sort_keys=True)
        run = functools.partial(self._with_retries, call, place)
        outcome, shared = await self._results.get(key, run)
        if not shared:
            return outcome
        return dataclasses.replace(
            outcome,
            call_id=call.id,
            arguments=call.arguments,
            seconds=time.perf_counter() - started,
            attempts=0,
            cached=True,
            waited=0.0,
        )

    async def _with_retries(self, call: ToolCall, place: Place) -> ToolOutcome:
        policy, effort = self._policies[call.name], _Effort()
        failure = None
        reward = 0.0
        while True:
            try:
                text, reward = await self._attempt(call, policy, effort)
            except ToolError as error:
                text, failure = f"Error: {error}", "mistake"
            except Exception as error:  # the one boundary of the package
                pause = policy.pause(effort.attempts, self._jitter.random())
                left = effort.seconds_left(policy)
                if effort.attempts <= policy.retries and (left is None or pause < left):
                    await asyncio.sleep(pause)
                    continue
                text, failure = self.fault_text(call, place, error), "fault"
            return ToolOutcome(
                call.id,
                call.name,
                call.arguments,
                bounded(text, policy.max_chars),
                reward,
                failure,
                effort.seconds,
                effort.attempts,
                waited=effort.waited,
            )

    async def _attempt(
        self, call: ToolCall, policy: ToolPolicy, effort: _Effort
    ) -> tuple[str, float]:
        """Run the tool once, in a slot; raises whatever it raises."""
        asked = time.perf_counter()
        slots = self._slots[call.name]
        if not slots.take():
            try:
                async with asyncio.timeout(effort.seconds_left(policy)):
                    await slots.acquire()
            except TimeoutError as error:
                message = f"no free slot for another attempt within {policy.deadline} seconds"
                raise TimeoutError(message) from error
        started = time.perf_counter()
        effort.attempts += 1
        effort.waited += started - asked
        effort.first_start = effort.first_start or started
        left = effort.seconds_left(policy)
        try:
            # A copy: a tool may change its arguments, the record of the call must not.
            arguments = copy.deepcopy(dict(call.arguments))
            timeout = policy.timeout if left is None else min(policy.timeout, max(left, 0.0))
            return render(await self._within(timeout, call.name, arguments))
        finally:
            slots.release()
            effort.seconds += time.perf_counter() - started

    async def _within(self, timeout: float, name: str, arguments: dict[str, Any]) -> Any:
        """Await the tool in a task of its own: one that ignores cancellation holds up nobody."""

        async def invoke() -> Any:
            return await self._by_name[name](**arguments)

        task = asyncio.ensure_future(invoke())
        # Reading the exception keeps asyncio from reporting that of an abandoned task as unseen.
        task.add_done_callback(lambda done: done.cancelled() or done.exception())
        try:
            for _ in range(_LOOKS):
                await asyncio.wait({task}, timeout=timeout / _LOOKS)
                if task.done():
                    break
        finally:
            abandoned = task.cancel()  # False where it is done already
            if abandoned:
                self._see_off(name, task)
        if abandoned:
            raise TimeoutError(f"no answer within {timeout:g} seconds")
        if task.cancelled():
            raise RuntimeError("the tool cancelled itself")
        return task.result()

    def _see_off(self, name: str, task: asyncio.Task[Any]) -> None:
        """Let an abandoned tool clean up, and keep it from holding up the end of the loop.

        `asyncio.run` waits without limit for every registered task it cancelled at the end. So the
        tool's task is taken off that register, and another one waits for it, with a limit.
        """

        async def wait() -> None:
            loop = asyncio.get_running_loop()
            end = loop.time() + _FAREWELL_SECONDS
            while not task.done() and (left := end - loop.time()) > 0:
                try:
                    await asyncio.wait({task}, timeout=left)
                except asyncio.CancelledError:
                    continue  # the loop ends; what is left of the time is still the tool's
            if not task.done() and self._first((name, "ignores cancellation")):
                message = "tool %r ignores its cancellation and is left behind, still at work"
                _LOGGER.warning(message, name)

        asyncio._unregister_task(task)
        waiter = asyncio.ensure_future(wait())
        self._leaving.add(waiter)  # a loop holds its tasks only weakly
        waiter.add_done_callback(self._leaving.discard)

    def fault_text(self, call: ToolCall, place: Place, error: Exception) -> str:
        """What the model is told of a fault; the first of its kind is logged, with its place."""
        if self._first((call.name, type(error))):
            message = "tool %r failed in turn %d of row %s; further %s of it are not logged"
            kind = type(error).__name__
            _LOGGER.warning(message, call.name, place.turn, place.row_id, kind, exc_info=error)
        # One line of it: a message may quote a traceback, or fail to be built at all.
        line = traceback.format_exception_only(error)[-1].strip().partition("\n")[0]
        return f"Error: the tool {call.name!r} failed: {line[:200]}"

    def _first(self, kind: tuple[str, object]) -> bool:
        if kind in self._logged:
            return False
        self._logged.add(kind)
        return True


@dataclasses.dataclass(slots=True)
class _Effort:
    """What a call has cost so far, over its attempts."""

    attempts: int = 0
    seconds: float = 0.0
    waited: float = 0.0
    first_start: float = 0.0

    def seconds_left(self, policy: ToolPolicy) -> float | None:
        """Until the deadline, None where there is none or the first attempt has no slot yet."""
        if policy.deadline is None or not self.first_start:
            return None
        return self.first_start + policy.deadline - time.perf_counter()
