"""Whatever a tool returned as text that may be shown to a policy.

Layer 1. Called by `tools/runner.py` alone. What has no text form raises, which makes it a fault of
the tool; what is too long is cut, and what could break a terminal, a report or an encoder is
replaced.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from agentr1.types import ToolResult

_NOTHING = "The tool returned nothing."
# Control characters break terminals, reports and C strings; lone surrogates have no UTF-8 form.
_UNSAFE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")


def render(result: Any) -> tuple[str, float]:
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


def bounded(text: str, max_chars: int) -> str:
    """Cut first and clean afterwards, so that ten megabytes cost no more than `max_chars`."""
    cut = len(text) - max_chars
    shown = _UNSAFE.sub("\ufffd", text[:max_chars])
    return f"{shown}\n[cut: {cut} more characters]" if cut > 0 else shown
