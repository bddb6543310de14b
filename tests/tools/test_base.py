"""A typed function becomes a tool, described for the model."""

import asyncio
import datetime
import enum

import pytest

from agentr1.tools.base import ToolError, schema, tool


@tool
def add(a: int, b: int = 1) -> int:
    """Add two numbers.

    Args:
        a: One.
        b: Other.
    """
    return a + b


def test_the_schema_is_the_one_of_chat_templates():
    assert schema(add) == {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add two numbers.",
            "parameters": {
                "type": "object",
                "properties": {
                    "a": {"type": "integer", "description": "One."},
                    "b": {"type": "integer", "description": "Other."},
                },
                "required": ["a"],
            },
        },
    }
    assert add.function(2, 3) == 5


def test_a_definition_without_hint_is_refused_where_it_is_made():
    with pytest.raises(TypeError, match="no type hint for 'x'"):

        @tool
        def bare(x):
            """Do it.

            Args:
                x: Thing.
            """


def test_arguments_arrive_as_the_types_of_the_hints():
    class Unit(enum.StrEnum):
        KELVIN = "K"

    @tool(name="convert")
    def function(day: datetime.date, unit: Unit) -> str:
        """Convert.

        Args:
            day: Day.
            unit: Unit.
        """
        return f"{type(day).__name__} {unit!r}"

    assert asyncio.run(function(day="2024-02-29", unit="K")) == "date <Unit.KELVIN: 'K'>"
    with pytest.raises(ToolError, match="'day'"):
        asyncio.run(function(day="2023-02-29", unit="K"))
