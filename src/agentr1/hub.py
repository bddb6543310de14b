"""A run folder's way to the Hub: a model card made from its evidence, and one commit.

The card states what the files of the run folder say and nothing else; a number that no file holds
is "not measured". Knows the run folder's files, neither trainers nor models: it can push a run that
another machine trained.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitOperationAdd, EvalResult, HfApi, ModelCard, ModelCardData

from agentr1.models import hub_id

NOT_MEASURED = "not measured"
_EVIDENCE = ("recipe.yaml", "command.txt", "environment.json", "eval.json")
_WEIGHTS = ("adapter_model.safetensors", "model.safetensors", "model.safetensors.index.json")
_MODEL_FILES = (
    "*.safetensors",
    "*.safetensors.index.json",
    "adapter_config.json",
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template*",
)
_SETTINGS = (
    "algorithm",
    "environment",
    "tools",
    "rewards",
    "process_rewards",
    "metrics",
    "dataset",
    "max_turns",
    "max_completion_length",
    "num_generations",
    "learning_rate",
    "max_steps",
    "seed",
)
_EPISODE_MEANS = ("turns", "calls", "mistakes", "faults", "truncated")
# A token in a recipe or on a command line must not become public with them.
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{8,}")
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

_BODY = """# {name}

{summary}

## Evaluation
{evaluation}

## Settings
{settings}

## How it was made
Command:

```bash
{command}
```

Recipe:

````yaml
{recipe}
````

Made with:

{versions}

## How to use it
```python
{usage}
```

This card was written by agentr1 from the run's own files: {evidence}.
"""


def model_card(
    run_dir: str | Path, *, name: str | None = None, datasets: Sequence[str] = ()
) -> str:
    """Write the model card of a run from the files in its folder.

    Args:
        run_dir: the run folder; any of its files may be missing.
        name: the model's name, by default the folder's. A repository id makes the usage example
            runnable.
        datasets: Hub ids of the data sets; a recipe names folders, which the Hub does not know.

    Returns:
        The whole README.md, metadata first.
    """
    run = Path(run_dir)
    recipe = _settings_of(run)
    evaluation = _json(run / "eval.json")
    adapter = _adapter_config(run)
    base = _base_model(adapter, recipe)
    name = name or run.resolve().name
    data = ModelCardData(
        base_model=base if _is_hub_id(base) else None,
        library_name="transformers" if adapter is None else "peft",
        pipeline_tag="text-generation",
        datasets=list(datasets) or None,
        tags=_tags(recipe),
        model_name=name,
        eval_results=_eval_results(evaluation, recipe, datasets) or None,
    )
    body = _BODY.format(
        name=name,
        summary=_summary(base, adapter, recipe),
        evaluation=_evaluation_table(evaluation),
        settings=_table(("setting", "value"), _shown_settings(recipe)),
        command=_read(run / "command.txt").strip() or "# not recorded",
        recipe=_read(run / "recipe.yaml").strip() or "# not recorded",
        versions=_table(("what", "version"), _flat(_json(run / "environment.json"))),
        usage=_usage(name, base, adapter),
        evidence=", ".join(f"`{file}`" for file in _EVIDENCE if (run / file).is_file()) or "none",
    )
    return str(ModelCard(_TOKEN.sub("hf_***", f"---\n{data.to_yaml()}\n---\n\n{body}")))


def push_run(
    run_dir: str | Path,
    repo_id: str,
    *,
    private: bool | None = None,
    datasets: Sequence[str] = (),
    token: str | None = None,
) -> str:
    """Upload a run's adapter or model, tokenizer, evidence and card in one commit.

    Args:
        run_dir: the run folder; see `weights_folder` for where its weights are looked for.
        repo_id: "user/name", or "name" under the token's account; made when it does not exist.
        private: visibility of a new repository; unset leaves it to the account's default.
        datasets: as in `model_card`.
        token: access token; by default the one the Hub client finds.

    Returns:
        The commit's address.

    Raises:
        FileNotFoundError: the folder holds no weights.
    """
    run = Path(run_dir)
    weights = weights_folder(run)
    if weights is None:
        raise FileNotFoundError(
            f"{run} holds no weights: expected one of {', '.join(_WEIGHTS)} in final/, in the "
            "folder itself or in a checkpoint-* folder; name the folder that training wrote"
        )
    files: dict[str, Path | bytes] = {path.name: path for path in _model_files(weights)}
    adapter = _adapter_config(run)
    base = hub_id(str(adapter["base_model_name_or_path"])) if adapter else None
    if adapter and base:  # a local copy's path is of no use to others, and names the user's home
        renamed = {**adapter, "base_model_name_or_path": base}
        files["adapter_config.json"] = json.dumps(renamed, indent=2).encode()
    for file in _EVIDENCE:
        if (run / file).is_file():
            files[file] = _TOKEN.sub("hf_***", _read(run / file)).encode()
    api = HfApi(token=token)
    # The answer names the account too, where `repo_id` leaves it out.
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    files["README.md"] = model_card(run, name=repo_id, datasets=datasets).encode()
    commit = api.create_commit(
        repo_id,
        [CommitOperationAdd(path_in_repo=name, path_or_fileobj=f) for name, f in files.items()],
        commit_message="Add model, card and evidence of the run",
    )
    return str(commit.commit_url)


def weights_folder(run_dir: str | Path) -> Path | None:
    """Find a run's weights: in `final/`, in the folder itself, or in its last checkpoint."""
    run = Path(run_dir)
    numbered = [p for p in run.glob("checkpoint-*") if p.name.rpartition("-")[2].isdigit()]
    checkpoints = sorted(numbered, key=lambda p: int(p.name.rpartition("-")[2]), reverse=True)
    for folder in (run / "final", run, *checkpoints):
        if any((folder / name).is_file() for name in _WEIGHTS):
            return folder
    return None


def _model_files(folder: Path) -> list[Path]:
    found = {path for pattern in _MODEL_FILES for path in folder.glob(pattern) if path.is_file()}
    return sorted(found)


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _mapping(value: Any, path: Path) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise ValueError(f"{path} must hold a mapping, got {type(value).__name__}: {value!r:.80}")
    return value


def _json(path: Path) -> Mapping[str, Any]:
    return _mapping(json.loads(_read(path) or "{}"), path)


def _settings_of(run: Path) -> dict[str, Any]:
    """The recipe's keys, overruled by the `--key value` options of the command."""
    path = run / "recipe.yaml"
    settings = dict(_mapping(yaml.safe_load(_read(path)), path))
    option = ""
    for word in shlex.split(_read(run / "command.txt")):
        if word.startswith("--"):
            option, equals, value = word.removeprefix("--").partition("=")
            settings[option] = value if equals else None
        elif option:
            before = settings[option]
            settings[option] = word if before is None else f"{before}, {word}"
    return settings


def _adapter_config(run: Path) -> Mapping[str, Any] | None:
    """The adapter's configuration, None where the run holds a whole model or nothing."""
    path = (weights_folder(run) or run) / "adapter_config.json"
    return _json(path) if path.is_file() else None


def _base_model(adapter: Mapping[str, Any] | None, recipe: Mapping[str, Any]) -> str | None:
    named = (adapter or {}).get("base_model_name_or_path") or recipe.get("model_name_or_path")
    named = (hub_id(str(named)) if named else None) or named
    return str(named) if named else None


def _is_hub_id(name: str | None) -> bool:
    """False for a local folder: the Hub would refuse it, or link to somebody else's model."""
    return name is not None and bool(_HUB_ID.fullmatch(name)) and not Path(name).exists()


def _tags(recipe: Mapping[str, Any]) -> list[str]:
    algorithm = recipe.get("algorithm")
    tags = ["agentr1", "trl", "reinforcement-learning", "agent", "tool-use"]
    return [*tags, str(algorithm)] if algorithm else tags


def _summary(base: str | None, adapter: Mapping[str, Any] | None, recipe: Mapping[str, Any]) -> str:
    kind = "model" if adapter is None else f"{adapter.get('peft_type', 'PEFT')} adapter"
    where = f"of `{base}`" if base else "of a base model that was not recorded"
    if base and not _is_hub_id(base):
        where += " (a local folder, not on the Hub)"
    algorithm = recipe.get("algorithm")
    how = f" with `{algorithm}`" if algorithm else ""
    return (
        f"A tool-using agent: {kind} {where}, trained by multi-turn reinforcement learning{how} "
        "after [Agent-R1](https://arxiv.org/abs/2511.14460), with agentr1 on TRL."
    )


def _shown_settings(recipe: Mapping[str, Any]) -> list[tuple[str, str]]:
    shown = [(key, recipe[key]) for key in _SETTINGS if recipe.get(key) not in (None, [])]
    return [(key, ", ".join(map(str, v)) if isinstance(v, list) else str(v)) for key, v in shown]


def _intervals(part: Mapping[str, Any]) -> dict[str, list[float]]:
    """Metric -> its 95% interval; `ci95` belongs to `exact_match` where nothing else is said."""
    return dict(part.get("intervals") or {"exact_match": part.get("ci95") or []})


def _measured(part: Mapping[str, Any]) -> Iterator[tuple[str, float, list[float]]]:
    for metric, interval in _intervals(part).items():
        if isinstance(part.get(metric), int | float):
            yield metric, float(part[metric]), list(interval)


def _evaluation_table(evaluation: Mapping[str, Any]) -> str:
    rows = []
    for when, label in (("before", "before training"), ("after", "after training")):
        part = _mapping(evaluation.get(when), Path("eval.json"))
        count = str(part.get("n", NOT_MEASURED))
        for metric, value, interval in _measured(part):
            bounds = f"{interval[0]:.3f} to {interval[1]:.3f}" if interval else NOT_MEASURED
            rows.append((label, metric, f"{value:.3f}", bounds, count))
        if not any(row[0] == label for row in rows):
            rows.append((label, NOT_MEASURED, NOT_MEASURED, NOT_MEASURED, NOT_MEASURED))
    table = _table(("policy", "metric", "value", "95% interval", "rows"), rows)
    return "\n\n".join([table, *_remarks(evaluation)])


def _remarks(evaluation: Mapping[str, Any]) -> Iterator[str]:
    """How the episodes after training went, faults of the tools included, and what it took."""
    after = _mapping(evaluation.get("after"), Path("eval.json"))
    means = [f"{after[name]:.2f} {name}" for name in _EPISODE_MEANS if name in after]
    if evaluation.get("split") == "dev":
        yield "Tested on the rows of dev: the data set has no others."
    if means:
        yield f"Means of an episode after training: {', '.join(means)}."
    if evaluation.get("seconds") is not None:
        yield f"The run took {float(evaluation['seconds']):.0f} s."


def _eval_results(
    evaluation: Mapping[str, Any], recipe: Mapping[str, Any], datasets: Sequence[str]
) -> list[EvalResult]:
    part = _mapping(evaluation.get("after"), Path("eval.json"))
    folder = Path(str(recipe.get("dataset") or "unnamed")).name
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type=datasets[0] if datasets else folder,
            dataset_name=folder,
            dataset_split=evaluation.get("split"),
            metric_type=metric,
            metric_value=value,
            metric_name=f"{metric} (95% interval {interval}, {part.get('n')} rows)",
        )
        for metric, value, interval in _measured(part)
    ]


def _flat(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Nested mappings as rows, `versions: {trl: 1}` -> `("trl", "1")`."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        rows += _flat(value) if isinstance(value, Mapping) else [(str(key), str(value))]
    return rows


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    if not rows:
        return "not recorded"
    lines = [head, ["---"] * len(head), *rows]
    cells = ([cell.replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def _usage(name: str, base: str | None, adapter: Mapping[str, Any] | None) -> str:
    if adapter is None:
        return (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{name}")\n'
            f'tokenizer = AutoTokenizer.from_pretrained("{name}")'
        )
    return (
        "from peft import PeftModel\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'base = AutoModelForCausalLM.from_pretrained("{base}")\n'
        f'model = PeftModel.from_pretrained(base, "{name}")\n'
        f'tokenizer = AutoTokenizer.from_pretrained("{name}")'
    )
