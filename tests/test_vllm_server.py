"""The vLLM engine on real `vllm serve` processes: a CPU, the quickstart policy, no network.

`make test-vllm` installs vLLM into an environment of its own and runs this. What the engine does
with a server that misbehaves is in tests/engines/test_vllm.py.
"""

from __future__ import annotations

import asyncio
import copy
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from agentr1.codec import Codec
from agentr1.engines.base import Generation, Sampling
from agentr1.engines.vllm import VllmEngine
from agentr1.engines.vllm_sync import save_adapter, teacher_forced
from agentr1.rollout import Limits, rollout_batch
from agentr1.segments import flatten
from agentr1.types import Message, StepResult
from fakes import GuessEnv

ROOT = Path(__file__).resolve().parents[1]
POLICY = ROOT / "data" / "quickstart" / "policy"
# Not resolved: a link to the interpreter is what makes a virtual environment one.
PYTHON = str(ROOT / os.environ.get("VLLM_PYTHON", ".venv-vllm/bin/python"))
OPTIONS = (
    *("--dtype", "float32", "--enforce-eager", "--max-model-len", "1024"),
    *("--enable-lora", "--max-lora-rank", "8", "--max-loras", "2"),
    *("--logprobs-mode", "processed_logprobs"),
)
SETTINGS = {
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
STOP, VOCABULARY = 2, 947
MAX_ERROR = 1e-4
"""Logprobs against transformers in fp32; measured 5.5e-6 at most."""

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(900)]


class Server:
    """A vLLM server process of its own process group."""

    def __init__(self, log: Path, options: Sequence[str] = OPTIONS) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = log
        self.options = options
        self.start()

    def start(self) -> None:
        # The console script `vllm` of this wheel looks itself up under another name and fails.
        module = (PYTHON, "-m", "vllm.entrypoints.openai.api_server")
        place = ("--model", str(POLICY), "--host", "127.0.0.1", "--port", str(self.port))
        with self.log.open("a") as log:
            self.process = subprocess.Popen(
                [*module, *place, *self.options],
                cwd=self.log.parent,
                env={**os.environ, **SETTINGS},
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait(self) -> Server:
        deadline = time.monotonic() + 300
        while not self.healthy():
            assert self.process.poll() is None, self.log.read_text()[-4000:]
            assert time.monotonic() < deadline, self.log.read_text()[-4000:]
            time.sleep(0.5)
        return self

    def healthy(self) -> bool:
        try:
            return httpx2.get(f"{self.url}/health", timeout=2, trust_env=False).is_success
        except httpx2.HTTPError:
            return False

    def kill(self) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def models(self) -> list[str]:
        """Names of the adapters it knows."""
        cards = httpx2.get(f"{self.url}/v1/models", trust_env=False).json()["data"]
        return [card["id"] for card in cards if card["parent"] is not None]

    def metric(self, name: str) -> float:
        """Sum of a Prometheus metric over its labels."""
        text = httpx2.get(f"{self.url}/metrics", trust_env=False).text
        return sum(float(v) for v in re.findall(rf"^vllm:{name}{{.*}} (\S+)$", text, re.MULTILINE))

    def settled(self, name: str) -> float:
        """The same once it has stopped moving: the server publishes seconds later."""
        last = math.nan
        while (value := self.metric(name)) != last:
            last = value
            time.sleep(12)
        return value


@pytest.fixture(scope="module")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    folder = tmp_path_factory.mktemp("vllm")
    started = [Server(folder / f"{i}.log") for i in range(2)]
    try:
        yield [server.wait() for server in started]
    finally:
        for server in started:
            server.kill()


@pytest.fixture(scope="module")
def server(servers: list[Server]) -> Server:
    return servers[0]


@pytest.fixture(scope="module")
def base() -> Any:
    return AutoModelForCausalLM.from_pretrained(POLICY, dtype=torch.float32).eval()


@pytest.fixture
def policy(base: Any) -> PeftModel:
    return move(get_peft_model(copy.deepcopy(base), lora()).eval())


def lora(**changes: Any) -> LoraConfig:
    values = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return LoraConfig(**values | changes)


@torch.no_grad()
def move(model: PeftModel, seed: int = 0, size: float = 0.02) -> PeftModel:
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            weight += size * torch.randn(weight.shape, generator=generator)
    return model


def make_engine(folder: Path, *servers: Server, **arguments: Any) -> VllmEngine:
    values = {"stop_ids": [STOP], "vocab_size": VOCABULARY, "adapters": folder, "timeout": 240.0}
    values |= {"name": f"test-{uuid.uuid4().hex[:8]}"}
    return VllmEngine([server.url for server in servers], **values | arguments)


async def all_at_once(
    engine: VllmEngine, requests: Sequence[tuple[Sequence[int], Sampling]]
) -> list[Generation]:
    return await asyncio.gather(*(engine.generate(*request) for request in requests))


async def one_by_one(
    engine: VllmEngine, requests: Sequence[tuple[Sequence[int], Sampling]]
) -> list[Generation]:
    return [await engine.generate(*request) for request in requests]


def requests_of(count: int, temperatures: Sequence[float] = (1.0,)) -> list[Any]:
    """Prompts of 3 to 300 tokens: some share a cached prefix, some do not."""
    shared = [3 + i % 500 for i in range(280)]
    return [
        (
            (shared if i % 2 else [])[: 280 - i] + [300 + i, 7, 8],
            Sampling(60, temperatures[i % len(temperatures)], seed=10**15 + i, episode=i),
        )
        for i in range(count)
    ]


def largest_error(model: Any, requests: Sequence[Any], answers: Sequence[Generation]) -> float:
    return max(
        abs(theirs - ours)
        for (prompt, sampling), generation in zip(requests, answers, strict=True)
        for theirs, ours in zip(
            generation.logprobs,
            teacher_forced(model, prompt, generation.ids, sampling.temperature),
            strict=True,
        )
    )


def test_logprobs_are_those_of_the_trained_model(
    tmp_path: Path, policy: PeftModel, server: Server
) -> None:
    engine = make_engine(tmp_path, server)
    engine.sync(policy)
    requests = requests_of(24, (0.0, 0.5, 1.0, 1.5))
    answers = asyncio.run(all_at_once(engine, requests))
    again = asyncio.run(all_at_once(engine, requests))  # from cached prefixes
    assert {a.finish_reason for a in answers} == {"stop", "length"}
    assert largest_error(policy, requests, answers) < MAX_ERROR
    assert largest_error(policy, requests, again) < MAX_ERROR
    engine.close()


def test_a_seeded_request_does_not_depend_on_the_others(
    tmp_path: Path, policy: PeftModel, server: Server
) -> None:
    engine = make_engine(tmp_path, server)
    engine.sync(policy)
    requests = requests_of(12, (0.0, 1.0))
    together = asyncio.run(all_at_once(engine, requests))
    alone = asyncio.run(one_by_one(engine, requests))
    assert [a.ids for a in together] == [a.ids for a in alone]
    prompt, sampling = requests[1]
    others = [(prompt, Sampling(60, 1.0, seed=i)) for i in range(4)]
    assert len({a.ids for a in asyncio.run(all_at_once(engine, others))}) > 1
    engine.close()


def test_each_sync_is_live_and_leaves_nothing_behind(
    tmp_path: Path, policy: PeftModel, servers: list[Server]
) -> None:
    engine = make_engine(tmp_path, *servers)
    requests = requests_of(8)
    for version in (1, 2, 3):
        before = copy.deepcopy(policy)
        engine.sync(move(policy, seed=version))
        answers = asyncio.run(all_at_once(engine, requests))
        assert largest_error(policy, requests, answers) < MAX_ERROR
        assert largest_error(before, requests, answers) > 100 * MAX_ERROR
        assert [len(server.models()) for server in servers] == [1, 1]
        assert [path.suffix for path in tmp_path.iterdir()] == [""]
        assert [path.name[-3:] for path in tmp_path.iterdir()] == [f"-v{version}"]
    engine.close()
    assert [server.models() for server in servers] == [[], []]


@pytest.mark.parametrize("size", [0.02, 1e-4])
def test_a_server_that_serves_the_base_is_caught(
    tmp_path: Path, base: Any, server: Server, size: float
) -> None:
    """Another adapter sits under the name already: one that does nothing."""
    name = f"taken-{uuid.uuid4().hex[:8]}"
    empty = get_peft_model(copy.deepcopy(base), lora())
    save_adapter(empty, "default", tmp_path / "empty")
    body = {"lora_name": f"{name}-v1", "lora_path": str(tmp_path / "empty")}
    httpx2.post(f"{server.url}/v1/load_lora_adapter", json=body, timeout=60, trust_env=False)
    engine = make_engine(tmp_path / "adapters", server, name=name)
    with pytest.raises(RuntimeError, match="took the new adapter but serves its base model"):
        engine.sync(move(empty.eval(), size=size))
    engine.close()


def test_a_refused_adapter_ends_with_the_servers_words(
    tmp_path: Path, base: Any, server: Server
) -> None:
    policy = get_peft_model(copy.deepcopy(base), lora(r=64)).eval()
    with pytest.raises(RuntimeError, match=r"rank 64 is greater than max_lora_rank 8"):
        make_engine(tmp_path, server).sync(policy)
    assert server.healthy()


def test_episodes_stay_with_their_server(
    tmp_path: Path, policy: PeftModel, servers: list[Server]
) -> None:
    engine = make_engine(tmp_path, *servers)
    engine.sync(policy)
    counter, cached = "request_success_total", "prefix_cache_hits_total"
    before = [(server.settled(counter), server.metric(cached)) for server in servers]
    prompts = {i: [3 + i] * 130 for i in range(8)}

    async def play() -> None:
        for turn in range(3):
            turns = [(prompts[i], Sampling(20, seed=100 * turn + i, episode=i)) for i in range(8)]
            for i, answer in enumerate(await all_at_once(engine, turns)):
                prompts[i] = [*prompts[i], *answer.ids, 5, 6]

    asyncio.run(play())
    after = [(server.settled(counter), server.metric(cached)) for server in servers]
    assert [b[0] - a[0] for a, b in zip(before, after, strict=True)] == [12, 12]
    # A block of 128 tokens was found in each of the 4 x 2 later turns of each server.
    assert all(b[1] - a[1] >= 8 * 128 for a, b in zip(before, after, strict=True))
    engine.close()


def test_a_cancelled_episode_stops_on_the_server(
    tmp_path: Path, policy: PeftModel, server: Server
) -> None:
    engine = make_engine(tmp_path, server, stop_ids=[])
    engine.sync(policy)

    async def cancel_one_and_finish_another() -> None:
        task = asyncio.create_task(engine.generate([5] * 8, Sampling(900)))
        await asyncio.sleep(0.5)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await engine.generate([6] * 8, Sampling(900))  # time enough for the other, were it alive

    before = server.settled("generation_tokens_total")
    asyncio.run(cancel_one_and_finish_another())
    grown = server.settled("generation_tokens_total") - before
    assert 900 <= grown < 1700  # both would be 1800
    engine.close()


class KillingEnv(GuessEnv):
    """Never solved; the fourth step of all kills the server, which is then started again."""

    steps = 0
    server: Server
    restart: threading.Timer

    async def step(self, message: Message) -> StepResult:
        KillingEnv.steps += 1
        if KillingEnv.steps == 4:
            self.server.kill()
            KillingEnv.restart = threading.Timer(1.0, self.server.start)
            KillingEnv.restart.start()
        return StepResult((Message("user", "Again."),))


@pytest.mark.parametrize("alone", [True, False])
def test_a_rollout_survives_the_death_of_a_server(
    tmp_path: Path, policy: PeftModel, servers: list[Server], alone: bool
) -> None:
    KillingEnv.steps, KillingEnv.server = 0, servers[0]
    engine = make_engine(tmp_path, *(servers[:1] if alone else servers))
    engine.sync(policy)
    tokenizer = AutoTokenizer.from_pretrained(POLICY)
    rows = [{"id": i, "secret": 3} for i in range(6)]
    trajectories = asyncio.run(
        rollout_batch(
            rows,
            KillingEnv,
            Codec(tokenizer, [], str(POLICY)),
            engine,
            limits=Limits(max_turns=5, max_turn_tokens=24, max_completion_length=700),
            samplings=[Sampling(1, seed=i, episode=i) for i in range(6)],
        )
    )
    assert [len(t.turns) for t in trajectories] == [5] * 6
    KillingEnv.restart.join()
    servers[0].wait()
    for trajectory in trajectories:
        (segment,) = flatten(trajectory)
        ours = teacher_forced(policy, segment.prompt_ids, segment.completion_ids, 1.0)
        pairs = zip(segment.logprobs, ours, segment.loss_mask, strict=True)
        assert max(abs(a - b) for a, b, trained in pairs if trained) < MAX_ERROR
    if alone:
        assert [name[-3:] for name in servers[0].models()] == ["-v1"]
    engine.close()


# In the training process ------------------------------------------------------------------


@pytest.mark.parametrize("processes", [1, 2])
def test_the_colocated_engine(processes: int) -> None:
    """In vLLM's environment, which has agentr1 too; processes need not take equally many steps."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [PYTHON, *(launcher if processes > 1 else [])]
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [*command, str(ROOT / "tests" / "colocated_worker.py"), str(POLICY)],
        env={**os.environ, **SETTINGS, "VLLM_CPU_OMP_THREADS_BIND": "nobind", "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"random')]
    assert len(found) == processes
    for process in found:
        assert process["random_state_kept"]
        assert process["error"] < MAX_ERROR
        assert process["reasons"] == ["length", "stop"]
        assert process["repeats"]
        assert process["cancelled"]
        assert "took the new adapter but serves its base model" in process["base_caught"]


# Training ---------------------------------------------------------------------------------

TRAIN = (
    *("--use_vllm", "true", "--use_peft", "true", "--lora_r", "8"),
    *("--lora_dropout", "0", "--lora_target_modules", "all-linear"),
    *("--max_steps", "2", "--eval_steps", "2"),
    *("--save_steps", "2", "--per_device_train_batch_size", "8", "--num_generations", "4"),
    *("--test_limit", "6", "--dev_limit", "6", "--trajectory_steps", "1"),
)


def train(folder: Path, *servers: Server, accelerate: str = "") -> subprocess.Popen[bytes]:
    urls = ",".join(server.url for server in servers)
    command = [sys.executable, "-m", "agentr1", "train", "quickstart", *TRAIN]
    if accelerate:
        config = str(ROOT / "recipes" / "accelerate" / f"{accelerate}.yaml")
        launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config]
        command = [*launch, "-m", "agentr1.train", "quickstart", *TRAIN]
    place = ["--output_dir", str(folder), "--vllm_mode", "server", "--vllm_server_base_url", urls]
    settings = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    settings["DS_ACCELERATOR"] = "cpu"
    with folder.with_suffix(".log").open("wb") as log:
        return subprocess.Popen(
            [*command, *place], cwd=ROOT, env={**os.environ, **settings}, stdout=log, stderr=log
        )


def check_trained(folder: Path, run: subprocess.Popen[bytes]) -> None:
    assert run.wait(600) == 0, folder.with_suffix(".log").read_text()[-4000:]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    assert {int(line["step"]) for line in steps} == {1, 2}
    # What the servers sampled is what is trained: TRL compares them at every step.
    assert all(line["sampling/sampling_logp_difference/max"] < MAX_ERROR for line in steps)
    assert (folder / "final" / "adapter_model.safetensors").is_file()
    assert json.loads((folder / "eval.json").read_text())["after"]["n"] == 6


@pytest.mark.parametrize("accelerate", ["", "cpu_ddp", "cpu_zero3"])
def test_two_steps_of_training_on_two_servers(
    tmp_path: Path, servers: list[Server], accelerate: str
) -> None:
    before = {server.url: server.metric("request_success_total") for server in servers}
    folder = tmp_path / "run"
    check_trained(folder, train(folder, *servers, accelerate=accelerate))
    deadline = time.monotonic() + 60  # for servers to publish what they have done
    while any(s.metric("request_success_total") - before[s.url] <= 20 for s in servers):
        assert time.monotonic() < deadline, "the training used one server alone"
        time.sleep(1)
    assert [server.models() for server in servers] == [[], []]


def test_training_survives_the_death_of_its_server(tmp_path: Path, servers: list[Server]) -> None:
    server, folder = servers[0], tmp_path / "run"
    before = server.metric("request_success_total")
    run = train(folder, server)
    while server.metric("request_success_total") < before + 12:  # past the probes: a rollout
        assert run.poll() is None, folder.with_suffix(".log").read_text()[-4000:]
        time.sleep(0.05)
    server.kill()
    server.start()
    check_trained(folder, run)
    server.wait()


def test_two_steps_of_training_with_the_colocated_engine(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    # No search: its index loads numba, and vLLM on a CPU stumbles over that when it starts later.
    tools = ("--tools", "agentr1.tools.calculator.calculator")
    command = [PYTHON, "-m", "agentr1", "train", "quickstart", *TRAIN, *tools]
    path = os.pathsep.join([str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    with folder.with_suffix(".log").open("wb") as log:
        run = subprocess.Popen(
            [*command, "--output_dir", str(folder), "--vllm_mode", "colocate"],
            cwd=ROOT,
            env={**os.environ, **SETTINGS, "PYTHONPATH": path},
            stdout=log,
            stderr=log,
        )
    check_trained(folder, run)
