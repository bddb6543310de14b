"""One HTTP server that is asked for passages: connections, time limits and errors that name it.

Layer 1, below the clients `http`, `opensearch` and `qdrant`, which know what is said over it. The
connections are blocking and shared between threads: `Gathered` keeps them off the event loop, so
that one pool serves every loop a process ever runs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

import httpx2

_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
CONNECT_SECONDS = 5.0
_IDLE_SECONDS = 2.0
"""Less than servers keep an idle connection (uvicorn: 5 s), or a request might meet its end."""


def is_address(place: object) -> bool:
    """True for a server's address, which is no path on this machine."""
    return isinstance(place, str) and _ADDRESS.match(place) is not None


class Remote:
    """A server by its address.

    Args:
        url: of the server; a user name and a password in it are sent and never shown.
        timeout: seconds an answer may take.
        headers: sent with each request, for a key of an interface for example.
        transport: replaces the network.
    """

    def __init__(
        self,
        url: str,
        *,
        timeout: float = 30.0,
        headers: Mapping[str, str] | None = None,
        transport: httpx2.BaseTransport | None = None,
    ) -> None:
        try:
            address = httpx2.URL(url)
        except httpx2.InvalidURL as error:
            raise ValueError(f"{url!r} is no address ({error}); {_EXAMPLE}") from error
        if address.scheme not in ("http", "https") or not address.host:
            raise ValueError(f"{url!r} is no address of a server; {_EXAMPLE}")
        self.url = str(address.copy_with(userinfo=b"")).rstrip("/")
        user = (address.username, address.password)
        self._client = httpx2.Client(
            auth=user if any(user) else None,
            headers=dict(headers or {}),
            limits=httpx2.Limits(max_connections=None, keepalive_expiry=_IDLE_SECONDS),
            timeout=httpx2.Timeout(timeout, connect=min(timeout, CONNECT_SECONDS)),
            transport=transport,
            # A proxy of the environment has no place between a run and its own servers.
            trust_env=False,
        )

    def get(self, path: str, timeout: float | None = None) -> Any:
        """The JSON value that a GET answers."""
        return self._ask("GET", path, timeout=timeout)

    def post(
        self,
        path: str,
        body: bytes,
        *,
        kind: str = "application/json",
        timeout: float | None = None,
    ) -> Any:
        """The JSON value that a POST answers.

        Raises:
            ConnectionError: nobody answers, or the connection broke.
            TimeoutError: the answer takes too long.
            RequestRefused: the server answered, but not with success.
            ValueError: the answer is no JSON.
        """
        return self._ask(
            "POST", path, timeout=timeout, content=body, headers={"content-type": kind}
        )

    def _ask(self, method: str, path: str, *, timeout: float | None, **request: Any) -> Any:
        place = f"{self.url}{path}"
        if timeout is not None:
            request["timeout"] = timeout
        try:
            answer = self._client.request(method, place, **request)
        except httpx2.TimeoutException as error:
            kind = type(error).__name__
            raise TimeoutError(f"{place} gave no answer in time ({kind})") from error
        except httpx2.HTTPError as error:
            raise ConnectionError(f"{place} cannot be reached: {error}") from error
        if not answer.is_success:
            raise RequestRefused(place, answer.status_code, answer.text)
        try:
            return answer.json()
        except ValueError as error:
            raise malformed(place, "JSON", answer.text) from error


class RequestRefused(ConnectionError):
    """A server answered with another status than success.

    Attributes:
        status: of HTTP.
    """

    def __init__(self, place: str, status: int, words: str) -> None:
        super().__init__(f"{place} answered with status {status}: {' '.join(words.split())[:200]}")
        self.status = status


def malformed(place: str, expected: str, got: Any) -> ValueError:
    """An error for an answer that is not what its protocol says."""
    text = got if isinstance(got, str) else json.dumps(got, ensure_ascii=False, default=repr)
    return ValueError(f"{place}: expected {expected}, got {' '.join(text.split())[:200]!r}")


def field_of(record: Any, name: str, kind: Any, place: str) -> Any:
    """A field that an answer must have."""
    value = record.get(name) if isinstance(record, dict) else None
    if not isinstance(value, kind):
        raise malformed(place, f"an answer with {name!r}", record)
    return value


def encoded(value: Any) -> bytes:
    """A JSON text in UTF-8; half a surrogate pair, which no server takes, becomes a `?`."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.encode("utf-8", errors="replace")


_EXAMPLE = "expected something like http://127.0.0.1:8000"
