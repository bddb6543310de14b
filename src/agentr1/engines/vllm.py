"""Sampling on one or several `vllm serve` servers over HTTP: token ids in, ids and logprobs out.

Each process sends its own requests, so no collective runs inside a rollout. A request that meets
a fault of its server is sent again, elsewhere where there is an elsewhere, until it is answered
or its time is up. Called by the rollout (`generate`) and the trainer (`sync`). `vllm_server`
knows what an answer is, `vllm_sync` how weights travel; this module decides which server, which
version and when to give up.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import random
import shutil
import ssl
import time
from collections.abc import Awaitable, Callable, Collection, Sequence
from pathlib import Path
from typing import Any, TypeVar

import httpx2
from peft import PeftModel

from agentr1.engines.base import Engine, Generation, Sampling
from agentr1.engines.vllm_server import Patience, ServerFault, UnknownModel, VllmServer
from agentr1.engines.vllm_sync import (
    PROBE,
    Served,
    WeightStream,
    check_served,
    lora_adapter,
    save_adapter,
)
from agentr1.loops import finish

_LOGGER = logging.getLogger(__name__)

STRAGGLER_SECONDS = 20.0
"""How long a sync waits for other servers once one is ready; the run goes on without them."""

CONNECT_SECONDS = 10.0
"""To connect; what an answer may take is another matter."""

_Result = TypeVar("_Result")


@dataclasses.dataclass(eq=False, slots=True)
class _Session:
    """What belongs to one event loop; each rollout runs in its own."""

    loop: asyncio.AbstractEventLoop
    client: httpx2.AsyncClient
    loading: dict[str, asyncio.Lock]


class VllmEngine(Engine):
    """One policy on one or several vLLM servers.

    A `PeftModel` with LoRA is synced as an adapter (files in a folder that the servers read); any
    other model as whole weights through TRL's NCCL transport (not measured: it needs two GPUs).

    Args:
        urls: base addresses of the servers, "http://host:8000" for example; all serve the same
            base model.
        stop_ids: ids that end an action.
        vocab_size: ids below it are valid; rows of the model's output embedding.
        name: of the policy on the servers. New for every start of a run (vLLM keeps the prefix
            cache of a name) and equal on all its processes: a random id that rank 0 broadcasts.
        adapters: folder for adapter versions, at the same path for the servers; made if missing.
        rank: of this process. Rank 0 publishes weights, the others count versions along.
        timeout: seconds a request goes on trying after its first fault, and a server may take to
            come up; `vllm_server_timeout` in TRL's words.
        request_timeout: seconds one request may take before it counts as hanging.
        tolerance: mean difference of a probe's logprobs between server and trained model that
            is put down to rounding.
        group_port: of the NCCL group for whole weights, one up for each further server.

    Raises:
        ValueError: an argument cannot be right.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        stop_ids: Sequence[int],
        vocab_size: int,
        name: str,
        adapters: Path,
        rank: int = 0,
        timeout: float = 240.0,
        request_timeout: float = 600.0,
        tolerance: float = 0.1,
        group_port: int = 51216,
    ) -> None:
        if not urls or not all(url.startswith(("http://", "https://")) for url in urls):
            raise ValueError(
                f"vLLM servers are named by addresses like http://localhost:8000, got {list(urls)}"
            )
        if min(timeout, request_timeout, tolerance) <= 0:
            raise ValueError(
                "timeout, request_timeout and tolerance must be more than 0, got "
                f"{timeout}, {request_timeout}, {tolerance}"
            )
        # Each process starts with another server, so that few episodes of many processes spread.
        turned = [*urls[rank % len(urls) :], *urls[: rank % len(urls)]]
        self._servers = [VllmServer(url, request_timeout) for url in turned]
        self._stop_ids = frozenset(stop_ids)
        self._vocab_size = vocab_size
        self._name = name
        self._adapters = adapters.resolve()
        self._rank = rank
        self._timeout = timeout
        self._tolerance = tolerance
        self._group_port = group_port
        self._homes: dict[int, VllmServer] = {}
        self._version = 0
        self._model = ""
        self._stream: WeightStream | None = None
        self._session: _Session | None = None
        self._tls = ssl.create_default_context()  # once: it takes longer than a request
        # Its own generator: back-off must not move the draws of the run.
        self._jitter = random.Random()

    # Rollout ------------------------------------------------------------------------------

    async def generate(self, prompt_ids: Sequence[int], sampling: Sampling) -> Generation:
        """Sample one action; see `Engine.generate`.

        Raises:
            RuntimeError: no server gave a right answer in time, or one refused the request.
        """
        if not self._model:
            raise RuntimeError("no weights are on the vLLM servers yet; call sync first")
        patience = Patience(self._timeout)
        forgotten = 0
        while True:
            server = await self._choose(sampling.episode, patience)
            server.in_flight += 1
            asked_at = time.monotonic()
            try:
                generation = await self._complete(
                    server, self._model, prompt_ids, sampling, stop_ids=self._stop_ids
                )
            except UnknownModel as fault:
                forgotten += 1
                self._note(server, fault, patience, set_aside=forgotten > 1)
                await self._restore(server, patience, asked_at)
            except ServerFault as fault:
                self._note(server, fault, patience)
            else:
                server.faults = 0
                return generation
            finally:
                server.in_flight -= 1

    async def _complete(
        self,
        server: VllmServer,
        model: str,
        prompt_ids: Sequence[int],
        sampling: Sampling,
        *,
        stop_ids: Collection[int],
    ) -> Generation:
        return await server.complete(
            self._open().client,
            model,
            prompt_ids,
            sampling,
            stop_ids=stop_ids,
            vocab_size=self._vocab_size,
        )

    async def _choose(self, episode: int, patience: Patience) -> VllmServer:
        """The episode's own server while it is sound, else the least loaded sound one.

        A server that met a fault is tried by one newcomer after its wait. When none is sound, all
        wait for the first whose wait is over.
        """
        home = self._homes.get(episode)
        if home is not None and not home.faults:
            return home
        now = time.monotonic()
        sound = [s for s in self._servers if not s.faults]
        due = [s for s in self._servers if s.faults and s.retry_at <= now]
        if due and sound:
            server = due[0]
            server.set_aside(self._jitter.random())  # the next newcomer goes elsewhere
        elif due or sound:
            server = min(sound or due, key=lambda s: (s.in_flight, s.episodes))
        else:
            server = min(self._servers, key=lambda s: s.retry_at)
            wait = (server.retry_at - now) * (1 + 0.1 * self._jitter.random())
            await asyncio.sleep(min(wait, max(0.0, patience.left)))
        if server is not home:
            self._homes[episode] = server
            server.episodes += 1
        return server

    def _note(
        self, server: VllmServer, fault: ServerFault, patience: Patience, set_aside: bool = True
    ) -> None:
        """Count a fault; raises where the policy cannot have survived it or the time is up."""
        lost = fault.gone or isinstance(fault, UnknownModel)
        if lost and not self._version:
            raise RuntimeError(
                f"the vLLM server at {server.url} was lost ({fault}) with the weights streamed to "
                "it, which a restarted server does not have; start it again and resume the run "
                "from its last checkpoint. Adapters (use_peft: true) survive a restart"
            )
        if set_aside:
            self._set_aside(server, fault)
        patience.spend(server, fault)

    def _set_aside(self, server: VllmServer, fault: ServerFault) -> None:
        """Leave a server alone for a while, and say so at the first fault in a row."""
        if not server.faults:
            _LOGGER.warning(
                "the vLLM server at %s: %s; going on for %g s without a good answer of it",
                server.url,
                fault,
                self._timeout,
            )
        server.set_aside(self._jitter.random())

    async def _restore(self, server: VllmServer, patience: Patience, asked_at: float) -> None:
        """Load the current adapter again on a server that has forgotten it.

        Many requests find out together: the first loads, the others wait for it. Loading is safe
        to repeat, so processes need not agree.
        """
        session = self._open()
        async with session.loading.setdefault(server.url, asyncio.Lock()):
            if server.restored_at > asked_at or server.retry_at > time.monotonic():
                return  # it has been loaded meanwhile, or could not be: ask elsewhere
            try:
                await server.load_adapter(session.client, self._model, self._folder)
                server.restored_at = time.monotonic()
            except ServerFault as fault:
                self._note(server, fault, patience)

    def _open(self) -> _Session:
        """The session of the running loop."""
        loop = asyncio.get_running_loop()
        if self._session is None or self._session.loop is not loop:
            # Connections are not kept: their loop ends with the rollout, and a restarted server
            # would meet half-dead ones.
            limits = httpx2.Limits(max_connections=None, max_keepalive_connections=0)
            timeout = httpx2.Timeout(None, connect=CONNECT_SECONDS)
            client = httpx2.AsyncClient(
                limits=limits, timeout=timeout, verify=self._tls, trust_env=False
            )
            self._session = _Session(loop, client, {})
        return self._session

    # Weights ------------------------------------------------------------------------------

    def sync(self, model: Any) -> None:
        """Make the weights of `model` live on every server; see `Engine.sync`.

        No collective operation: rank 0 publishes and checks, the others count the version along.
        The caller must keep them from generating before rank 0 is through (a barrier), and carry
        rank 0's failure to all.

        Args:
            model: in evaluation mode, since its own logprobs are what the servers are held to.

        Raises:
            ValueError: vLLM cannot load this adapter, or weights cannot travel.
            RuntimeError: a server refused them, or does not serve what is trained.
        """
        self._homes.clear()
        if isinstance(model, PeftModel):
            self._sync_adapter(model)
        else:
            self._sync_weights(model)

    @property
    def _folder(self) -> Path:
        return self._adapters / self._model

    def _sync_adapter(self, model: PeftModel) -> None:
        adapter = lora_adapter(model)
        old, old_folder = self._model, self._folder
        self._version += 1
        self._model = f"{self._name}-v{self._version}"
        if self._rank:
            return
        if self._folder.exists():
            raise ValueError(
                f"{self._folder} exists, so another run has used the name {self._name!r}, whose "
                "cached prefixes a server may still hold; give each start of a run a new name"
            )
        self._adapters.mkdir(parents=True, exist_ok=True)
        save_adapter(model, adapter, self._folder)
        for served in finish(self._publish()):
            check_served(model, self._probe_ids, served, self._tolerance)
        if old:
            finish(self._forget(old))
            shutil.rmtree(old_folder, ignore_errors=True)

    def _sync_weights(self, model: Any) -> None:
        if self._rank == 0:
            if self._stream is None:
                urls = [server.url for server in self._servers]
                self._stream = WeightStream(urls, self._group_port, self._timeout, model.device)
            self._stream.send(model)
        self._model = finish(self._patiently(self._servers[0], self._base_model))
        if self._rank == 0:
            for served in finish(self._publish()):
                check_served(model, self._probe_ids, served, self._tolerance)

    @property
    def _probe_ids(self) -> list[int]:
        """Some prompt; low ids are ordinary tokens in every vocabulary."""
        return random.Random(0).choices(range(min(512, self._vocab_size)), k=16)

    async def _publish(self) -> list[Served]:
        """Offer the weights to all servers and collect what they answer to the probe.

        At the first sync every server must take them. Later ones that do not come in time are
        left out: they learn of them when they are asked for them.
        """
        first = self._version <= 1
        expected = [s for s in self._servers if first or not s.faults] or self._servers
        tasks = {s: asyncio.create_task(self._patiently(s, self._offer)) for s in self._servers}
        try:
            await asyncio.wait(tasks.values(), return_when=asyncio.FIRST_COMPLETED)
            await asyncio.wait(
                [tasks[s] for s in expected],
                timeout=None if first else STRAGGLER_SECONDS,
                return_when=asyncio.FIRST_EXCEPTION,
            )
            return [task.result() for task in tasks.values() if task.done()]
        finally:
            for server, task in tasks.items():
                if task.cancel():
                    server.set_aside(self._jitter.random())
            await asyncio.gather(*tasks.values(), return_exceptions=True)

    async def _offer(self, server: VllmServer) -> Served:
        where = f"the vLLM server at {server.url}"
        base = await self._base_model(server)
        if not self._version:
            policy = await self._complete(server, base, self._probe_ids, PROBE, stop_ids=())
            return Served(where, policy, None)
        await server.load_adapter(self._open().client, self._model, self._folder)
        # One after the other: vLLM on a CPU gives base requests that share a batch with an
        # adapter's that adapter's weights.
        plain = await self._complete(server, base, self._probe_ids, PROBE, stop_ids=())
        policy = await self._complete(server, self._model, self._probe_ids, PROBE, stop_ids=())
        return Served(where, policy, plain)

    async def _base_model(self, server: VllmServer) -> str:
        return await server.base_model(self._open().client)

    async def _patiently(
        self, server: VllmServer, work: Callable[[VllmServer], Awaitable[_Result]]
    ) -> _Result:
        """Do `work` with one server, again and again until its time is up."""
        patience = Patience(self._timeout)
        while True:
            try:
                result = await work(server)
            except ServerFault as fault:
                self._set_aside(server, fault)
                patience.spend(server, fault)
                await asyncio.sleep(max(0.0, server.retry_at - time.monotonic()))
            else:
                server.faults = 0
                return result

    async def _forget(self, model: str) -> None:
        """Unload an adapter where it can be done; a server that is away has lost it anyway."""
        client = self._open().client
        unloads = [server.unload_adapter(client, model) for server in self._servers]
        for outcome in await asyncio.gather(*unloads, return_exceptions=True):
            if isinstance(outcome, BaseException) and not isinstance(outcome, ServerFault):
                raise outcome

    def close(self) -> None:
        """Unload the policy from the servers and delete its files (rank 0)."""
        if self._stream is not None:
            self._stream.close()
        if self._model and self._version and not self._rank:
            finish(self._forget(self._model))
            shutil.rmtree(self._folder, ignore_errors=True)
        self._model = ""
