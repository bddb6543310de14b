"""What a tool is, and how a typed function becomes one.

Layer 1. All that a tool's author needs: `@tool` and `ToolError`. How calls are run, under which
limits and what becomes of failures is `tools/runner.py`, which nothing here knows.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol, overload, runtime_checkable

import pydantic

from agentr1.tools.signature import read_signature
from agentr1.tools.threads import in_daemon_thread


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
