"""What a tool is, how a typed function becomes one, and how a turn's calls are run.

Layer 1. A tool author needs `@tool` and `ToolError`; a tool environment needs `ToolRunner`, which
is the one boundary where whatever a call does is turned into a `ToolOutcome`: the model's mistake
(an answer that says what was expected) or our infrastructure's fault. Nothing here knows messages,
turns or tokens, and nothing a tool does or returns may stop the run, block the loop or reach the
policy unbounded.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import copy
import dataclasses
import inspect
import json
import logging
import math
import re
import threading
import time
import traceback
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any, Protocol, overload, runtime_checkable

import pydantic

from agentr1.parsing import MalformedCall
from agentr1.tools.signature import argument_problem, argument_validator, read_signature
from agentr1.types import ToolCall, ToolOutcome, ToolResult

_LOGGER = logging.getLogger(__name__)
_NOTHING = "The tool returned nothing."
# Control characters break terminals, reports and C strings; lone surrogates have no UTF-8 form.
_UNSAFE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


class ToolError(Exception):
    """The call was the model's mistake; the text tells the model what was expected."""


@runtime_checkable
class Tool(Protocol):
    """Anything with these four members."""

    @property
    def name(self) -> str:
        """How calls name it; unique among the tools of a runner."""
        ...

    @property
    def description(self) -> str:
        """What it does, for the model."""
        ...

    @property
    def parameters(self) -> Mapping[str, Any]:
        """JSON schema of its arguments."""
        ...

    # `*args: Any, **kwargs: Any` is how the type system spells "any signature"; calls are made
    # with the schema's arguments by name.
    def __call__(self, *args: Any, **kwargs: Any) -> Awaitable[Any]:
        """Answer with text, text blocks, a `ToolResult` or a JSON value."""
        ...


@dataclasses.dataclass(frozen=True)
class FunctionTool:
    """A Python function as a `Tool`; `function` is the original."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    types: Mapping[str, pydantic.TypeAdapter[Any]] = dataclasses.field(repr=False)
    function: Callable[..., Any] = dataclasses.field(repr=False)

    async def __call__(self, /, **arguments: Any) -> Any:
        """Call the function with arguments converted to its type hints."""
        typed = {key: self._typed(key, value) for key, value in arguments.items()}
        if inspect.iscoroutinefunction(self.function):
            return await self.function(**typed)
        return await in_daemon_thread(self.function, **typed)

    def _typed(self, key: str, value: Any) -> Any:
        try:
            return self.types[key].validate_python(value) if key in self.types else value
        except pydantic.ValidationError as error:
            raise ToolError(f"invalid argument {key!r}: {error.errors()[0]['msg']}") from error


@overload
def tool(function: Callable[..., Any], /) -> FunctionTool: ...
@overload
def tool(*, name: str | None = None) -> Callable[[Callable[..., Any]], FunctionTool]: ...
def tool(
    function: Callable[..., Any] | None = None, /, *, name: str | None = None
) -> FunctionTool | Callable[[Callable[..., Any]], FunctionTool]:
    """Make a typed function with a Google docstring a tool, as `@tool` or `@tool(name=...)`.

    A synchronous function runs in a thread of its own; make it `async` only if it never blocks.
    """

    def decorate(function: Callable[..., Any]) -> FunctionTool:
        own_name = name or function.__name__
        return FunctionTool(own_name, *read_signature(function, own_name), function)

    return decorate if function is None else decorate(function)


def schema(tool: Tool) -> dict[str, Any]:
    """The tool as chat templates and OpenAI-style APIs expect it."""
    parameters = dict(tool.parameters)
    described = {"name": tool.name, "description": tool.description, "parameters": parameters}
    return {"type": "function", "function": described}


async def in_daemon_thread(function: Callable[..., Any], /, **arguments: Any) -> Any:
    """Run a blocking function off the event loop.

    Each call has a daemon thread of its own, not a place in a pool: a function that hangs can
    then neither use up the pool nor keep the interpreter from exiting.
    """
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()
    context = contextvars.copy_context()

    def work() -> None:
        try:
            future.set_result(context.run(function, **arguments))
        except BaseException as error:
            # asyncio cannot carry a StopIteration (the caller would wait for ever), and a
            # sys.exit() inside a tool is to end the call, not the run.
            carried = isinstance(error, Exception) and not isinstance(error, StopIteration)
            other = RuntimeError(f"the function raised {type(error).__name__}")
            future.set_exception(error if carried else other)

    future.set_running_or_notify_cancel()  # a cancelled wait must not make set_result fail
    threading.Thread(target=work, name=f"tool {function!r}", daemon=True).start()
    return await asyncio.wrap_future(future)


@dataclasses.dataclass(frozen=True)
class ToolPolicy:
    """Limits under which a tool is run."""

    timeout: float = 30.0
    """Seconds one call may take once it has a slot; longer is a fault."""
    concurrency: int = 32
    """Calls of one tool that may run at once, over all rollouts that share the runner."""
    max_chars: int = 4000
    """Characters of a result that the policy is shown; the rest is cut, and a note says so."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not isinstance(value, int | float) or not value > 0:
                raise ValueError(
                    f"ToolPolicy.{field.name} is {value!r}, expected a positive number like its "
                    f"default {field.default}"
                )


class ToolRunner:
    """Runs the calls of a turn, concurrently and each under its tool's policy.

    Build one per process and share it between environments: concurrency is limited per runner.
    It may be used from several event loops, one after the other.
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
        self._loop: asyncio.AbstractEventLoop | None = None
        self._slots: dict[str, asyncio.Semaphore] = {}
        self._logged: set[tuple[str, type[Exception]]] = set()

    async def run(self, calls: Sequence[ToolCall | MalformedCall]) -> tuple[ToolOutcome, ...]:
        """Run all calls at once and return their outcomes in call order."""
        return tuple(await asyncio.gather(*(self._run_one(call) for call in calls)))

    async def _run_one(self, call: ToolCall | MalformedCall) -> ToolOutcome:
        if isinstance(call, MalformedCall):
            text = (
                f"Error: this tool call could not be read: {call.reason}. Expected "
                '{"name": ..., "arguments": {...}} between <tool_call> and </tool_call>.'
            )
            return ToolOutcome(call.id, "", {}, _bounded(text, 500), failure="mistake")
        if call.name not in self._by_name:
            known = ", ".join(self._by_name) or "none"
            text = f"Error: there is no tool {call.name[:80]!r}. Known tools: {known}."
            return self._refused(call, text)
        if problem := argument_problem(self._validators[call.name], call.name, call.arguments):
            return self._refused(call, f"Error: {problem}")
        return await self._run_valid(call)

    def _refused(self, call: ToolCall, text: str) -> ToolOutcome:
        content = _bounded(text, 1000)
        return ToolOutcome(call.id, call.name, call.arguments, content, failure="mistake")

    async def _run_valid(self, call: ToolCall) -> ToolOutcome:
        tool, policy = self._by_name[call.name], self._policies[call.name]
        reward, failure = 0.0, None
        async with self._slot(call.name, policy):
            started = time.perf_counter()
            try:
                # A copy: a tool may change its arguments, the record of the call must not.
                arguments = copy.deepcopy(dict(call.arguments))
                text, reward = _render(await _within(policy.timeout, tool, arguments))
            except ToolError as error:
                text, failure = f"Error: {error}", "mistake"
            except Exception as error:  # the one boundary of the package
                self._log_once(call.name, error)
                # One line of it: a message may quote a traceback, or fail to be built at all.
                line = traceback.format_exception_only(error)[-1].strip().partition("\n")[0]
                text = f"Error: the tool {call.name!r} failed: {line[:200]}"
                failure = "fault"
            seconds = time.perf_counter() - started
        content = _bounded(text, policy.max_chars)
        return ToolOutcome(call.id, call.name, call.arguments, content, reward, failure, seconds)

    def _slot(self, name: str, policy: ToolPolicy) -> asyncio.Semaphore:
        # A semaphore belongs to the loop it first waited in, and each training step runs its own.
        loop = asyncio.get_running_loop()
        if loop is not self._loop:
            self._loop, self._slots = loop, {}
        return self._slots.setdefault(name, asyncio.Semaphore(policy.concurrency))

    def _log_once(self, name: str, error: Exception) -> None:
        if (name, type(error)) not in self._logged:
            self._logged.add((name, type(error)))
            message = "tool %r failed; further %s of it are counted but not logged"
            _LOGGER.warning(message, name, type(error).__name__, exc_info=error)


async def _within(timeout: float, tool: Tool, arguments: dict[str, Any]) -> Any:
    """Await the tool in a task of its own, so that one that ignores cancellation cannot hang us."""

    async def invoke() -> Any:
        return await tool(**arguments)

    task = asyncio.ensure_future(invoke())
    # Reading the exception keeps asyncio from reporting that of an abandoned task as unseen.
    task.add_done_callback(lambda done: done.cancelled() or done.exception())
    try:
        await asyncio.wait({task}, timeout=timeout)
    finally:
        abandoned = task.cancel()  # False where it is done already
    if abandoned:
        raise TimeoutError(f"no answer within {timeout:g} seconds")
    if task.cancelled():
        raise RuntimeError("the tool cancelled itself")
    return task.result()


def _render(result: Any) -> tuple[str, float]:
    """The text and the reward of whatever a tool returned; raises where it has no text form."""
    reward = 0.0
    if isinstance(result, ToolResult):
        reward = 0.0 if result.reward is None else float(result.reward)
        if not math.isfinite(reward):
            raise ValueError(f"the tool paid the reward {reward}, expected a finite number")
        result = result.content
    if isinstance(result, bytes | bytearray):
        result = result.decode("utf-8", errors="replace")
    elif isinstance(result, Sequence) and not isinstance(result, str):
        result = list(result)
        if all(isinstance(b, Mapping) and b.get("type") == "text" and "text" in b for b in result):
            result = "\n".join(block["text"] for block in result)
    if not isinstance(result, str):
        # dumps raises on anything that is not a JSON value: an object's repr tells a model nothing.
        empty = result is None or (isinstance(result, Mapping) and not result)
        result = "" if empty else json.dumps(result, ensure_ascii=False)
    return (_NOTHING if not result or result.isspace() else result), reward


def _bounded(text: str, max_chars: int) -> str:
    """Cut first and clean afterwards, so that ten megabytes cost no more than `max_chars`."""
    cut = len(text) - max_chars
    shown = _UNSAFE.sub("\ufffd", text[:max_chars])
    return f"{shown}\n[cut: {cut} more characters]" if cut > 0 else shown
