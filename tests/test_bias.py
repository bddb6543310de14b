"""Which estimators are unbiased, against the exact gradient of an enumerable decision process.

The fast tests enumerate two turns, the slow one all three with the groups of the benchmark.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from benchmarks import bias
from benchmarks.decision_process import (
    PROMPTS,
    ROWS,
    Enumeration,
    enumerate_prompt,
    episodes,
    exact_gradient,
    expected_reward,
    policy,
)
from benchmarks.expectation import (
    Kinds,
    Normaliser,
    exact_values,
    expected_batch_gradient,
    expected_gradient,
    expected_whitened_gae,
)
from torch import Tensor

from agentr1 import estimators
from agentr1.advantages import STD_EPSILON, TurnRewards, place_turns
from agentr1.algorithms import ALGORITHMS
from agentr1.gae import token_gae

TURNS = 2


@pytest.fixture(scope="module")
def found() -> dict[tuple[str, str], bias.Finding]:
    return {(f.estimator, f.normaliser): f for f in bias.findings(turns=TURNS)}


def everything(turns: int = TURNS) -> list[Enumeration]:
    return [enumerate_prompt(prompt, policy(), turns) for prompt in PROMPTS]


# The process ------------------------------------------------------------------------------


@pytest.mark.parametrize("turns", [1, 2, 3])
def test_the_process_is_enumerated_once_and_whole(turns: int) -> None:
    for prompt, each in zip(PROMPTS, everything(turns), strict=True):
        ways = episodes(prompt, turns)
        assert len({(e.seen, e.tokens) for e in ways}) == len(ways)
        torch.testing.assert_close(each.probabilities.sum(), torch.ones((), dtype=torch.float64))
        torch.testing.assert_close(each.greedy.sum(), torch.ones((), dtype=torch.float64))


def test_the_process_can_show_a_bias() -> None:
    """One prompt with two returns makes biased estimators look right; so does a fixed length."""
    for each in everything(3):
        assert len(each.returns.round(decimals=9).unique()) >= 3
        ended = [float(each.probabilities[each.turn_counts == k].sum()) for k in (1, 2, 3)]
        assert min(ended) > 0.1
        assert len(each.token_counts.unique()) >= 3
        assert (each.process != 0).any()
        assert len(each.outcome.unique()) >= 3


def test_the_exact_gradient_is_that_of_finite_differences() -> None:
    logits, step = policy(), 1e-6
    found = exact_gradient(logits, 3)
    for place in range(2 * ROWS):
        moved = torch.zeros(2 * ROWS, dtype=torch.float64)
        moved[place] = step
        up, down = (expected_reward(logits + way * moved.view_as(logits), 3) for way in (1, -1))
        assert float((up - down) / (2 * step)) == pytest.approx(float(found[place]), abs=1e-9)


# The expectation --------------------------------------------------------------------------


def slowly(
    advantage: Callable[[TurnRewards], Tensor], size: int, normaliser: Normaliser, greedy: bool
) -> Tensor:
    """Every ordered batch of one-turn episodes, one at a time."""
    slots = [(each, greedy and place == 0) for each in everything(1) for place in range(size)]
    total = torch.zeros(2 * ROWS, dtype=torch.float64)
    for batch in itertools.product(*(range(len(each.outcome)) for each, _ in slots)):
        rows = [(each, is_greedy, i) for (each, is_greedy), i in zip(slots, batch, strict=True)]
        weight = math.prod(float((e.greedy if g else e.probabilities)[i]) for e, g, i in rows)
        rewards = TurnRewards(
            outcome=torch.stack([each.outcome[i] for each, _, i in rows]),
            process=torch.stack([each.process[i] for each, _, i in rows]),
            turn_counts=torch.stack([each.turn_counts[i] for each, _, i in rows]),
            group_size=size,
            anchors=torch.stack([each.anchors[i] for each, _, i in rows]),
        )
        values = advantage(rewards)
        lengths = [0 if is_greedy else int(each.token_counts[i]) for each, is_greedy, i in rows]
        for row, (each, is_greedy, i) in enumerate(rows):
            if is_greedy:
                continue
            divisor = {
                "constant": len(rows),
                "sequence": len(rows) * lengths[row],
                "tokens": sum(lengths),
            }[normaliser]
            for token in range(lengths[row]):
                value = values[row, each.turn_ids[i, token]]
                total += weight * value / divisor * each.token_scores[i, token]
    return total


@pytest.mark.parametrize("normaliser", bias.ALL)
@pytest.mark.parametrize(
    ("name", "greedy"), [("gigpo", False), ("turn_loo", False), ("remax", True)]
)
def test_kinds_and_multisets_lose_nothing(name: str, greedy: bool, normaliser: Normaliser) -> None:
    advantage, kinds = getattr(estimators, name), [Kinds.of(each) for each in everything(1)]
    expected = slowly(advantage, 2, normaliser, greedy)
    found = expected_gradient(kinds, advantage, 2, normaliser, greedy_first=greedy)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("normaliser", bias.ALL)
def test_a_batch_of_both_prompts_is_weighed_alike(normaliser: Normaliser) -> None:
    kinds = [Kinds.of(each) for each in everything(1)]
    advantage = estimators.reinforce_pp
    expected = slowly(advantage, 2, normaliser, False)
    found = expected_batch_gradient(kinds, advantage, 2, normaliser)
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("normaliser", bias.ALL)
@pytest.mark.parametrize("algorithm", bias.GAES)
@pytest.mark.parametrize(("turns", "size"), [(1, 2), (2, 1)])
def test_every_batch_is_whitened_once(
    turns: int, size: int, algorithm: str, normaliser: Normaliser
) -> None:
    valued = [
        bias.GAES[algorithm](each, bias.wrong(exact_values(each), each.prefixes), 0.9)
        for each in everything(turns)
    ]
    slots = [each for each in valued for _ in range(size)]
    total = torch.zeros(2 * ROWS, dtype=torch.float64)
    for batch in itertools.product(*(range(len(each.advantages)) for each in slots)):
        rows = list(zip(slots, batch, strict=True))
        weight = math.prod(float(each.everything.probabilities[i]) for each, i in rows)
        turn_ids = [each.everything.turn_ids[i].tolist() for each, i in rows]
        lengths = [sum(turn >= 0 for turn in ids) for ids in turn_ids]
        counts = lengths if algorithm == "ppo" else [max(ids) + 1 for ids in turn_ids]
        raw = [each.advantages[i, :n] for (each, i), n in zip(rows, counts, strict=True)]
        mean, deviation = torch.cat(raw).mean(), torch.cat(raw).std()
        for row, (each, i) in enumerate(rows):
            divisor = {
                "constant": len(rows),
                "sequence": len(rows) * lengths[row],
                "tokens": sum(lengths),
            }[normaliser]
            for token in range(lengths[row]):
                at = token if algorithm == "ppo" else turn_ids[row][token]
                value = (raw[row][at] - mean) / (deviation + STD_EPSILON)
                total += weight * value / divisor * each.everything.token_scores[i, token]
    found = expected_whitened_gae(valued, size, normaliser)
    torch.testing.assert_close(found, total, atol=1e-12, rtol=0)


# The estimators ---------------------------------------------------------------------------


def check(found: dict[tuple[str, str], bias.Finding]) -> None:
    """Every claim to 1e-8, and no bias claimed where there is none."""
    claimed = [f for f in found.values() if f.claimed is not None]
    assert len(claimed) > 8
    assert [f for f in claimed if f.residual > 1e-8] == []
    others = [f for f in found.values() if f.claimed is None]
    assert [f for f in others if f.residual < 1e-3] == []
    assert [f for f in found.values() if f.cosine <= 0] == []


def test_what_is_claimed_holds_in_two_turns(found: dict[tuple[str, str], bias.Finding]) -> None:
    check(found)


@pytest.mark.slow
@pytest.mark.timeout(600)  # half a minute of an idle machine
def test_what_is_claimed_holds_in_three_turns() -> None:
    found = {(f.estimator, f.normaliser): f for f in bias.findings()}
    check(found)

    def cosine(name: str, normaliser: str = "constant") -> float:
        return found[name, normaliser].cosine

    # What divides by a deviation or by the tokens of the batch errs a little, centring before
    # summing errs more, and dividing by each row's own one to six tokens errs most.
    assert cosine("rloo", "tokens") > 0.99 > cosine(bias.TRAP) > cosine("rloo", "sequence")
    assert cosine("turn_loo", "tokens") > 0.99
    assert cosine("grpo per trajectory") > 0.98
    assert cosine("reinforce++ per trajectory") > 0.98
    assert cosine(bias.TRAP) < cosine("mt_grpo") < 0.98
    assert cosine(bias.TRAP) < cosine("grpo per trajectory")
    for name in bias.GAES:  # whitening alone, then with the loss's normaliser
        whitened = f"{name} whitened, exact critic, lambda 1"
        assert cosine(bias.TRAP) < cosine(whitened, "tokens") < cosine(whitened) < 0.999


def test_the_trap_points_elsewhere_and_its_remedies_do_not(
    found: dict[tuple[str, str], bias.Finding],
) -> None:
    assert found[bias.TRAP, "constant"].residual > 0.1
    assert found["mt_grpo", "constant"].residual > 0.1
    for remedy in ("turn_loo", "survivors' returns to go but the own one"):
        assert found[remedy, "constant"].residual < 1e-8
        assert found[remedy, "constant"].constant == pytest.approx(1.0, abs=1e-8)


def test_no_algorithm_is_left_out() -> None:
    names = {each.name for each in bias.ESTIMATORS}
    measured = {getattr(each.advantage, "func", each.advantage) for each in bias.ESTIMATORS}
    rows = ALGORITHMS.values()
    assert {row.name for row in rows if row.needs_critic} == set(bias.GAES)
    assert {row.advantage for row in rows if row.advantage} <= measured
    assert {row.name for row in rows if row.advantage} <= names
    # TRL's own advantages come in two kinds, under whatever loss.
    scales = {r.settings["scale_rewards"] for r in rows if not (r.advantage or r.needs_critic)}
    assert scales == {"group", "none"}
    assert {"grpo", "dr_grpo"} <= names


@pytest.mark.parametrize(("knows", "right"), [(True, True), (False, False)])
def test_a_truncated_episode_is_worth_what_the_critic_says_of_its_end(
    knows: bool, right: bool
) -> None:
    """Cut after one turn of two, the first turn's gradient is exact if the end is valued."""
    for each in everything(2):
        values = exact_values(each)  # (N, M)
        first = each.turn_ids == 0  # (N, M)
        second = each.turn_ids == 1  # (N, M)
        counts = first.sum(dim=1)  # (N,)
        cut = second.any(dim=1)  # (N,)
        ends = first & ~first.roll(-1, dims=1)  # (N, M)
        behind = values[range(len(values)), counts.clamp(max=values.shape[1] - 1)] * cut
        paid = torch.where(ends, each.process[:, :1], 0.0)  # (N, M)
        paid = paid + torch.where(ends & ~cut[:, None], each.outcome[:, None], 0.0)
        found, _ = token_gae(
            paid,
            values,
            counts,
            ends,
            behind if knows else torch.zeros_like(behind),
            discount=1.0,
            lam=0.9,
        )
        weights = (each.probabilities[:, None] * first)[..., None] * each.token_scores
        exact = (
            weights
            * place_turns(each.returns[:, None], each.turn_ids - second.long() * 2)[..., None]
        ).sum((0, 1))
        estimate = (weights * found[..., None]).sum((0, 1))
        assert bool((estimate - exact).norm() < 1e-8 * exact.norm()) is right


# The command ------------------------------------------------------------------------------


@pytest.mark.parametrize(("constant", "code"), [(bias.exactly, 0), (bias.but_itself, 1)])
def test_the_command_fails_with_a_claim(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    constant: Callable[[int], float],
    code: int,
) -> None:
    claim = bias.Estimator("turn_loo", estimators.turn_loo, constant)
    monkeypatch.setattr(bias, "ESTIMATORS", (claim,))
    monkeypatch.setattr(bias, "GAES", {})
    path = tmp_path / "bias.json"
    assert bias.main(["--json", str(path)]) == code
    assert ("FAILS" in capsys.readouterr().out) == bool(code)
    line = json.loads(path.read_text())[0]
    assert line["reached"] is not bool(code)
    assert {"estimator", "normaliser", "constant", "residual", "cosine"} <= set(line["workload"])
