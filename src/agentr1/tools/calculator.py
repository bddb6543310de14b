"""Exact, bounded arithmetic as a tool.

Layer 1. The expression is parsed to a syntax tree and only the operations listed here are
evaluated, never Python's `eval`; every size is bounded, so that no expression a policy comes up
with can take long. Whatever cannot be computed is a `ToolError` that tells the model why.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable
from typing import Any

from agentr1.tools.base import ToolError, tool

MAX_CHARS = 1000
MAX_DEPTH = 200
MAX_DIGITS = 1000
_MAX_BITS = int(MAX_DIGITS * math.log2(10))

Number = int | float


@tool
async def calculator(expression: str) -> str:
    """Compute an arithmetic expression.

    Args:
        expression: Numbers with + - * / // % **, parentheses, sqrt, abs, round, min and max.
    """
    # Not a plain function: it takes microseconds, less than a thread would cost.
    return _shown(evaluate(expression))


def evaluate(expression: str) -> Number:
    """Compute an expression; integers stay exact, a quotient that is whole included.

    Raises:
        ToolError: it is no arithmetic, too large, or has no real value.
    """
    if len(expression) > MAX_CHARS:
        raise ToolError(f"the expression has {len(expression)} characters, at most {MAX_CHARS}")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
        raise ToolError(
            "this is not one arithmetic expression, write for example (2+3)*4"
        ) from error
    return _evaluate(tree.body, 1)


def _evaluate(node: ast.expr, depth: int) -> Number:
    if depth > MAX_DEPTH:
        raise ToolError(f"the expression is nested more than {MAX_DEPTH} levels deep, split it")
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            return _bounded(value)
        case ast.BinOp(left=left, op=op, right=right):
            return _apply(
                _BINARY.get(type(op)), _evaluate(left, depth + 1), _evaluate(right, depth + 1)
            )
        case ast.UnaryOp(op=op, operand=operand):
            return _apply(_UNARY.get(type(op)), _evaluate(operand, depth + 1))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]) if name in _FUNCTIONS:
            return _apply(_FUNCTIONS[name], *(_evaluate(arg, depth + 1) for arg in args))
        case ast.Name(id=name) | ast.Call(func=ast.Name(id=name)) if name not in _FUNCTIONS:
            raise ToolError(
                f"{name[:40]!r} is not known, the functions are {', '.join(_FUNCTIONS)}"
            )
        case ast.Tuple():
            raise ToolError("a comma is allowed only between arguments: write 1000, not 1,000")
    raise ToolError("only numbers, + - * / // % **, parentheses and functions are allowed")


def _apply(function: Callable[..., Number] | None, *values: Number) -> Number:
    if function is None:
        raise ToolError("only + - * / // % ** are known, a power is written **")
    try:
        return _bounded(function(*values))
    except ZeroDivisionError as error:
        raise ToolError("division by zero") from error
    except OverflowError as error:
        raise ToolError("a number is too large") from error
    except (TypeError, ValueError) as error:
        raise ToolError(f"wrong arguments: {error}") from error


def _bounded(value: Number) -> Number:
    if isinstance(value, complex):
        raise ToolError("the result is not a real number")
    if isinstance(value, int) and value.bit_length() > _MAX_BITS:
        raise ToolError(f"a number has more than {MAX_DIGITS} digits")
    if not math.isfinite(value):
        raise ToolError("a number is too large")
    return value


def _shown(value: Number) -> str:
    """15 significant digits hide what binary fractions add to 0.1 + 0.2."""
    return str(value) if isinstance(value, int) else f"{value + 0.0:.15g}"


def _divide(left: Number, right: Number) -> Number:
    whole = isinstance(left, int) and isinstance(right, int) and right and left % right == 0
    return left // right if whole else left / right


def _power(base: Number, exponent: Number) -> Number:
    # Checked before, since the power itself is what would take the time and the memory.
    bits = base.bit_length() - 1 if isinstance(base, int) else 0
    if isinstance(exponent, int) and bits * exponent > _MAX_BITS:
        raise ToolError(f"a number has more than {MAX_DIGITS} digits")
    return base**exponent


def _sqrt(value: Number) -> Number:
    if value < 0:
        raise ToolError("a negative number has no real square root")
    if isinstance(value, int) and math.isqrt(value) ** 2 == value:
        return math.isqrt(value)
    return math.sqrt(value)


def _round(value: Number, digits: int = 0) -> Number:
    if not isinstance(digits, int) or abs(digits) > MAX_DIGITS:
        raise ToolError(f"round takes a whole number of digits up to {MAX_DIGITS}, got {digits}")
    return round(value, digits) if digits else round(value)


_BINARY: dict[type[ast.operator], Callable[..., Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: _divide,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: _power,
}
_UNARY: dict[type[ast.unaryop], Callable[..., Any]] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "sqrt": _sqrt,
    "abs": abs,
    "round": _round,
    "min": lambda *values: min(values),
    "max": lambda *values: max(values),
}
