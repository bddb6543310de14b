"""What a tool takes: read from a typed Python function, and checked against a call's arguments.

Layer 1, below `tools/base.py`, which makes tools of functions. It reads functions
and never calls them; it must not know how tools are run. What a definition lacks raises at once,
because a model cannot ask what an undescribed argument means; what a call gets wrong is put into
one line for the model.
"""

from __future__ import annotations

import inspect
import itertools
import json
import re
import typing
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn

import jsonschema
import pydantic

_ARGUMENT = re.compile(r"\*{0,2}(\w+)\s*(?:\([^)]*\))?:\s*(.*)")
_BY_NAME = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)


class Signature(NamedTuple):
    """What a function tells about itself; `types` converts and checks each argument."""

    description: str
    parameters: dict[str, Any]
    types: dict[str, pydantic.TypeAdapter[Any]]


def read_signature(function: Callable[..., Any], name: str) -> Signature:
    """Read a function's type hints and docstring.

    Args:
        function: takes all its arguments by name.
        name: what error messages call it.

    Raises:
        TypeError: a hint or a part of the docstring is missing or has no JSON form.
    """
    docstring = inspect.getdoc(function) or ""
    if not docstring.strip():
        _refuse(name, "has no docstring", "a summary for the model and an 'Args:' section")
    described = _argument_descriptions(docstring)
    arguments = inspect.signature(function).parameters
    if unknown := sorted(described.keys() - arguments.keys()):
        _refuse(name, f"describes {unknown}", f"under 'Args:' only {list(arguments)}")
    types = _types(function, name, arguments, described)
    properties, definitions = _schemas(name, types)
    parameters: dict[str, Any] = {
        "type": "object",
        "properties": {
            key: {**spec, "description": described[key]} for key, spec in properties.items()
        },
    }
    required = [key for key, argument in arguments.items() if argument.default is argument.empty]
    if required:
        parameters["required"] = required
    if definitions:
        parameters["$defs"] = definitions
    summary = " ".join(docstring.partition("\n\n")[0].split())
    return Signature(summary, parameters, types)


def argument_validator(name: str, parameters: Mapping[str, Any]) -> jsonschema.Draft202012Validator:
    """A validator of a tool's arguments that allows no others unless its schema says so."""
    closed = {"type": "object", "additionalProperties": False, **parameters}
    try:
        jsonschema.Draft202012Validator.check_schema(closed)
    except jsonschema.SchemaError as error:
        raise ValueError(
            f"parameters of tool {name!r} are no JSON schema ({error.message}), expected "
            '{"type": "object", "properties": {...}, "required": [...]}: correct them'
        ) from error
    return jsonschema.Draft202012Validator(closed)


def argument_problem(
    validator: jsonschema.Draft202012Validator, name: str, arguments: Mapping[str, Any]
) -> str | None:
    """What is wrong with a call's arguments and what was expected, in one line."""
    found = [
        f"{'.'.join(map(str, error.path)) or 'arguments'}: {error.message[:120]}"
        for error in itertools.islice(validator.iter_errors(dict(arguments)), 3)
    ]
    if not found:
        return None
    parameters: Any = validator.schema
    required = parameters.get("required", [])
    expected = ", ".join(
        f"{key}{'' if key in required else '?'}: {_type_name(spec)}"
        for key, spec in parameters.get("properties", {}).items()
    )
    return f"invalid arguments for {name!r}: {'; '.join(found)}. Expected {name}({expected[:300]})."


def _type_name(spec: Mapping[str, Any]) -> str:
    if "enum" in spec:
        return " or ".join(map(json.dumps, spec["enum"]))
    if "anyOf" in spec:
        return " or ".join(map(_type_name, spec["anyOf"]))
    return str(spec.get("type", "object" if "$ref" in spec else "any value"))


def _refuse(name: str, found: str, expected: str) -> NoReturn:
    raise TypeError(f"tool {name!r} {found}, expected {expected}: complete its definition")


def _types(
    function: Callable[..., Any],
    name: str,
    arguments: Mapping[str, inspect.Parameter],
    described: Mapping[str, str],
) -> dict[str, pydantic.TypeAdapter[Any]]:
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except NameError as error:
        _refuse(name, f"has the hint {error.name!r}", "hints that are defined in its module")
    for key, argument in arguments.items():
        if argument.kind not in _BY_NAME:
            _refuse(name, f"has the argument {str(argument)!r}", "arguments passed by name")
        if key not in hints:
            _refuse(name, f"has no type hint for {key!r}", f"for example '{key}: str'")
        if not described.get(key):
            _refuse(name, f"does not describe {key!r}", f"a line '{key}: ...' under 'Args:'")
    try:
        return {key: pydantic.TypeAdapter(hints[key]) for key in arguments}
    except pydantic.errors.PydanticUserError as error:
        _refuse(name, f"has a hint that is no data type ({_first(error)})", "JSON-like types")


def _schemas(
    name: str, types: Mapping[str, pydantic.TypeAdapter[Any]]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Schemas by argument, and the definitions they share (equal names are kept apart)."""
    try:
        by_key, shared = pydantic.TypeAdapter.json_schemas(
            [(key, "validation", adapter) for key, adapter in types.items()]
        )
    except pydantic.errors.PydanticInvalidForJsonSchema as error:
        _refuse(name, f"has a hint without a JSON schema ({_first(error)})", "JSON-like types")
    properties = {key: _without_titles(schema) for (key, _), schema in by_key.items()}
    return {key: properties[key] for key in types}, _without_titles(shared.get("$defs", {}))


def _first(error: pydantic.errors.PydanticUserError) -> str:
    return (error.message or "").partition(". ")[0]


def _without_titles(schema: Any) -> Any:
    """Drop the titles pydantic adds: prompt tokens that repeat the names."""
    if isinstance(schema, list):
        return [_without_titles(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    # A property that is itself called "title" holds a schema, not a string, and stays.
    return {
        key: part if key in ("default", "const", "enum", "examples") else _without_titles(part)
        for key, part in schema.items()
        if not (key == "title" and isinstance(part, str))
    }


def _argument_descriptions(docstring: str) -> dict[str, str]:
    """The entries of the "Args:" section, continuation lines joined."""
    lines = iter(docstring.splitlines())
    if not any(line.strip() in ("Args:", "Arguments:") and line[0] != " " for line in lines):
        return {}
    described: dict[str, str] = {}
    margin, key = -1, ""
    for line in lines:  # goes on after the section's heading
        if line.strip() and not line.startswith((" ", "\t")):
            break
        indent = len(line) - len(line.lstrip())
        entry = _ARGUMENT.match(line.strip())
        if entry and (margin < 0 or indent <= margin):
            margin, key = indent, entry.group(1)
            described[key] = entry.group(2)
        elif key and line.strip():
            described[key] = f"{described[key]} {line.strip()}".strip()
    return described
