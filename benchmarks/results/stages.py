"""The stages of the project's own results: which command makes what, and when it is done."""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from agentr1.eval_folder import EvalFolder, fingerprint

RL = ("grpo", "ppo", "rloo", "reinforce_pp", "reinforce_pp_baseline")
"""Recipes of `recipes/multihop`, the algorithms of the paper's Table 3."""
BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
BASELINES = ("closed_book", "naive_rag", "base_tool_call", "few_shot")
METRICS = tuple(
    f"agentr1.rewards.{name}_reward" for name in ("exact_match", "cover_exact_match", "f1")
)
CELLS = 12
"""Of the ablation, with one seed each: six rows, without and with process rewards."""
LOOK = ("--test_limit", "60")
"""A training's own tests are no more than a look: `agentr1 eval` tests what it leaves, as it tests
the baselines, and goes on where it was stopped."""
MASKS = ("--test_limit", "600")
"""The ablation's cells are compared by their own tests; one has to fit into a piece."""


@dataclasses.dataclass(frozen=True)
class Scale:
    """How much of everything.

    Attributes:
        questions: of each dev set that are tested, at most.
        demonstrations: of the cold start; the other train questions are new to RL.
        ablation: whether the masks are compared.
        everywhere, sft, play, rl: further options of all commands with a recipe, and of these.
        at_once: questions of a batch of the evaluation.
    """

    questions: int
    demonstrations: int
    ablation: bool = True
    everywhere: tuple[str, ...] = ()
    sft: tuple[str, ...] = ()
    play: tuple[str, ...] = ()
    rl: tuple[str, ...] = ()
    at_once: int = 256


_SHORT = ("--search_top_k", "2", "--search_passage_chars", "250")
_CPU = Scale(
    questions=60,
    demonstrations=500,
    ablation=False,
    everywhere=("--use_cpu", "true", "--bf16", "false", *_SHORT),
    sft=(
        *("--num_train_epochs", "1", "--save_strategy", "steps", "--save_steps", "5"),
        *("--per_device_train_batch_size", "4", "--gradient_accumulation_steps", "4"),
        *("--gradient_checkpointing", "false", "--logging_steps", "1"),
    ),
    rl=(
        *("--max_steps", "20", "--save_steps", "2", "--save_total_limit", "2"),
        *("--per_device_train_batch_size", "8"),
        *("--gradient_accumulation_steps", "4", "--steps_per_generation", "4"),
    ),
    at_once=32,
)
SCALES = {
    "gpu": Scale(questions=1000, demonstrations=700),
    "cpu": _CPU,
    "amx": dataclasses.replace(
        _CPU,
        questions=300,
        demonstrations=700,
        everywhere=("--use_cpu", "true", "--bf16", "true", *_SHORT),
        play=("--dtype", "bfloat16"),
        at_once=200,
    ),
}
"""Those of a machine without a GPU are small parts of the first, with contexts half as long: `cpu`
for any, `amx` for one that multiplies bfloat16 matrices about ten times as fast as others. The
rates are the recipes' own: on the 200 dev rows of `amx`, which are there to choose by, 20 steps of
GRPO gave .280 with 1e-5 and .255 with 3e-5, where the cold start has .210."""


@dataclasses.dataclass(frozen=True)
class Stage:
    """One command.

    Attributes:
        name: of the stage.
        words: the command behind `python -m`.
        done: whether its result is there and whole.
        further: words that depend on what an earlier piece has left.
        level: stages of higher levels are made from its result.
        trains: the folder that its checkpoints are under.
    """

    name: str
    words: tuple[str, ...]
    done: Callable[[], bool]
    further: Callable[[], Sequence[str]] = tuple
    level: int = 5
    trains: Path | None = None

    def begun(self) -> bool:
        """Whether something is there that was made from earlier stages' results."""
        return self.done() or (self.trains is not None and any(self.trains.rglob("checkpoint-*")))

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
    talks = str(data / "demonstrations.jsonl")
    where = ("--dataset", str(data), "--corpus", str(data / "index"), "--demonstrations", talks)
    where = (*where, "--metrics", *METRICS, *size.everywhere)
    grid = ("--seeds", *map(str, seeds), "--jobs", str(jobs), *where)
    grid = (*grid, "--model_name_or_path", str(cold / "final"), *size.rl)
    test = ("agentr1", "eval", "multihop/grpo", "--at-once", str(size.at_once))
    corpus, index = str(data / "corpus.jsonl"), str(data / "index")
    found = [
        *(_data(name, source, out) for name in ("hotpotqa", "2wiki", "musique")),
        Stage(
            "mix",
            ("benchmarks.results.mix", str(out), "--questions", str(size.questions)),
            (data / "mix.json").exists,
            level=1,
        ),
        Stage(
            "index",
            ("agentr1", "index", corpus, "--kind", "bm25", "--out", index),
            (data / "index" / "quality.json").exists,
            lambda: ["--questions", str(data / "test.jsonl")],
            level=2,
        ),
        Stage(
            "demonstrations",
            ("agentr1", "demonstrate", "multihop/grpo", "--out", talks)
            + ("--n", str(size.demonstrations), "--seed", "0", *where),
            Path(talks).exists,
            level=3,
        ),
        Stage(
            "coldstart",
            ("agentr1", "sft", "multihop/sft", "--output_dir", str(cold), *where)
            + ("--model_name_or_path", BASE, *size.sft),
            (cold / "final" / "training_args.bin").exists,  # written last
            lambda: _newest_checkpoint(cold),
            level=4,
            trains=cold,
        ),
        Stage(
            "baselines",
            (*test, "--model", str(cold / "final"), "--baselines", *BASELINES)
            + ("--out", str(out / "baselines"), *where, *size.play),
            (out / "baselines" / "eval.json").exists,
        ),
        Stage(
            "algorithms",
            ("agentr1", "algorithms", "multihop", "--recipes", *RL)
            + ("--out", str(out / "algorithms"), *grid, *LOOK),
            lambda: _finished(out / "algorithms", seeds, len(RL)),
            trains=out / "algorithms",
        ),
        *_tests(out, seeds, test, (*where, *size.play)),
    ]
    if size.ablation:
        # No engine has sampled the observations that `loss_mask: all` trains on, so their
        # probabilities cannot be corrected: then those of no cell are.
        words = ("agentr1", "ablate", "multihop", "--no-plot", "--out", str(out / "ablation"))
        found.append(
            Stage(
                "ablation",
                (*words, "--sampling_correction", "off", *grid, *MASKS),
                lambda: _finished(out / "ablation", seeds, CELLS),
                trains=out / "ablation",
            )
        )
    return found


def _data(name: str, source: str, out: Path) -> Stage:
    words = ("agentr1", "data", name, "--source", source, "--out", str(out / name))
    return Stage(name, words, (out / name / "card.json").exists, level=0)


def tested(out: Path, name: str, seed: int) -> Path:
    """The evaluation of what a training has left."""
    return out / "tests" / name / f"seed{seed}"


def _tests(
    out: Path, seeds: Sequence[int], words: Sequence[str], options: Sequence[str]
) -> Iterator[Stage]:
    """One stage per training: the same questions, batches and precision as the baselines'."""
    for seed in seeds:
        for name in RL:
            run, folder = out / "algorithms" / name / f"seed{seed}", tested(out, name, seed)
            yield Stage(
                f"{name}-seed{seed}",
                (*words, "--model", str(run / "final"), "--out", str(folder), *options),
                lambda run=run, folder=folder: is_of(folder, run / "final"),
            )


def is_of(evaluation: Path, weights: Path) -> bool:
    """Whether an evaluation is over, and is of these weights rather than earlier ones."""
    if not (evaluation / "eval.json").exists():
        return False
    return EvalFolder(evaluation).settings()["policy"]["weights"] == fingerprint(weights)


def _finished(grid: Path, seeds: Sequence[int], cells: int) -> bool:
    """Whether every cell of a grid has been trained and tested with every seed."""
    return all(len(list(grid.rglob(f"seed{seed}/eval.json"))) >= cells for seed in seeds)


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
