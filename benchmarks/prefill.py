"""How many tokens a rollout computes in prefill, per token that is new.

New are what all prompts begin with once, the rest of a prompt once per group, every observation,
and the last token of an action that is answered, which is computed along with the answer. All else
that a model computes besides decoding, one pass per sampled token, is done again. Counted are
tokens that enter the model's forward pass, on both sides; padding is counted apart.

    python -m benchmarks.prefill --json prefill.json
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from transformers import PreTrainedModel

from benchmarks import work
from benchmarks.comparison import Comparison, finish
from benchmarks.script import Script
from benchmarks.sides import Ours, Theirs, Tokens, check_equal

TARGET = 1.1
"""Tokens computed in prefill per new token, at most."""


class Count:
    """Tokens that entered a model."""

    def __init__(self) -> None:
        self.tokens = 0
        self.padding = 0

    def add(self, module: Any, arguments: Any, keywords: dict[str, Any]) -> None:
        """Read one pass: in a row, every token has a place of its own, so the rest is padding.

        One row alone is never padded; several sequences in it repeat places.
        """
        rows, width = keywords["input_ids"].shape
        self.tokens += rows * width
        if rows > 1:
            places = keywords["position_ids"].expand(rows, -1).tolist()
            self.padding += sum(width - len(set(row)) for row in places)


@contextmanager
def counted(model: PreTrainedModel) -> Iterator[Count]:
    """Count what enters the model meanwhile."""
    count = Count()
    hook = model.register_forward_pre_hook(count.add, with_kwargs=True)
    try:
        yield count
    finally:
        hook.remove()


def new_tokens(script: Script) -> int:
    """What no rollout of the script can do without, decoding apart."""
    answered = sum(len(shown) + 1 for shown in script.observation_ids)
    of_groups = len(script.rows) // script.group * (script.prompt_length - script.stem)
    return script.stem + of_groups + len(script.rows) * answered


def decoded_tokens(script: Script) -> int:
    """Sampled tokens that were fed back alone to sample the next."""
    return len(script.rows) * sum(len(action) - 1 for action in script.action_ids)


def main(argv: Sequence[str] | None = None) -> int:
    """Count, print, and return 1 where the target is missed."""
    parser = work.arguments("prefill", "Count the tokens of prefill per token that is new.")
    parser.add_argument("--seed", type=int, default=0, help="of the tool's waits")
    options = parser.parse_args(argv)
    work.quiet(options.threads)
    script = work.write(options)
    model = work.model_of(options.policy)
    ours = Ours(model, script.codec, script.script, script.slow)
    ways = [
        Theirs(model, script.tokenizer, script.script, script.slow, paged=paged, waits=False)
        for paged in (False, True)
    ]
    # Waits that differ: rollouts that come back one by one are the harder case.
    uniform = random.Random(options.seed)
    calls = options.turns * options.calls
    script.slow.takes(
        [[0.1 * uniform.random() for _ in range(calls)] for _ in range(options.rollouts)]
    )
    expected, mine = _counts(ours.play, ours.model, script.script)
    theirs: dict[str, tuple[int, int]] = {}
    for way in ways:
        tokens, theirs[way.name] = _counts(way.play, _inner(way), script.script)
        check_equal(expected, tokens, script.script)
    best = min(theirs, key=lambda name: theirs[name][0])
    workload = work.describe(script, options, best) | {
        "new_tokens": new_tokens(script.script),
        "padding_tokens": {"ours": mine[1], "theirs": theirs[best][1]},
        "theirs_by_engine": {name: tokens for name, (tokens, _) in theirs.items()},
    }
    new = new_tokens(script.script)
    shown = ", ".join(
        f"{name.partition(' with')[0]} {tokens / new:.2f}" for name, (tokens, _) in theirs.items()
    )
    line = Comparison(
        f"prefill, {work.short_name(options.policy)}",
        mine[0] / new,
        workload,
        unit="per new token",
        target=TARGET,
        direction="at most",
        ours=mine[0],
        theirs=theirs[best][0],
        measure="tokens",
        note=f"TRL: {shown}; padding {mine[1]} and {theirs[best][1]} tokens",
    )
    return finish([line], options.json)


def _counts(
    play: Callable[[], Tokens], model: PreTrainedModel, script: Script
) -> tuple[Tokens, tuple[int, int]]:
    """What a run gives; its tokens of prefill, without padding; its padding."""
    with counted(model) as count:
        tokens = play()
    return tokens, (count.tokens - count.padding - decoded_tokens(script), count.padding)


def _inner(way: Theirs) -> Any:
    return way.trainer.accelerator.unwrap_model(way.trainer.model)


if __name__ == "__main__":
    sys.exit(main())
