"""One `vllm serve` server: its HTTP interface, what counts as an answer, how it has fared.

Knows addresses, requests and answers; nothing of episodes or weights: `vllm` decides what follows
a fault, `vllm_sync` what is loaded. Every answer is checked before it is believed, because a
wrong one would be trained on without a sound.
"""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import httpx2

from agentr1.engines.base import Generation, Sampling

LOAD_SECONDS = 120.0
"""Time a server has to load an adapter or to answer about itself."""
UNLOAD_SECONDS = 10.0
"""Time it has to forget one; a run does not end later for a server that hangs."""
FIRST_WAIT, LONGEST_WAIT = 0.25, 10.0
"""Seconds a server is left alone after its first fault in a row, and at most."""
_LOWEST_LOGPROB = -9998.0
"""vLLM writes -9999 where a logprob is minus infinity or not there."""


class ServerFault(Exception):
    """The server is away, hangs, broke or answered nonsense: worth asking again.

    Attributes:
        gone: the connection was refused or cut, so the process may have ended.
    """

    def __init__(self, message: str, gone: bool = False) -> None:
        super().__init__(message)
        self.gone = gone


class UnknownModel(ServerFault):
    """The server does not know the name, as after a restart."""


class Patience:
    """How long one piece of work goes on after its first fault.

    Args:
        seconds: from the first fault to the last attempt.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._end = math.inf
        self._last = ""

    @property
    def left(self) -> float:
        """Seconds; infinite before the first fault."""
        return self._end - time.monotonic()

    def spend(self, server: VllmServer, fault: ServerFault) -> None:
        """Note a fault.

        Raises:
            RuntimeError: the time is up.
        """
        now = time.monotonic()
        self._end = min(self._end, now + self._seconds)
        self._last = f"{server.url}: {fault}"
        if now >= self._end:
            self.give_up()

    def give_up(self) -> NoReturn:
        """Say what happened last and what to do."""
        raise RuntimeError(
            f"no vLLM server gave a good answer within {self._seconds:g} s of the first fault; the "
            f"last was {self._last}. Look at that server's log, start it again and resume the run, "
            "or raise vllm_server_timeout so that the run waits while you do"
        )


class VllmServer:
    """One server.

    Args:
        url: its address without a path of the API, "http://host:8000" for example.
        request_timeout: seconds a completion may take.

    Attributes:
        in_flight: requests of this process that it has not answered.
        episodes: how many of this process it was given.
        faults: in a row.
        retry_at: not to be asked before, on the monotonic clock.
        restored_at: when this process last loaded an adapter that it had forgotten.
    """

    def __init__(self, url: str, request_timeout: float) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self._request_timeout = request_timeout
        self.in_flight = 0
        self.episodes = 0
        self.faults = 0
        self.retry_at = 0.0
        self.restored_at = 0.0

    def set_aside(self, jitter: float) -> None:
        """Leave it alone for a while; requests that fail together count once.

        Args:
            jitter: in [0, 1], spreads the next attempts of many processes.
        """
        if time.monotonic() >= self.retry_at:
            wait = min(LONGEST_WAIT, FIRST_WAIT * 2**self.faults)
            self.faults += 1
            self.retry_at = time.monotonic() + wait * (0.5 + jitter)

    async def base_model(self, client: httpx2.AsyncClient) -> str:
        """Name under which the server serves its base model."""
        answer = await self._ask(client, "GET", "/v1/models")
        payload = _json(answer) if answer.is_success else {}
        cards = payload.get("data") if isinstance(payload, dict) else None
        if not cards or not isinstance(cards, list) or not isinstance(cards[0].get("id"), str):
            raise ServerFault(f"GET /v1/models answered {_words(answer)}")
        return cards[0]["id"]

    async def complete(
        self,
        client: httpx2.AsyncClient,
        model: str,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        *,
        stop_ids: Collection[int],
        vocab_size: int,
    ) -> Generation:
        """Sample one action from `model`.

        Raises:
            ServerFault: no answer, or none to believe.
            RuntimeError: the server refused the request, which it would do again.
        """
        body = _completion_request(model, prompt_ids, sampling, stop_ids)
        answer = await self._ask(client, "POST", "/v1/completions", body, self._request_timeout)
        if answer.status_code == 404 and "does not exist" in answer.text:
            raise UnknownModel(f"the server does not know {model!r}")
        if answer.is_client_error:
            raise RuntimeError(
                f"the vLLM server at {self.url} refused a request of {len(prompt_ids)} prompt "
                f"tokens and at most {sampling.max_tokens} new ones: {_words(answer)}. Its "
                "--max-model-len must hold the longest prompt plus max_completion_length"
            )
        if not answer.is_success:
            raise ServerFault(f"HTTP {_words(answer)}")
        return parse_completion(
            _json(answer),
            prompt_ids,
            sampling,
            name=f"cmpl-{body['request_id']}",
            stop_ids=stop_ids,
            vocab_size=vocab_size,
        )

    async def load_adapter(self, client: httpx2.AsyncClient, name: str, folder: Path) -> None:
        """Make an adapter known; one that is known already is left as it is.

        Raises:
            ServerFault: no answer.
            RuntimeError: the server refused the adapter.
        """
        body = {"lora_name": name, "lora_path": str(folder)}
        answer = await self._ask(client, "POST", "/v1/load_lora_adapter", body)
        if answer.is_success or "already been loaded" in answer.text:
            return
        if answer.is_server_error:  # vLLM says 500 to an adapter it cannot use, and when it breaks
            health = await self._ask(client, "GET", "/health")
            if not health.is_success:
                raise ServerFault(f"HTTP {_words(answer)}")
        raise RuntimeError(
            f"the vLLM server at {self.url} refused to load the adapter in {folder}: "
            f"{_words(answer)}. It needs --enable-lora, a --max-lora-rank of at least the "
            "adapter's rank, VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 in its environment, and the same "
            "folder at the same path"
        )

    async def unload_adapter(self, client: httpx2.AsyncClient, name: str) -> None:
        """Forget an adapter; one that is not known is fine, as after a restart."""
        path = "/v1/unload_lora_adapter"
        answer = await self._ask(client, "POST", path, {"lora_name": name}, UNLOAD_SECONDS)
        if not answer.is_success and answer.status_code != 404:
            raise ServerFault(f"HTTP {_words(answer)}")

    async def _ask(
        self,
        client: httpx2.AsyncClient,
        method: str,
        path: str,
        body: Mapping[str, Any] | None = None,
        seconds: float = LOAD_SECONDS,
    ) -> httpx2.Response:
        scope = asyncio.timeout(seconds)
        try:
            async with scope:
                return await client.request(method, self.url + path, json=body)
        except TimeoutError:
            raise ServerFault(f"no answer to {path} within {seconds:g} s") from None
        except httpx2.TimeoutException as error:
            raise ServerFault(f"{type(error).__name__}: {error}") from error
        except httpx2.HTTPError as error:
            raise ServerFault(f"{type(error).__name__}: {error}", gone=True) from error


def _completion_request(
    model: str, prompt_ids: Sequence[int], sampling: Sampling, stop_ids: Collection[int]
) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": list(prompt_ids),
        "request_id": uuid.uuid4().hex,
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
        "seed": sampling.seed % 2**63,
        # Only our own ids end an action, not those of the server's copy of the configuration.
        "stop_token_ids": sorted(stop_ids),
        "ignore_eos": True,
        "logprobs": 0,  # the sampled token's alone
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
        # Spelled out because a server fills gaps from the model's generation_config.json.
        "n": 1,
        "top_p": 1.0,
        "top_k": 0,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "min_tokens": 0,
    }


def parse_completion(
    payload: Any,
    prompt_ids: Sequence[int],
    sampling: Sampling,
    *,
    name: str,
    stop_ids: Collection[int],
    vocab_size: int,
) -> Generation:
    """Read the answer to the request `name`.

    Raises:
        ServerFault: it is not an answer to that request, or contradicts itself.
    """
    try:
        (choice,) = payload["choices"]
        ids, reason = choice["token_ids"], choice["finish_reason"]
        logprobs, tokens = choice["logprobs"]["token_logprobs"], choice["logprobs"]["tokens"]
        answered, shown = payload["id"], choice["prompt_token_ids"]
        known = all(type(i) is int and 0 <= i < vocab_size for i in ids)
        finite = all(_is_logprob(value) for value in logprobs)
        whole = finite and len(logprobs) == len(ids)
        last_is_stop = ids[-1] in stop_ids
    except (TypeError, LookupError, ValueError) as error:
        text = f"an answer without what was asked for ({error!r}): {repr(payload)[:300]}"
        raise ServerFault(text) from error
    full = len(ids) == sampling.max_tokens
    checks = [
        (answered == name and shown == list(prompt_ids), "it answers another request"),
        (known, f"ids outside the vocabulary of {vocab_size}"),
        (tokens == [f"token_id:{i}" for i in ids], "logprobs of other tokens"),
        (whole, "not one logprob for each id"),
        (len(ids) <= sampling.max_tokens, f"more than {sampling.max_tokens} ids"),
        (
            reason == "stop" if last_is_stop else reason == "length" and full,
            f"finish_reason {reason!r} contradicts the ids",
        ),
    ]
    wrong = [complaint for holds, complaint in checks if not holds]
    if wrong:
        raise ServerFault(f"an answer not to believe, {'; '.join(wrong)}: {repr(choice)[:300]}")
    return Generation(tuple(ids), tuple(map(float, logprobs)), reason)


def _is_logprob(value: Any) -> bool:
    return (
        isinstance(value, int | float)
        and math.isfinite(value)
        and _LOWEST_LOGPROB < value <= 1e-4  # rounding may leave a certain token just above 0
    )


def _json(answer: httpx2.Response) -> Any:
    try:
        return answer.json()
    except ValueError as error:
        raise ServerFault(f"an answer that is no JSON: {answer.text[:200]!r}") from error


def _words(answer: httpx2.Response) -> str:
    """The status and what the server says about it."""
    try:
        message = answer.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = answer.text[:300]
    return f"{answer.status_code} {message}"
