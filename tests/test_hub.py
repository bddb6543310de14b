"""The model card says what the run folder's files say; a push delivers them, byte for byte.

The Hub is a small HTTP server on loopback that speaks the routes the real client calls.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard

from agentr1.hub import model_card, push_run, weights_folder

ROOT = Path(__file__).resolve().parents[1]
WEIGHTS = bytes(range(256)) * 40
TOKEN = "hf_" + "a" * 20


def write_run(run: Path, **extra: Any) -> Path:
    """A run folder as training leaves it, with a LoRA adapter on a Hub model."""
    run.mkdir(parents=True, exist_ok=True)
    recipe = {
        "model_name_or_path": "Qwen/Qwen3-0.6B",
        "algorithm": "grpo",
        "dataset": "data/quickstart",
        "rewards": ["agentr1.rewards.exact_match_reward"],
        **extra,
    }
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (run / "command.txt").write_text(f"agentr1 train quickstart --hub_token {TOKEN}\n")
    environment = {"versions": {"trl": "1.16.0", "torch": "2.13.0"}, "device": "cpu"}
    (run / "environment.json").write_text(json.dumps(environment))
    evaluation = {
        "before": {"exact_match": 0.12, "ci95": [0.05, 0.19], "n": 100},
        "after": {"exact_match": 0.63, "ci95": [0.53, 0.72], "n": 100},
        "seconds": 512.3,
    }
    (run / "eval.json").write_text(json.dumps(evaluation))
    write_adapter(run / "final", recipe["model_name_or_path"])
    return run


def write_adapter(folder: Path, base: str) -> None:
    folder.mkdir(parents=True)
    adapter = {"peft_type": "LORA", "base_model_name_or_path": base}
    (folder / "adapter_config.json").write_text(json.dumps(adapter))
    (folder / "adapter_model.safetensors").write_bytes(WEIGHTS)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "training_args.bin").write_bytes(b"not for the Hub")
    (folder / "README.md").write_text("a card by somebody else")


def test_card_metadata_comes_from_the_run(tmp_path: Path) -> None:
    data = ModelCard(model_card(write_run(tmp_path / "run"), name="someone/agent")).data
    assert data.base_model == "Qwen/Qwen3-0.6B"
    assert data.library_name == "peft"
    assert {"agentr1", "reinforcement-learning", "grpo"} <= set(data.tags)
    assert data.get("datasets") is None
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value) == ("exact_match", 0.63)
    assert result.dataset_name == "quickstart"


def test_card_shows_intervals_command_recipe_and_versions(tmp_path: Path) -> None:
    card = model_card(write_run(tmp_path / "run"))
    assert "| before training | exact_match | 0.120 | 0.050 to 0.190 | 100 |" in card
    assert "| after training | exact_match | 0.630 | 0.530 to 0.720 | 100 |" in card
    assert "agentr1 train quickstart" in card
    assert "algorithm: grpo" in card
    assert "| trl | 1.16.0 |" in card
    assert 'PeftModel.from_pretrained(base, "run")' in card


def test_every_metric_of_an_evaluation_is_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    after: dict[str, Any] = {"exact_match": 0.5, "f1": 0.7, "n": 4, "turns": 3.5, "faults": 0.25}
    after["intervals"] = {"exact_match": [0.2, 0.8], "f1": [0.5, 0.9]}
    (run / "eval.json").write_text(json.dumps({"split": "dev", "after": after}))
    card = model_card(run)
    assert "Tested on the rows of dev" in card
    assert {result.dataset_split for result in ModelCard(card).data.eval_results} == {"dev"}
    assert "| after training | f1 | 0.700 | 0.500 to 0.900 | 4 |" in card
    assert "| before training | not measured |" in card
    assert "Means of an episode after training: 3.50 turns, 0.25 faults." in card
    assert len(ModelCard(card).data.eval_results) == 2


def test_options_of_the_command_overrule_the_recipe(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", max_steps=100, seed=7)
    command = "agentr1 train quickstart --max_steps 5 --algorithm=ppo --rewards a.b c.d\n"
    (run / "command.txt").write_text(command)
    card = model_card(run)
    assert "| max_steps | 5 |" in card
    assert "| algorithm | ppo |" in card
    assert "| rewards | a.b, c.d |" in card
    assert "| seed | 7 |" in card
    assert "ppo" in ModelCard(card).data.tags


def test_datasets_are_named_only_by_the_caller(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    data = ModelCard(model_card(run, datasets=["hotpotqa/hotpot_qa"])).data
    assert data.datasets == ["hotpotqa/hotpot_qa"]
    assert data.eval_results[0].dataset_type == "hotpotqa/hotpot_qa"


def test_a_local_base_model_is_not_claimed_to_be_on_the_hub(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", model_name_or_path="data/quickstart/policy")
    card = model_card(run)
    assert ModelCard(card).data.base_model is None
    assert "`data/quickstart/policy` (a local folder, not on the Hub)" in card


def test_an_empty_run_folder_claims_nothing(tmp_path: Path) -> None:
    card = model_card(tmp_path)
    assert "| after training | not measured | not measured | not measured | not measured |" in card
    assert card.count("not recorded") >= 4
    data = ModelCard(card).data
    assert (data.base_model, data.eval_results) == (None, None)


def test_a_token_never_reaches_the_card(tmp_path: Path) -> None:
    assert TOKEN not in model_card(write_run(tmp_path / "run"))


def test_a_malformed_file_is_named(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "eval.json").write_text("[1, 2]")
    with pytest.raises(ValueError, match=r"eval\.json must hold a mapping, got list"):
        model_card(run)


def test_weights_come_from_final_or_else_the_last_checkpoint(tmp_path: Path) -> None:
    for step in (2, 10):
        write_adapter(tmp_path / f"checkpoint-{step}", "some/model")
    (tmp_path / "checkpoint-best").mkdir()
    assert weights_folder(tmp_path) == tmp_path / "checkpoint-10"
    write_adapter(tmp_path / "final", "some/model")
    assert weights_folder(tmp_path) == tmp_path / "final"


def test_a_run_without_weights_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no weights: expected one of adapter_model"):
        push_run(tmp_path, "someone/agent")


class FakeHub(ThreadingHTTPServer):
    """Keeps what was pushed: `files` (path to bytes), `created` (repository requests)."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubRoutes)
        self.address = f"http://127.0.0.1:{self.server_address[1]}"
        self.blobs: dict[str, bytes] = {}
        self.files: dict[str, bytes] = {}
        self.created: list[dict[str, Any]] = []
        self.commits = 0


class HubRoutes(BaseHTTPRequestHandler):
    """The routes that `create_repo` and `create_commit` of huggingface-hub 2.4 call."""

    server: FakeHub
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        path = self.path.partition("?")[0]
        if path == "/api/repos/create":
            self.server.created.append(json.loads(body))
            self.answer({"url": f"{self.server.address}/someone/agent"})
        elif path == "/api/validate-yaml":
            ModelCard(json.loads(body)["content"])
            self.answer({"errors": [], "warnings": []})
        elif path == "/api/models/someone/agent/preupload/main":
            self.answer({"files": [self.upload_mode(f) for f in json.loads(body)["files"]]})
        elif path == "/someone/agent.git/info/lfs/objects/batch":
            objects = [self.upload_action(o) for o in json.loads(body)["objects"]]
            self.answer({"transfer": "basic", "objects": objects})
        elif path == "/verify":
            self.answer({})
        elif path == "/api/models/someone/agent/commit/main":
            self.commit([json.loads(line) for line in body.splitlines()])
        else:
            self.send_error(404, f"no such route: {path}")

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.blobs[self.path.rpartition("/")[2]] = body
        self.answer({})

    def upload_mode(self, file: dict[str, Any]) -> dict[str, Any]:
        mode = "lfs" if file["path"].endswith(".safetensors") else "regular"
        return {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}

    def upload_action(self, blob: dict[str, Any]) -> dict[str, Any]:
        to = {"href": f"{self.server.address}/blobs/{blob['oid']}"}
        return {
            **blob,
            "actions": {"upload": to, "verify": {"href": f"{self.server.address}/verify"}},
        }

    def commit(self, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                self.server.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.server.files[value["path"]] = self.server.blobs[value["oid"]]
        self.server.commits += 1
        oid = "0" * 40
        url = f"{self.server.address}/someone/agent/commit/{oid}"
        self.answer({"commitUrl": url, "commitOid": oid})

    def answer(self, content: dict[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    server = FakeHub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join(timeout=5)


def on_hub(hub: FakeHub, home: Path, *command: str) -> str:
    """The endpoint is read when the client is imported, so a push needs a process of its own."""
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "HUGGING"))}
    env = {
        **keep,
        "HF_ENDPOINT": hub.address,
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(home),
        "NO_PROXY": "127.0.0.1",
    }
    done = subprocess.run(
        [sys.executable, *command], env=env, cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def push_in_subprocess(hub: FakeHub, run: Path, home: Path) -> str:
    script = (
        "import sys; from agentr1.hub import push_run; "
        "print(push_run(sys.argv[1], 'someone/agent', private=True))"
    )
    return on_hub(hub, home, "-c", script, str(run))


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_training_with_push_to_hub_delivers_the_adapter(tmp_path: Path, hub: FakeHub) -> None:
    run = tmp_path / "run"
    small = ("--per_device_train_batch_size", "4", "--num_generations", "2", "--test_limit", "4")
    once = ("--max_steps", "1", "--eval_strategy", "no", "--load_best_model_at_end", "false")
    lora = ("--use_peft", "true", "--lora_r", "4", "--lora_target_modules", "all-linear")
    push = ("--push_to_hub", "true", "--hub_model_id", "someone/agent", "--output_dir", str(run))
    train = ("-m", "agentr1", "train", "quickstart")
    shown = on_hub(hub, tmp_path / "home", *train, *small, *once, *lora, *push)
    assert f"{hub.address}/someone/agent/commit" in shown
    assert hub.commits == 1  # the whole run at its end, not every checkpoint
    adapter = run / "final" / "adapter_model.safetensors"
    assert hub.files["adapter_model.safetensors"] == adapter.read_bytes()
    assert hub.files["eval.json"] == (run / "eval.json").read_bytes()
    assert "exact_match" in hub.files["README.md"].decode()


def test_push_delivers_weights_card_and_evidence(tmp_path: Path, hub: FakeHub) -> None:
    run = write_run(tmp_path / "run")
    address = push_in_subprocess(hub, run, tmp_path / "home")
    assert address == f"{hub.address}/someone/agent/commit/{'0' * 40}"
    assert hub.created == [{"name": "agent", "organization": "someone", "visibility": "private"}]
    assert hub.commits == 1
    assert hub.files["adapter_model.safetensors"] == WEIGHTS
    assert list(hub.blobs) == [hashlib.sha256(WEIGHTS).hexdigest()]
    assert hub.files["README.md"].decode() == model_card(run, name="someone/agent")
    assert hub.files["eval.json"] == (run / "eval.json").read_bytes()
    expected = {
        "README.md",
        "adapter_config.json",
        "adapter_model.safetensors",
        "command.txt",
        "environment.json",
        "eval.json",
        "recipe.yaml",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert set(hub.files) == expected
    assert not any(TOKEN.encode() in content for content in hub.files.values())
