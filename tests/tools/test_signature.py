"""A function's hints and docstring become its schema; what is missing is refused by name."""

import dataclasses
import enum
from typing import Annotated, Literal

import jsonschema
import pydantic
import pytest

from agentr1.tools.signature import argument_problem, argument_validator, read_signature


class Unit(enum.StrEnum):
    CELSIUS = "C"
    KELVIN = "K"


@dataclasses.dataclass
class Place:
    title: str
    altitude: float = 0.0


def weather(
    place: Place,
    days: int = 1,
    unit: Unit = Unit.CELSIUS,
    kind: Literal["short", "long"] | None = None,
    tags: list[str] = [],  # noqa: B006
):
    """Forecast the weather,
    day by day.

    More for people, not for the model.

    Args:
        place: Where: the place
            to look at.
        days (int, optional): How many days.
        unit: The unit.
        kind: The length.

        tags: Words.

    Returns:
        text: the forecast.
    """


def test_summary_hints_and_argument_lines_become_the_schema():
    read = read_signature(weather, "weather")
    properties = read.parameters["properties"]
    assert read.description == "Forecast the weather, day by day."
    assert list(properties) == ["place", "days", "unit", "kind", "tags"]
    assert read.parameters["required"] == ["place"]
    assert properties["days"] == {"type": "integer", "description": "How many days."}
    assert properties["place"]["description"] == "Where: the place to look at."
    assert properties["tags"]["items"] == {"type": "string"}
    assert "Returns" not in str(read.parameters)


def test_shared_definitions_resolve_and_a_property_called_title_stays():
    parameters = read_signature(weather, "weather").parameters
    assert parameters["$defs"]["Place"]["properties"].keys() == {"title", "altitude"}
    assert "title" not in parameters["$defs"]["Place"]
    validator = jsonschema.Draft202012Validator(parameters)
    assert validator.is_valid({"place": {"title": "Ulm"}, "unit": "K", "kind": None})
    assert not validator.is_valid({"place": {"altitude": 1}})
    assert not validator.is_valid({"place": {"title": "Ulm"}, "unit": "F"})


def test_types_of_one_name_are_kept_apart():
    def make(hint):
        return dataclasses.make_dataclass("Same", [("value", hint)])

    def merge(a, b):
        """Merge two.

        Args:
            a: One.
            b: Other.
        """

    merge.__annotations__ = {"a": make(int), "b": make(str)}
    validator = jsonschema.Draft202012Validator(read_signature(merge, "merge").parameters)
    assert validator.is_valid({"a": {"value": 1}, "b": {"value": "x"}})
    assert not validator.is_valid({"a": {"value": "x"}, "b": {"value": "x"}})


def test_a_constraint_of_the_hint_is_part_of_the_schema():
    def top(k: Annotated[int, pydantic.Field(ge=1, title="K")]):
        """Take the top.

        Arguments:
            k: How many.
        """

    spec = read_signature(top, "top").parameters["properties"]["k"]
    assert spec == {"type": "integer", "minimum": 1, "description": "How many."}


def test_a_function_without_arguments_needs_no_args_section():
    def now():
        """Tell the time."""

    assert read_signature(now, "now").parameters == {"type": "object", "properties": {}}


def no_docstring(a: int): ...


def no_summary_of_argument(a: int):
    """Do it."""


def no_hint(a):
    """Do it.

    Args:
        a: Number.
    """


def stale_line(a: int):
    """Do it.

    Args:
        a: Number.
        b: Gone.
    """


def star(*a: int):
    """Do it.

    Args:
        a: Numbers.
    """


def unknown_hint(a: "Missing"):  # noqa: F821
    """Do it.

    Args:
        a: Number.
    """


class Opaque: ...


def opaque(a: Opaque):
    """Do it.

    Args:
        a: Thing.
    """


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (no_docstring, "no docstring"),
        (no_summary_of_argument, "does not describe 'a'"),
        (no_hint, "no type hint for 'a'"),
        (stale_line, "['b']"),
        (star, "'*a: int'"),
        (unknown_hint, "'Missing'"),
        (opaque, "Opaque"),
    ],
)
def test_what_a_definition_lacks_is_named(function, said):
    with pytest.raises(TypeError, match="tool 'f' .*expected") as caught:
        read_signature(function, "f")
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({}, "'place' is a required property"),
        ({"place": {"title": "Ulm"}, "color": 1}, "'color' was unexpected"),
        ({"place": {"title": "Ulm"}, "days": "two"}, "days: 'two' is not of type 'integer'"),
        ({"place": {"title": 3}}, "place.title: 3 is not of type 'string'"),
        ({"place": "x" * 100_000}, "place: 'xxx"),
    ],
)
def test_a_wrong_call_is_told_what_was_expected_in_one_short_line(arguments, said):
    parameters = read_signature(weather, "weather").parameters
    problem = argument_problem(argument_validator("weather", parameters), "weather", arguments)
    assert problem is not None
    assert said in problem
    assert "Expected weather(place: object, days?: integer, " in problem
    assert "\n" not in problem
    assert len(problem) < 900


def test_a_right_call_has_no_problem():
    parameters = read_signature(weather, "weather").parameters
    validator = argument_validator("weather", parameters)
    assert argument_problem(validator, "weather", {"place": {"title": "Ulm"}}) is None


def test_extra_arguments_are_allowed_only_where_the_schema_says_so():
    open_schema = {"type": "object", "additionalProperties": True}
    assert argument_problem(argument_validator("t", open_schema), "t", {"x": 1}) is None
    assert argument_problem(argument_validator("t", {}), "t", {"x": 1}) is not None


def test_parameters_that_are_no_schema_are_refused():
    with pytest.raises(ValueError, match="parameters of tool 't' are no JSON schema"):
        argument_validator("t", {"type": "objekt"})
