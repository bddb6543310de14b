"""The stages of the project's own results: which command makes what, and when it is done."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

RL = ("grpo", "ppo", "rloo", "reinforce_pp", "reinforce_pp_baseline")
"""Recipes of `recipes/multihop`, the algorithms of the paper's Table 3."""
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
BASELINES = ("closed_book", "naive_rag", "base_tool_call", "few_shot", "cold_start")


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much of everything.

    Attributes:
        questions: of each dev set that are tested, None for all.
        everywhere, sft, rl: further options of all commands with a recipe, and of these.
        at_once: questions of a batch of the evaluation.
    """

    questions: int | None
    everywhere: tuple[str, ...] = ()
    sft: tuple[str, ...] = ()
    rl: tuple[str, ...] = ()
    at_once: int = 256


SCALES = {
    "gpu": Scale(questions=None),
    "cpu": Scale(
        questions=100,
        everywhere=("--bf16", "false"),
        sft=("--num_train_epochs", "1", "--save_strategy", "steps", "--save_steps", "5"),
        rl=(
            *("--max_steps", "20", "--eval_strategy", "no"),
            *("--save_steps", "2", "--gradient_accumulation_steps", "2"),
        ),
        at_once=32,
    ),
}


@dataclasses.dataclass(frozen=True)
class Stage:
    """One command.

    Attributes:
        name: of the stage.
        words: the command behind `python -m`.
        made: what is there when it is done.
        further: words that depend on what an earlier piece has left.
    """

    name: str
    words: tuple[str, ...]
    made: Path
    further: Callable[[], Sequence[str]] = tuple

    def done(self) -> bool:
        """True where its result is there and whole."""
        return self.made.exists()

    def command(self) -> list[str]:
        """The words of now."""
        return [*self.words, *self.further()]

    @property
    def shown(self) -> str:
        """The command as one types it."""
        first, *rest = self.words
        return shlex.join([first, *rest] if first == "agentr1" else ["python", "-m", *self.words])


def stages(out: Path, source: str, scale: str, seeds: Sequence[int], jobs: int) -> list[Stage]:
    """All stages in order.

    Args:
        out: where everything goes.
        source: of `agentr1 data`.
        scale: of `SCALES`.
        seeds: of the trainings.
        jobs: trainings at a time.
    """
    size = SCALES[scale]
    data, cold = out / "data", out / "coldstart"
    sets = [
        Stage(name, ("agentr1", "data", name, "--source", source, "--out", str(out / name)), card)
        for name in ("hotpotqa", "2wiki", "musique")
        for card in [out / name / "card.json"]
    ]
    count = () if size.questions is None else ("--questions", str(size.questions))
    where = ("--dataset", str(data), "--corpus", str(data / "index"), *size.everywhere)
    model = ("--model_name_or_path", str(cold / "final"))
    grid = ("--seeds", *map(str, seeds), "--jobs", str(jobs), *where, *model, *size.rl)
    talks = str(data / "demonstrations.jsonl")
    return [
        *sets,
        Stage("mix", ("benchmarks.results.mix", str(out), *count), data / "mix.json"),
        Stage(
            "index",
            ("agentr1", "index", str(data / "corpus.jsonl"), "--kind", "bm25")
            + ("--out", str(data / "index")),
            data / "index" / "manifest.json",
        ),
        Stage(
            "demonstrations",
            ("agentr1", "demonstrate", "multihop/grpo", "--out", talks, *where),
            Path(talks),
        ),
        Stage(
            "coldstart",
            ("agentr1", "sft", "multihop/sft", "--output_dir", str(cold), *where)
            + ("--demonstrations", talks, "--model_name_or_path", BASE, *size.sft),
            cold / "final" / "config.json",
            lambda: _newest_checkpoint(cold),
        ),
        Stage(
            "baselines",
            ("agentr1", "eval", "multihop/grpo", "--model", str(cold / "final"))
            + ("--cold-start", str(cold / "final"), "--baselines", *BASELINES)
            + ("--out", str(out / "baselines"), "--at-once", str(size.at_once), *where)
            + ("--model_name_or_path", BASE, "--demonstrations", talks),
            out / "baselines" / "eval.json",
        ),
        Stage(
            "algorithms",
            ("agentr1", "algorithms", "multihop", "--recipes", *RL)
            + ("--out", str(out / "algorithms"), *grid),
            out / "algorithms" / "algorithms.json",
        ),
        Stage(
            "ablation",
            ("agentr1", "ablate", "multihop", "--no-plot", "--out", str(out / "ablation"), *grid),
            out / "ablation" / "ablation.json",
        ),
    ]


def _newest_checkpoint(folder: Path) -> list[str]:
    """The option that goes on from what a stopped fine-tuning has saved."""
    found = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    whole = [path for path in found if _is_whole(path)]
    return ["--resume_from_checkpoint", str(whole[-1])] if whole else []


def _is_whole(checkpoint: Path) -> bool:
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True
