"""Rollout on one GPU: tokens a second in bfloat16 against both of TRL's engines.

Models of published shapes with random weights follow a script, so nothing is downloaded. Every
turn thinks before it calls; the tool answers at once. Without a GPU this says so and succeeds;
`--tiny` plays a small model on whatever there is.

    python -m benchmarks.gpu --json gpu.json
    python -m benchmarks.gpu --tiny
"""

from __future__ import annotations

import argparse
import functools
import gc
import sys
from collections.abc import Sequence

import torch

from benchmarks import shapes, work
from benchmarks.comparison import Comparison, faster, finish, medians
from benchmarks.sides import Ours, Theirs, check_equal, seconds

TARGET = 2.0
"""The least ratio to either of TRL's engines."""
THOUGHT = "I look this up before I answer, because a guess would not do. "


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print, and return 1 where a target is missed."""
    options = _parser().parse_args(argv)
    if not options.tiny and not torch.cuda.is_available():
        print("no GPU here: nothing measured (--tiny tries it on the CPU)")
        return finish([], options.json)
    if options.tiny:
        options.shapes, options.rollouts, options.group, options.turns = ["tiny"], 4, 2, 2
    work.quiet(options.threads)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    script = work.write(options, thought=(THOUGHT * options.sentences).strip())
    lines = [line for shape in options.shapes for line in measured(script, options, shape, device)]
    return finish(lines, options.json)


def measured(
    script: work.Work, options: argparse.Namespace, shape: str, device: str
) -> list[Comparison]:
    """One shape against both engines."""
    played = script.script
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    model = shapes.random_model(shape, device, dtype)
    ours = Ours(model, script.codec, played, script.slow)
    lines = []
    for paged in (False, True):
        theirs = Theirs(model, script.tokenizer, played, script.slow, paged=paged, waits=False)
        check_equal(ours.play(), theirs.play(), played)  # warms both up, too
        took = medians(
            functools.partial(seconds, ours.play),
            functools.partial(seconds, theirs.play),
            repeats=options.repeats,
        )
        sampled = len(played.rows) * len(played.policy_ids)
        rates = [sampled / part for part in took]
        workload = work.describe(script, options, theirs.name) | {
            "policy": f"random weights of {shape}'s shape, {dtype}",
            "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
            "sampled_tokens": sampled,
            "tokens_per_second": {"ours": round(rates[0]), "theirs": round(rates[1])},
        }
        engine = theirs.name.partition(" with")[0]
        note = f"{rates[0]:,.0f} against {rates[1]:,.0f} sampled tokens/s"
        target = None if options.tiny else TARGET
        lines.append(faster(f"GPU, {shape}, {engine}", (took[0], took[1]), workload, target, note))
        del theirs
        gc.collect()  # a trainer holds itself; its weights would stay on the device
        if device == "cuda":
            torch.cuda.empty_cache()
    return lines


def _parser() -> argparse.ArgumentParser:
    parser = work.arguments("gpu", "Time rollouts on one GPU against both of TRL's engines.")
    parser.set_defaults(rollouts=128, group=8, turns=4)
    parser.add_argument("--shapes", nargs="+", default=["SmolLM2-135M", "1.5B"])
    parser.add_argument("--sentences", type=int, default=6, help="of thought before each call")
    parser.add_argument("--tiny", action="store_true", help="a small model on any device, to try")
    return parser


if __name__ == "__main__":
    sys.exit(main())
