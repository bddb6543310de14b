"""The vLLM engine against a server on loopback that speaks vLLM's routes and can misbehave.

The server reads adapters from the folder it is told and computes real logprobs of a tiny model;
only its choice of tokens is scripted. What a real server does: tests/test_vllm_server.py.
"""

from __future__ import annotations

import asyncio
import copy
import inspect
import json
import random
import select
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from trl.generation.vllm_client import VLLMClient

from agentr1.engines.base import Generation, Sampling
from agentr1.engines.vllm import VllmEngine
from agentr1.engines.vllm_server import FIRST_WAIT, ServerFault, parse_completion
from agentr1.engines.vllm_sync import lora_adapter, teacher_forced

STOP, VOCABULARY = 2, 512
PROMPT = (10, 11, 12)
ERRORS = {400: "BadRequestError", 404: "NotFoundError", 500: "InternalServerError"}


class LoopbackServer:
    """One vLLM server: `fault` says how it treats completions, `load` how it treats adapters."""

    def __init__(self, base: Any, port: int = 0) -> None:
        self.base = base
        self.adapters: dict[str, PeftModel] = {}
        self.asked: list[dict[str, Any]] = []
        self.loads: Counter[str] = Counter()
        self.unloads: list[str] = []
        self.fault = ""
        self.fault_count = 10**6  # completions that meet the fault
        self.load = ""
        self.before_load: Callable[[], object] = lambda: None
        self.hung_up = threading.Event()
        self.dead = threading.Event()
        self._lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"owner": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", port), handler)
        self._http.daemon_threads, self._http.block_on_close = True, False
        self.port = self._http.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def kill(self) -> None:
        self.dead.set()
        self._http.shutdown()
        self._http.server_close()

    def restarted(self) -> LoopbackServer:
        """As after SIGKILL and a new start: the same address, no adapter."""
        return LoopbackServer(self.base, self.port)

    def model(self, name: str) -> Any:
        """What answers under `name`; None if it is unknown."""
        if name == "base":
            return self.base
        found = self.adapters.get(name)
        return self.base if found is not None and self.load == "serves base" else found

    def load_adapter(self, name: str, path: str) -> tuple[int, Any]:
        self.before_load()
        with self._lock:  # two at once: the second hears that it is there
            self.loads[name] += 1
            if self.load in ("refuses", "breaks"):
                return _error(500, "LoRA rank 64 is greater than max_lora_rank 8.")
            if name in self.adapters:
                return _error(400, f"The lora adapter '{name}' has already been loaded.")
            if not (Path(path) / "adapter_config.json").exists():
                return _error(404, f"Loading lora {name} failed: No adapter found for {path}")
            if self.load == "serves old version":
                self.adapters[name] = next(iter(self.adapters.values()))
            else:
                base = copy.deepcopy(self.base)
                self.adapters[name] = PeftModel.from_pretrained(base, path).eval()
            return 200, "Success"

    def complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        model = self.model(body["model"])
        if model is None:
            return _error(404, f"The model `{body['model']}` does not exist.")
        if len(body["prompt"]) + body["max_tokens"] > 4096:
            return _error(400, "This model's maximum context length is 4096 tokens.")
        ids = scripted(body)
        temperature = 1.0 if self.fault == "raw logprobs" else body["temperature"]
        with self._lock:
            logprobs = teacher_forced(model, body["prompt"], ids, temperature)
        return 200, answer(body, ids, logprobs)


class _Handler(BaseHTTPRequestHandler):
    owner: LoopbackServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self.path == "/v1/models":
            return self._say(200, {"object": "list", "data": [{"id": "base"}]})
        return self._say(503 if self.owner.load == "breaks" else 200, "")

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/v1/load_lora_adapter":
            return self._say(*self.owner.load_adapter(body["lora_name"], body["lora_path"]))
        if self.path == "/v1/unload_lora_adapter":
            self.owner.unloads.append(body["lora_name"])
            known = self.owner.adapters.pop(body["lora_name"], None)
            return self._say(200, "Success") if known else self._say(*_error(404, "not found"))
        assert self.path == "/v1/completions", self.path
        self.owner.asked.append(body)
        fault = self.owner.fault if self.owner.fault_count > 0 else ""
        self.owner.fault_count -= bool(fault)
        if fault == "500":
            return self._say(*_error(500, "EngineCore encountered an issue."))
        if fault == "garbage":
            return self._say(200, "<html>hello</html>")
        if fault == "hangs":
            return self._hang()
        status, payload = self.owner.complete(body)
        if fault == "answers another request":
            payload["id"] = "cmpl-of-somebody-else"
        return self._say(status, payload)

    def _hang(self) -> None:
        """Say nothing until the client hangs up or the process dies."""
        while not self.owner.dead.is_set():
            if select.select([self.connection], [], [], 0.01)[0]:
                self.owner.hung_up.set()
                break
        self.close_connection = True

    def _say(self, status: int, payload: Any) -> None:
        data = (payload if isinstance(payload, str) else json.dumps(payload)).encode()
        try:
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Tests print nothing."""


def _error(status: int, message: str) -> tuple[int, dict[str, Any]]:
    return status, {"error": {"message": message, "type": ERRORS[status], "code": status}}


def scripted(body: dict[str, Any]) -> list[int]:
    """Up to five ids that depend on the request alone, the last a stop id where there is room."""
    draws = random.Random(repr((body["seed"], body["prompt"])))
    ids = [draws.randrange(3, VOCABULARY) for _ in range(body["max_tokens"])]
    return [*ids[:4], STOP] if body["stop_token_ids"] and len(ids) > 4 else ids


def answer(body: dict[str, Any], ids: list[int], logprobs: Any) -> dict[str, Any]:
    """The fields of vLLM 0.31's answer that are read, and one that is not."""
    choice = {
        "index": 0,
        "text": "...",
        "logprobs": {
            "token_logprobs": list(logprobs),
            "tokens": [f"token_id:{i}" for i in ids],
        },
        "finish_reason": "stop" if ids[-1] in body["stop_token_ids"] else "length",
        "token_ids": ids,
        "prompt_token_ids": body["prompt"],
    }
    return {"id": f"cmpl-{body['request_id']}", "model": body["model"], "choices": [choice]}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def base(make_model: Any) -> Any:
    """What the servers serve; shared, so nobody changes it."""
    return make_model()


@pytest.fixture
def policy(base: Any) -> PeftModel:
    """A LoRA policy whose adapter does something, the same in every test."""
    torch.manual_seed(0)
    return move(get_peft_model(copy.deepcopy(base), lora()).eval())


@pytest.fixture
def servers(base: Any) -> Iterator[list[LoopbackServer]]:
    """Two servers. A test may put a restarted one in its place."""
    started = [LoopbackServer(base) for _ in range(2)]
    yield started
    for server in started:
        if not server.dead.is_set():
            server.kill()


@pytest.fixture
def server(servers: list[LoopbackServer]) -> LoopbackServer:
    return servers[0]


def lora(**changes: Any) -> LoraConfig:
    values = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    return LoraConfig(**values | {"task_type": "CAUSAL_LM"} | changes)


@torch.no_grad()
def move(model: PeftModel, size: float = 0.1) -> PeftModel:
    """One training step, as far as a server can see."""
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight += size * torch.randn(weight.shape, generator=generator)
    return model


def make_engine(folder: Path, *servers: LoopbackServer, **arguments: Any) -> VllmEngine:
    values = {"name": "run", "adapters": folder, "timeout": 60.0, "request_timeout": 5.0}
    values |= {"stop_ids": [STOP], "vocab_size": VOCABULARY}
    return VllmEngine([server.url for server in servers], **values | arguments)


def ask(engine: VllmEngine, *samplings: Sampling, prompt: Any = PROMPT) -> list[Generation]:
    async def together() -> list[Generation]:
        return await asyncio.gather(*(engine.generate(prompt, s) for s in samplings))

    return asyncio.run(together())


def episodes(count: int, **changes: Any) -> list[Sampling]:
    return [Sampling(8, seed=i, episode=i, **changes) for i in range(count)]


def served_episodes(server: LoopbackServer) -> list[int]:
    """Seeds are episode numbers here; the probe has none of them."""
    return [body["seed"] for body in server.asked if tuple(body["prompt"]) == PROMPT]


# Sampling ---------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_answers_are_what_the_trained_model_gives(
    tmp_path: Path, policy: PeftModel, server: LoopbackServer, temperature: float
) -> None:
    engine = make_engine(tmp_path, server)
    engine.sync(policy)
    (stopped, cut) = ask(
        engine, Sampling(8, temperature, seed=3), Sampling(3, temperature, seed=3, episode=1)
    )
    assert stopped.finish_reason == "stop"
    assert stopped.ids[-1] == STOP
    assert (cut.finish_reason, len(cut.ids)) == ("length", 3)
    for generation in (stopped, cut):
        expected = teacher_forced(policy, PROMPT, generation.ids, temperature)
        assert generation.logprobs == pytest.approx(expected, abs=1e-5)


def test_a_request_says_everything_that_a_server_would_fill_in(
    tmp_path: Path, policy: PeftModel, server: LoopbackServer
) -> None:
    engine = make_engine(tmp_path, server)
    engine.sync(policy)
    ask(engine, Sampling(8, 0.7, seed=2**70 + 5))
    sent = server.asked[-1]
    assert (sent["model"], sent["prompt"]) == ("run-v1", list(PROMPT))
    assert (sent["temperature"], sent["seed"], sent["max_tokens"]) == (0.7, 5, 8)
    assert (sent["stop_token_ids"], sent["ignore_eos"]) == ([STOP], True)
    neutral = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    assert {key: sent[key] for key in neutral} == neutral
    assert len({body["request_id"] for body in server.asked}) == len(server.asked)


CORRUPTIONS = {
    "another request's id": ("id", "cmpl-x", "another request"),
    "another prompt": ("prompt_token_ids", [1], "another request"),
    "no ids": ("token_ids", [], "without what was asked"),
    "ids of another type": ("token_ids", ["5", 6, STOP], "vocabulary"),
    "booleans": ("token_ids", [True, 6, STOP], "vocabulary"),
    "an id beyond the vocabulary": ("token_ids", [VOCABULARY, 6, STOP], "vocabulary"),
    "a negative id": ("token_ids", [-1, 6, STOP], "vocabulary"),
    "ids that are no list": ("token_ids", None, "without what was asked"),
    "other tokens' logprobs": ("tokens", ["token_id:5"] * 3, "other tokens"),
    "too few logprobs": ("token_logprobs", [-1.0, -1.0], "one logprob for each"),
    "no logprob": ("token_logprobs", [-1.0, None, -1.0], "one logprob for each"),
    "a logprob of nothing": ("token_logprobs", [-1.0, -9999.0, -1.0], "one logprob for each"),
    "NaN": ("token_logprobs", [-1.0, float("nan"), -1.0], "one logprob for each"),
    "a positive logprob": ("token_logprobs", [-1.0, 0.3, -1.0], "one logprob for each"),
    "stopped without a stop id": ("token_ids", [5, 6, 7], "contradicts"),
    "cut at a stop id": ("finish_reason", "length", "contradicts"),
    "aborted": ("finish_reason", "abort", "contradicts"),
    "no choice": ("choices", [], "without what was asked"),
    "no mapping": ("choices", "hello", "without what was asked"),
}


@pytest.mark.parametrize("case", CORRUPTIONS)
def test_a_wrong_answer_is_not_believed(case: str) -> None:
    key, value, complaint = CORRUPTIONS[case]
    body = {"request_id": "1", "prompt": [7, 8], "stop_token_ids": [STOP], "model": "m"}
    payload = answer(body, [5, 6, STOP], [-1.0, -0.5, 0.0])

    def read(payload: Any) -> Generation:
        return parse_completion(
            payload, [7, 8], Sampling(4), name="cmpl-1", stop_ids={STOP}, vocab_size=VOCABULARY
        )

    assert read(payload) == Generation((5, 6, STOP), (-1.0, -0.5, 0.0), "stop")
    choice = payload["choices"][0]
    holder = next(d for d in (payload, choice, choice["logprobs"]) if key in d)
    holder[key] = value
    with pytest.raises(ServerFault, match=complaint):
        read(payload)


# Faults -----------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", ["500", "garbage", "answers another request"])
def test_a_fault_that_passes_is_not_noticed(
    tmp_path: Path, policy: PeftModel, server: LoopbackServer, fault: str
) -> None:
    engine = make_engine(tmp_path, server)
    engine.sync(policy)
    expected = ask(engine, *episodes(3))
    before = len(server.asked)
    server.fault, server.fault_count = fault, 2
    assert ask(engine, *episodes(3)) == expected
    assert len(server.asked) - before == 3 + 2  # each fault was asked again, and nothing else


def test_requests_that_fail_together_wait_once(
    tmp_path: Path, policy: PeftModel, server: LoopbackServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make_engine(tmp_path, server)
    engine.sync(policy)
    server.fault, server.fault_count = "500", 20
    waits, sleep = list[float](), asyncio.sleep

    async def noted(seconds: float) -> None:
        waits.append(seconds)
        await sleep(seconds)

    monkeypatch.setattr(asyncio, "sleep", noted)
    ask(engine, *episodes(20))
    # Not twenty waits, each twice the last; two or three where a busy machine fails them apart.
    assert FIRST_WAIT / 2 <= max(waits) < 8 * FIRST_WAIT


@pytest.mark.parametrize(
    ("fault", "said"),
    [("500", "EngineCore encountered"), ("garbage", "no JSON"), ("hangs", "within 0.3 s")],
)
def test_a_fault_that_stays_ends_with_what_happened(
    tmp_path: Path, policy: PeftModel, server: LoopbackServer, fault: str, said: str
) -> None:
    engine = make_engine(tmp_path, server, timeout=1.0, request_timeout=0.3)
    engine.sync(policy)
    server.fault = fault
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=said) as error:
        ask(engine, *episodes(1))
    assert 0.9 < time.monotonic() - start < 2.5
    assert server.url in str(error.value)
    assert "vllm_server_timeout" in str(error.value)


def test_one_hanging_request_is_asked_elsewhere(
    tmp_path: Path, policy: PeftModel, servers: list[LoopbackServer]
) -> None:
    engine = make_engine(tmp_path, *servers, request_timeout=0.5)
    engine.sync(policy)
    servers[0].fault, servers[0].fault_count = "hangs", 1
    assert len(ask(engine, *episodes(6))) == 6
    assert servers[0].hung_up.wait(1)  # the hanging request was not left behind
    moved = set(served_episodes(servers[0])) & set(served_episodes(servers[1]))
    assert len(moved) == 1


def test_a_refused_request_is_not_asked_again(
    tmp_path: Path, policy: PeftModel, server: LoopbackServer
) -> None:
    engine = make_engine(tmp_path, server)
    engine.sync(policy)
    before = len(server.asked)
    with pytest.raises(RuntimeError, match=r"maximum context length is 4096.*--max-model-len"):
        ask(engine, Sampling(8), prompt=[5] * 4090)
    assert len(server.asked) == before + 1


def test_a_cancelled_episode_hangs_up(
    tmp_path: Path, policy: PeftModel, server: LoopbackServer
) -> None:
    engine = make_engine(tmp_path, server)
    engine.sync(policy)
    server.fault = "hangs"

    async def cancel() -> None:
        task = asyncio.create_task(engine.generate(PROMPT, Sampling(8)))
        while not served_episodes(server):
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert task.cancelled()

    asyncio.run(cancel())
    assert server.hung_up.wait(1)


# Several servers --------------------------------------------------------------------------


def test_episodes_are_spread_and_stay(
    tmp_path: Path, policy: PeftModel, servers: list[LoopbackServer]
) -> None:
    engine = make_engine(tmp_path, *servers)
    engine.sync(policy)
    ask(engine, *episodes(8))
    for _ in range(2):  # alone each would go to the first server, in another order to the other
        ask(engine, *episodes(8)[::-1])
        for episode in episodes(8):
            ask(engine, episode)
    homes = [Counter(served_episodes(server)) for server in servers]
    assert [len(home) for home in homes] == [4, 4]
    assert all(count == 5 for home in homes for count in home.values())


def test_processes_start_with_different_servers(
    tmp_path: Path, policy: PeftModel, servers: list[LoopbackServer]
) -> None:
    for rank in range(2):
        engine = make_engine(tmp_path, *servers, rank=rank)
        engine.sync(policy)
        ask(engine, *episodes(1))
    assert [len(served_episodes(server)) for server in servers] == [1, 1]


def test_episodes_of_a_dead_server_move_and_the_others_stay(
    tmp_path: Path, policy: PeftModel, servers: list[LoopbackServer]
) -> None:
    engine = make_engine(tmp_path, *servers)
    engine.sync(policy)
    expected = ask(engine, *episodes(8))
    stayed = Counter(served_episodes(servers[1]))
    servers[0].kill()
    assert ask(engine, *episodes(8)) == expected
    now = Counter(served_episodes(servers[1]))
    assert set(now) == set(range(8))
    assert all(now[episode] == 2 for episode in stayed)


def test_a_server_that_comes_back_is_used_again(
    tmp_path: Path, policy: PeftModel, servers: list[LoopbackServer]
) -> None:
    engine = make_engine(tmp_path, *servers)
    engine.sync(policy)
    servers[0].fault, servers[0].fault_count = "500", 1
    ask(engine, *episodes(4))
    time.sleep(0.5)  # longer than the first fault's wait
    ask(engine, *(Sampling(8, seed=i, episode=i) for i in range(10, 12)))
    ask(engine, *(Sampling(8, seed=i, episode=i) for i in range(20, 30)))
    newcomers = [i for i in served_episodes(servers[0]) if i >= 20]
    assert len(newcomers) == 5


# A server that forgets --------------------------------------------------------------------


@pytest.mark.parametrize("rank", [0, 1])
def test_a_restarted_server_gets_the_adapter_back(
    tmp_path: Path, policy: PeftModel, servers: list[LoopbackServer], rank: int
) -> None:
    publisher = make_engine(tmp_path, servers[0])
    publisher.sync(policy)
    engine = publisher if rank == 0 else make_engine(tmp_path, servers[0], rank=rank)
    if rank:
        engine.sync(policy)
    expected = ask(engine, *episodes(6))
    servers[0].kill()

    def restart() -> None:
        time.sleep(0.5)
        servers[0] = servers[0].restarted()

    with ThreadPoolExecutor(1) as pool:
        back = pool.submit(restart)
        answers = ask(engine, *episodes(6))
        back.result()
    assert answers == expected
    assert servers[0].loads == {"run-v1": 1}  # six found out, one loaded


def test_a_server_that_cannot_load_it_again_holds_up_nobody(
    tmp_path: Path, policy: PeftModel, servers: list[LoopbackServer]
) -> None:
    engine = make_engine(tmp_path, *servers, timeout=1.5)
    engine.sync(policy)
    expected = ask(engine, *episodes(8))
    servers[0].kill()
    servers[0] = servers[0].restarted()
    servers[0].load = "breaks"
    servers[0].before_load = lambda: time.sleep(0.7)
    assert ask(engine, *episodes(8)) == expected  # the other server answers them all


def test_processes_that_load_again_do_not_disturb_each_other(
    tmp_path: Path, policy: PeftModel, servers: list[LoopbackServer]
) -> None:
    engines = [make_engine(tmp_path, servers[0], rank=rank) for rank in range(2)]
    for engine in engines:
        engine.sync(policy)
    servers[0].kill()
    servers[0] = servers[0].restarted()
    both_there = threading.Barrier(2)
    servers[0].before_load = lambda: both_there.wait(5)
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda engine: ask(engine, *episodes(3)), engines)
    assert first == second
    assert servers[0].loads == {"run-v1": 2}


def test_requests_under_way_survive_the_death_of_their_server(
    tmp_path: Path, policy: PeftModel, servers: list[LoopbackServer]
) -> None:
    engine = make_engine(tmp_path, servers[0])
    engine.sync(policy)
    expected = ask(engine, *episodes(4))
    servers[0].fault = "hangs"

    def restart() -> None:
        while len(served_episodes(servers[0])) < 8:
            time.sleep(0.01)
        servers[0].kill()
        servers[0] = servers[0].restarted()

    with ThreadPoolExecutor(1) as pool:
        back = pool.submit(restart)
        assert ask(engine, *episodes(4)) == expected
        back.result()


def test_a_server_that_never_learns_the_adapter_is_given_up(
    tmp_path: Path, policy: PeftModel, server: LoopbackServer
) -> None:
    engine = make_engine(tmp_path, server, timeout=1.0)
    engine.sync(policy)
    server.adapters = Forgetful()
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="does not know 'run-v1'"):
        ask(engine, *episodes(1))
    assert 0.9 < time.monotonic() - start < 2.5
    assert server.loads["run-v1"] < 10  # not in a tight loop


class Forgetful(dict[str, Any]):
    def __setitem__(self, key: str, value: Any) -> None:
        """Keep nothing."""


# Weights ----------------------------------------------------------------------------------


def test_a_new_version_replaces_the_old_one(
    tmp_path: Path, policy: PeftModel, servers: list[LoopbackServer]
) -> None:
    engine = make_engine(tmp_path / "adapters", *servers)
    for version in (1, 2, 3):
        engine.sync(move(policy))
        assert [list(server.adapters) for server in servers] == [[f"run-v{version}"]] * 2
        assert [path.name for path in (tmp_path / "adapters").iterdir()] == [f"run-v{version}"]
        (generation,) = ask(engine, *episodes(1))
        expected = teacher_forced(policy, PROMPT, generation.ids, 1.0)
        assert generation.logprobs == pytest.approx(expected, abs=1e-5)
    engine.close()
    assert [server.adapters for server in servers] == [{}, {}]
    assert list((tmp_path / "adapters").iterdir()) == []
    with pytest.raises(RuntimeError, match="call sync first"):
        ask(engine, *episodes(1))


def test_other_ranks_publish_nothing(
    tmp_path: Path, policy: PeftModel, server: LoopbackServer
) -> None:
    engines = [make_engine(tmp_path, server, rank=rank) for rank in range(2)]
    for _ in range(2):
        for engine in engines:
            engine.sync(policy)
    assert server.loads == {"run-v1": 1, "run-v2": 1}
    assert ask(engines[0], *episodes(2)) == ask(engines[1], *episodes(2))
    engines[1].close()
    assert list(server.adapters) == ["run-v2"]


def test_sync_works_inside_a_running_loop(
    tmp_path: Path, policy: PeftModel, server: LoopbackServer
) -> None:
    async def notebook_cell() -> None:
        engine = make_engine(tmp_path, server)
        engine.sync(policy)
        await engine.generate(PROMPT, Sampling(8))

    asyncio.run(notebook_cell())


def test_a_server_that_serves_its_base_is_caught(
    tmp_path: Path, policy: PeftModel, server: LoopbackServer
) -> None:
    server.load = "serves base"
    with pytest.raises(RuntimeError, match="serves its base model|does not serve what is trained"):
        make_engine(tmp_path, server).sync(policy)


def test_a_server_that_serves_an_old_version_is_caught(
    tmp_path: Path, policy: PeftModel, server: LoopbackServer
) -> None:
    engine = make_engine(tmp_path, server)
    engine.sync(policy)
    server.load = "serves old version"
    with pytest.raises(RuntimeError, match="took the new adapter but serves another one"):
        engine.sync(move(policy))


def test_a_server_that_serves_something_else_is_caught(
    tmp_path: Path, policy: PeftModel, server: LoopbackServer
) -> None:
    engine = make_engine(tmp_path, server)
    engine.sync(policy)
    server.load = "serves old version"
    with pytest.raises(RuntimeError, match="does not serve what is trained"):
        engine.sync(move(policy, -0.05))  # nearer to the old version than to the base


@pytest.mark.parametrize("size", [1e-4, 1e-2])
def test_the_base_is_told_from_a_small_adapter(
    tmp_path: Path, base: Any, server: LoopbackServer, size: float
) -> None:
    """Far below the tolerance: after the first steps of training an adapter is this small."""
    policy = move(get_peft_model(copy.deepcopy(base), lora()).eval(), size)
    make_engine(tmp_path / "right", server, name="right").sync(policy)
    server.load = "serves base"
    with pytest.raises(RuntimeError, match="took the new adapter but serves its base model"):
        make_engine(tmp_path / "wrong", server, name="wrong").sync(policy)


def test_an_adapter_that_does_nothing_is_no_reason_to_complain(
    tmp_path: Path, base: Any, server: LoopbackServer
) -> None:
    server.load = "serves base"
    make_engine(tmp_path, server).sync(get_peft_model(copy.deepcopy(base), lora()).eval())


def test_logprobs_before_temperature_are_caught(
    tmp_path: Path, policy: PeftModel, server: LoopbackServer
) -> None:
    server.fault = "raw logprobs"
    with pytest.raises(RuntimeError, match="--logprobs-mode processed_logprobs") as error:
        make_engine(tmp_path, server).sync(policy)
    assert "before temperature" in str(error.value)


def test_another_base_model_is_caught(
    tmp_path: Path, policy: PeftModel, make_model: Any, servers: list[LoopbackServer]
) -> None:
    servers[0].base = make_model(seed=1)
    with pytest.raises(RuntimeError, match="does not serve what is trained"):
        make_engine(tmp_path, servers[0]).sync(policy)


def test_a_refused_adapter_ends_with_the_servers_words(
    tmp_path: Path, policy: PeftModel, server: LoopbackServer
) -> None:
    server.load = "refuses"
    with pytest.raises(
        RuntimeError, match=r"rank 64 is greater than max_lora_rank 8.*--enable-lora"
    ):
        make_engine(tmp_path, server).sync(policy)
    assert server.loads["run-v1"] == 1


def test_a_server_that_breaks_while_loading_is_asked_again(
    tmp_path: Path, policy: PeftModel, server: LoopbackServer
) -> None:
    server.load = "breaks"
    threading.Timer(0.5, setattr, (server, "load", "")).start()
    make_engine(tmp_path, server).sync(policy)
    assert server.loads["run-v1"] > 1


def test_the_first_sync_waits_for_a_server_that_is_starting(
    tmp_path: Path,
    policy: PeftModel,
    servers: list[LoopbackServer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("agentr1.engines.vllm.STRAGGLER_SECONDS", 0.1)
    servers[0].kill()
    engine = make_engine(tmp_path, *servers)

    def start() -> None:
        time.sleep(0.5)
        servers[0] = servers[0].restarted()

    with ThreadPoolExecutor(1) as pool:
        back = pool.submit(start)
        engine.sync(policy)
        back.result()
    assert all("run-v1" in server.adapters for server in servers)


def test_a_later_sync_goes_on_without_a_dead_server(
    tmp_path: Path,
    policy: PeftModel,
    servers: list[LoopbackServer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("agentr1.engines.vllm.STRAGGLER_SECONDS", 0.3)
    engine = make_engine(tmp_path, *servers)
    engine.sync(policy)
    servers[0].kill()
    engine.sync(move(policy))
    assert len(ask(engine, *episodes(4))) == 4
    servers[0] = servers[0].restarted()
    servers[1].kill()
    (generation,) = ask(engine, Sampling(8, episode=9))  # finds a server that knows no version
    expected = teacher_forced(policy, PROMPT, generation.ids, 1.0)
    assert generation.logprobs == pytest.approx(expected, abs=1e-5)


def test_a_used_name_is_refused(tmp_path: Path, policy: PeftModel, server: LoopbackServer) -> None:
    make_engine(tmp_path, server).sync(policy)
    with pytest.raises(ValueError, match="give each start of a run a new name"):
        make_engine(tmp_path, server).sync(policy)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"bias": "lora_only"}, "bias='lora_only'"),
        ({"modules_to_save": ["norm"]}, r"modules_to_save=\['norm'\]"),
        ({"target_modules": ["q_proj", "lm_head"]}, "target_modules=.*head"),
        ({"target_modules": ["q_proj", "embed_tokens"]}, "target_modules=.*embeddings"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    ],
)
def test_what_vllm_cannot_load_is_refused_with_the_reason(
    base: Any, changes: dict[str, Any], named: str
) -> None:
    model: Any = get_peft_model(copy.deepcopy(base), lora(**changes))
    with pytest.raises(ValueError, match=named) as error:
        lora_adapter(model)
    assert "sample in process" in str(error.value)


def test_two_active_adapters_are_refused(policy: PeftModel) -> None:
    policy.add_adapter("second", lora())
    policy.base_model.set_adapter(["default", "second"])
    with pytest.raises(ValueError, match="serves one adapter"):
        lora_adapter(policy)


def test_an_adapter_of_another_name_is_saved_where_the_server_looks(
    tmp_path: Path, base: Any, server: LoopbackServer
) -> None:
    policy = get_peft_model(copy.deepcopy(base), lora(), adapter_name="policy").eval()
    make_engine(tmp_path, server).sync(move(policy))
    assert list(server.adapters) == ["run-v1"]


# Whole weights ----------------------------------------------------------------------------


def test_whole_weights_need_cuda(tmp_path: Path, base: Any, server: LoopbackServer) -> None:
    with pytest.raises(ValueError, match=r"NCCL, which needs CUDA.*use_peft: true"):
        make_engine(tmp_path, server).sync(base)


def test_whole_weights_do_not_survive_their_server(
    tmp_path: Path,
    base: Any,
    servers: list[LoopbackServer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # In place of the NCCL transport, which needs two GPUs: the server has the weights already.
    class Delivered:
        def __init__(self, *_: object) -> None: ...

        def send(self, model: Any) -> None: ...

    monkeypatch.setattr("agentr1.engines.vllm.WeightStream", Delivered)
    engine = make_engine(tmp_path, servers[0])
    engine.sync(base)
    (generation,) = ask(engine, *episodes(1))
    expected = teacher_forced(base, PROMPT, generation.ids, 1.0)
    assert generation.logprobs == pytest.approx(expected, abs=1e-5)
    servers[0].kill()
    with pytest.raises(RuntimeError, match="resume the run from its last checkpoint"):
        ask(engine, *episodes(1))


def test_trls_transport_is_as_it_is_written_against() -> None:
    parameters = {
        "__init__": ["base_url", "group_port", "connection_timeout"],
        "init_communicator": ["device"],
        "update_model_params": ["model"],
        "reset_prefix_cache": [],
        "close_communicator": [],
    }
    for name, expected in parameters.items():
        signature = inspect.signature(getattr(VLLMClient, name))
        assert set(expected) <= set(signature.parameters), name
        rest = [p for p in signature.parameters.values() if p.name not in ("self", *expected)]
        assert all(p.default is not inspect.Parameter.empty for p in rest), name


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"urls": []}, "http://localhost:8000"),
        ({"urls": ["localhost:8000"]}, "http://localhost:8000"),
        ({"timeout": 0.0}, "more than 0"),
        ({"request_timeout": -1.0}, "more than 0"),
    ],
)
def test_arguments_that_cannot_be_right(tmp_path: Path, changes: dict[str, Any], said: str) -> None:
    values: dict[str, Any] = {"urls": ["http://localhost:8000"], "name": "run", "stop_ids": [2]}
    with pytest.raises(ValueError, match=said):
        VllmEngine(**values | {"vocab_size": 512, "adapters": tmp_path} | changes)
