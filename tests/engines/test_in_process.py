"""The in-process engine against the model it samples from, recomputed without any cache."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from transformers import MistralConfig, MistralForCausalLM

from agentr1.codec import Codec
from agentr1.engines.base import Generation, Sampling
from agentr1.engines.in_process import InProcessEngine
from agentr1.envs.tool_env import ToolEnv
from agentr1.rollout import Limits, rollout_batch
from agentr1.segments import flatten
from agentr1.tools.runner import ToolRunner
from fakes import CountingTool, GuessEnv

STOP = 2
Exchange = tuple[tuple[int, ...], Sampling, Generation]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Threads only cost on a model this small, and sums come out in one order."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def model(make_model: Any) -> Any:
    """Shared: a test that changes weights makes its own."""
    return make_model()


def random_ids(draws: random.Random, most: int) -> tuple[int, ...]:
    return tuple(draws.randrange(3, 512) for _ in range(draws.randint(1, most)))


def alone(model: Any, prompt: Sequence[int], sampling: Sampling) -> Generation:
    return asyncio.run(InProcessEngine(model, [STOP]).generate(prompt, sampling))


@torch.no_grad()
def logprobs_of(model: Any, prompt: Sequence[int], ids: Sequence[int], temperature: float) -> Any:
    """Teacher-forced, in one pass over the whole sequence."""
    logits = model(torch.tensor([[*prompt, *ids]])).logits[0].float()  # (T, V)
    logprobs = torch.log_softmax(logits / temperature, dim=-1)[len(prompt) - 1 : -1]
    return logprobs[torch.arange(len(ids)), list(ids)]


def error_of(model: Any, exchange: Exchange) -> float:
    prompt, sampling, generation = exchange
    expected = logprobs_of(model, prompt, generation.ids, sampling.temperature or 1.0)
    return float((torch.tensor(generation.logprobs) - expected).abs().max())


async def episode(engine: InProcessEngine, number: int, turns: int = 3) -> list[Exchange]:
    """Turns of random length that come after random pauses; a function of `number` alone."""
    draws = random.Random(number)
    stem = random_ids(random.Random(number % 3), 60)  # as a task's system prompt
    context, exchanges = (*stem, *random_ids(draws, 40)), []
    for turn in range(turns):
        for _ in range(draws.randrange(12)):
            await asyncio.sleep(0)
        sampling = Sampling(
            max_tokens=draws.randint(1, 15),
            temperature=draws.choice([1.0, 0.7]),
            seed=100 * number + turn,
        )
        generation = await engine.generate(context, sampling)
        exchanges.append((context, sampling, generation))
        context = (*context, *generation.ids, *random_ids(draws, 12))
    return exchanges


def crowd(engine: InProcessEngine, count: int = 24) -> list[list[Exchange]]:
    async def play() -> list[list[Exchange]]:
        return await asyncio.gather(*(episode(engine, number) for number in range(count)))

    return asyncio.run(play())


def gather(*requests: Awaitable[Any]) -> list[Any]:
    async def play() -> list[Any]:
        return await asyncio.gather(*requests, return_exceptions=True)

    return asyncio.run(play())


class Counted:
    """Counts the tokens a model is run on; raises at forward pass `fail_at`."""

    def __init__(self, model: Any, fail_at: int | None = None) -> None:
        self.tokens: list[int] = []
        self.fail_at = fail_at
        self._hook = model.register_forward_pre_hook(self._before, with_kwargs=True)

    def _before(self, model: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self.tokens.append(kwargs["input_ids"].numel())
        if len(self.tokens) == self.fail_at:
            raise MemoryError("out of memory")

    def __enter__(self) -> Counted:
        return self

    def __exit__(self, *error: object) -> None:
        self._hook.remove()


# Right numbers ------------------------------------------------------------------------------


@pytest.mark.parametrize("max_slots", [3, 20, 256])
def test_logprobs_are_those_of_the_model_for_episodes_that_join_and_leave_at_random(
    model: Any, max_slots: int
) -> None:
    exchanges = [e for each in crowd(InProcessEngine(model, [STOP], max_slots)) for e in each]
    assert max(error_of(model, exchange) for exchange in exchanges) < 1e-4
    assert {e[1].temperature for e in exchanges} == {0.7, 1.0}
    assert {e[2].finish_reason for e in exchanges} == {"stop", "length"}


def test_eager_attention_gives_the_same_numbers(make_model: Any) -> None:
    model = make_model(attn_implementation="eager")
    assert model.config._attn_implementation == "eager"
    exchanges = [e for each in crowd(InProcessEngine(model, [STOP]), count=6) for e in each]
    assert max(error_of(model, exchange) for exchange in exchanges) < 1e-4


def test_greedy_ids_are_those_of_generate(model: Any) -> None:
    prompts = [random_ids(random.Random(i), 30) for i in range(8)]
    engine = InProcessEngine(model, [STOP])
    ours = gather(*(engine.generate(p, Sampling(20, temperature=0.0)) for p in prompts))
    for prompt, generation in zip(prompts, ours, strict=True):
        theirs = model.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)
        assert list(generation.ids) == theirs[0, len(prompt) :].tolist()
        assert error_of(model, (prompt, Sampling(20, temperature=0.0), generation)) < 1e-4


def test_a_seed_gives_the_same_draws_whatever_else_is_in_flight(model: Any) -> None:
    among_others = crowd(InProcessEngine(model, [STOP], max_slots=7))
    for exchanges in among_others[::5]:
        for prompt, sampling, generation in exchanges:
            assert alone(model, prompt, sampling).ids == generation.ids
    assert len({e[2].ids for each in among_others for e in each}) > 60


def test_draws_follow_the_distribution_whose_logprobs_are_given(model: Any) -> None:
    prompt, count, temperature = (5, 6, 7), 3000, 0.7
    engine = InProcessEngine(model, [STOP])
    requests = (engine.generate(prompt, Sampling(1, temperature, seed)) for seed in range(count))
    drawn = torch.tensor([generation.ids[0] for generation in gather(*requests)])
    with torch.no_grad():
        logits = model(torch.tensor([prompt])).logits[0, -1]
    p = torch.softmax(logits / temperature, dim=-1)  # (V,)
    share = torch.bincount(drawn, minlength=len(p)) / count
    deviation = (p * (1 - p) / count).sqrt()
    assert ((share - p).abs() < 5 * deviation + 1 / count).all()
    assert (p > 0.05).sum() > 2


def test_a_stop_id_ends_an_action_and_max_tokens_cuts_it(model: Any) -> None:
    prompt = (5, 6, 7)
    uncut = alone(model, prompt, Sampling(12, seed=1))
    assert (len(uncut.ids), uncut.finish_reason) == (12, "length")
    engine = InProcessEngine(model, [uncut.ids[4]])
    stopped = asyncio.run(engine.generate(prompt, Sampling(12, seed=1)))
    end = uncut.ids.index(uncut.ids[4]) + 1
    assert stopped == Generation(uncut.ids[:end], uncut.logprobs[:end], "stop")
    at_the_cap = asyncio.run(engine.generate(prompt, Sampling(end, seed=1)))
    assert at_the_cap.finish_reason == "stop"


def test_trained_logprobs_of_whole_episodes_are_those_of_the_model(
    model: Any, codec: Codec
) -> None:
    engine = InProcessEngine(model, sorted(codec.stop_ids))
    limits = Limits(max_turns=4, max_completion_length=200, max_turn_tokens=12)
    rows = [{"question": f"{i}?", "secret": i % 10} for i in range(12)]
    runner = ToolRunner([CountingTool()])
    factories: list[Callable[[], Any]] = [GuessEnv, lambda: ToolEnv(runner)]
    for factory in factories:
        samplings = [Sampling(1, 0.7, seed) for seed in range(len(rows))]
        batch = rollout_batch(rows, factory, codec, engine, limits=limits, samplings=samplings)
        for trajectory in asyncio.run(batch):
            (segment,) = flatten(trajectory)
            expected = logprobs_of(model, segment.prompt_ids, segment.completion_ids, 0.7)
            mask = torch.tensor(segment.loss_mask)
            assert ((torch.tensor(segment.logprobs) - expected) * mask).abs().max() < 1e-4


# What is kept, and until when ---------------------------------------------------------------


def test_after_sync_no_prefix_of_the_old_weights_survives(make_model: Any) -> None:
    def second_turn_after_an_update(sync: bool) -> float:
        model = make_model()
        engine = InProcessEngine(model, [STOP])
        prompt = tuple(range(10, 40))
        first = asyncio.run(engine.generate(prompt, Sampling(8, seed=1)))
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.05 * torch.randn_like(weight))
        if sync:
            engine.sync(model)
        extended = (*prompt, *first.ids, 50, 51)
        second = asyncio.run(engine.generate(extended, Sampling(8, seed=2)))
        return error_of(model, (extended, Sampling(8), second))

    assert second_turn_after_an_update(sync=True) < 1e-4
    assert second_turn_after_an_update(sync=False) > 1e-2  # so the line above sees a stale prefix


def test_after_sync_no_stem_of_the_old_weights_survives(make_model: Any) -> None:
    def new_episodes_after_an_update(sync: bool) -> float:
        model = make_model()
        engine = InProcessEngine(model, [STOP])
        prompts = [(*range(10, 40), last) for last in (50, 51, 52)]
        gather(*(engine.generate(prompt, Sampling(2)) for prompt in prompts[:2]))
        with torch.no_grad():
            for weight in model.parameters():
                weight.add_(0.05 * torch.randn_like(weight))
        if sync:
            engine.sync(model)
        generation = asyncio.run(engine.generate(prompts[2], Sampling(8)))
        return error_of(model, (prompts[2], Sampling(8), generation))

    assert new_episodes_after_an_update(sync=True) < 1e-4
    assert new_episodes_after_an_update(sync=False) > 1e-2


def test_sync_takes_the_weights_of_another_model(make_model: Any) -> None:
    old, new = make_model(0), make_model(1)
    engine = InProcessEngine(old, [STOP])
    before = asyncio.run(engine.generate((5, 6), Sampling(8, seed=1)))
    engine.sync(new)
    after = asyncio.run(engine.generate((5, 6), Sampling(8, seed=1)))
    assert before == alone(old, (5, 6), Sampling(8, seed=1))
    assert after == alone(new, (5, 6), Sampling(8, seed=1)) != before


def test_sync_in_the_middle_of_an_action_is_refused(model: Any) -> None:
    engine = InProcessEngine(model, [])

    async def play() -> Generation:
        request = asyncio.ensure_future(engine.generate((5, 6), Sampling(20)))
        for _ in range(5):
            await asyncio.sleep(0)
        with pytest.raises(RuntimeError, match="sync was called while actions were being sampled"):
            engine.sync(model)
        return await request

    assert len(asyncio.run(play()).ids) == 20


def test_a_further_turn_computes_only_its_new_tokens(model: Any) -> None:
    engine = InProcessEngine(model, [])

    async def play() -> None:
        context = tuple(range(10, 60))
        for _ in range(3):
            generation = await engine.generate(context, Sampling(5))
            context = (*context, *generation.ids, 70, 71)

    with Counted(model) as counted:
        asyncio.run(play())
    # A prompt of 50, then twice the last sampled id with two more; four steps after each.
    assert counted.tokens == [50, 1, 1, 1, 1, 3, 1, 1, 1, 1, 3, 1, 1, 1, 1]


def test_further_turns_of_many_episodes_find_their_prefixes(model: Any) -> None:
    engine = InProcessEngine(model, [])

    async def play(number: int) -> None:
        context = (*range(100, 180), number)
        for turn in range(4):
            for _ in range(number % 5 + turn):
                await asyncio.sleep(0)
            generation = await engine.generate(context, Sampling(4, seed=number))
            context = (*context, *generation.ids, 70)

    with Counted(model) as counted:
        gather(*(play(10 + number) for number in range(20)))
    prompts, decoded, shown = 20 * 81, 20 * 4 * 3, 20 * 3 * 2
    assert sum(counted.tokens) <= prompts + decoded + shown + 100  # the rest is padding


def test_equal_prompts_of_a_group_are_computed_once(model: Any) -> None:
    engine = InProcessEngine(model, [])
    prompt = tuple(range(10, 60))
    with Counted(model) as counted:
        group = gather(*(engine.generate(prompt, Sampling(3, seed=s)) for s in range(20)))
    assert counted.tokens == [50, 20, 20]
    assert len({generation.ids for generation in group}) > 10
    assert all(error_of(model, (prompt, Sampling(3), generation)) < 1e-4 for generation in group)


def test_what_different_prompts_begin_with_is_computed_once(model: Any) -> None:
    engine = InProcessEngine(model, [])
    prompts = [(*range(10, 60), 100 + i, 200 + i) for i in range(10)]
    late = (*range(10, 60), 300)

    async def play() -> list[Generation]:
        together = await asyncio.gather(*(engine.generate(p, Sampling(2)) for p in prompts))
        return [*together, await engine.generate(late, Sampling(1))]

    with Counted(model) as counted:
        found = asyncio.run(play())
    assert counted.tokens == [50, 10 * 2, 10, 1]
    errors = [
        error_of(model, (p, Sampling(2), g)) for p, g in zip([*prompts, late], found, strict=True)
    ]
    assert max(errors) < 1e-4


def test_a_prompt_that_is_another_ones_stem_keeps_a_token_of_its_own(model: Any) -> None:
    engine = InProcessEngine(model, [])
    prompts = [tuple(range(10, 10 + length)) for length in (40, 60, 40)]
    with Counted(model) as counted:
        found = gather(*(engine.generate(p, Sampling(1, seed=i)) for i, p in enumerate(prompts)))
    assert counted.tokens == [39, 2 * 21]  # 1 and 21 new ones, padded to one rectangle
    for prompt, generation in zip(prompts, found, strict=True):
        assert error_of(model, (prompt, Sampling(1), generation)) < 1e-4


def test_the_longest_unused_slot_is_given_away_first(model: Any) -> None:
    engine = InProcessEngine(model, [], max_slots=4)
    prompts = [(10 + i,) * 20 for i in range(6)]

    async def play() -> None:
        first = [await engine.generate(prompt, Sampling(2)) for prompt in prompts]
        with Counted(model) as counted:  # the last four are still held
            for prompt, said in list(zip(prompts, first, strict=True))[2:]:
                await engine.generate((*prompt, *said.ids, 70), Sampling(1))
        assert counted.tokens == [2] * 4

    asyncio.run(play())


def test_any_number_of_episodes_one_after_the_other_is_played(model: Any) -> None:
    engine = InProcessEngine(model, [STOP], max_slots=40)

    async def play() -> list[Exchange]:
        return [e for number in range(50) for e in await episode(engine, number, turns=2)]

    assert max(error_of(model, exchange) for exchange in asyncio.run(play())) < 1e-4


# Coming and going ---------------------------------------------------------------------------


def test_more_requests_than_slots_all_finish(model: Any) -> None:
    engine = InProcessEngine(model, [STOP], max_slots=2)
    prompts = [random_ids(random.Random(i), 20) for i in range(15)]
    answers = gather(*(engine.generate(p, Sampling(6, seed=1)) for p in prompts))
    assert [a.ids for a in answers] == [alone(model, p, Sampling(6, seed=1)).ids for p in prompts]


def test_a_cancelled_episode_frees_its_slot(model: Any) -> None:
    engine = InProcessEngine(model, [], max_slots=1)

    async def play() -> tuple[Generation, int]:
        endless = asyncio.ensure_future(engine.generate((5, 6), Sampling(3000)))
        waiting = asyncio.ensure_future(engine.generate((7, 8), Sampling(3000)))
        patient = asyncio.ensure_future(engine.generate((9, 10), Sampling(4)))
        for _ in range(10):
            await asyncio.sleep(0)
        endless.cancel()
        waiting.cancel()
        with Counted(model) as counted:
            return await patient, len(counted.tokens)

    generation, passes = asyncio.run(play())
    assert len(generation.ids) == 4
    assert passes < 15


@pytest.mark.parametrize("fail_at", [1, 2, 4])
def test_an_exception_in_the_model_reaches_every_waiter_and_the_engine_works_again(
    model: Any, fail_at: int
) -> None:
    engine = InProcessEngine(model, [STOP], max_slots=3)
    prompts = [random_ids(random.Random(i), 20) for i in range(8)]
    with Counted(model, fail_at):
        failed = gather(*(engine.generate(p, Sampling(6, seed=1)) for p in prompts))
    assert [str(error) for error in failed] == ["out of memory"] * 8
    again = gather(*(engine.generate(p, Sampling(6, seed=1)) for p in prompts))
    assert [a.ids for a in again] == [alone(model, p, Sampling(6, seed=1)).ids for p in prompts]


def test_one_event_loop_may_follow_another(model: Any) -> None:
    engine = InProcessEngine(model, [STOP], max_slots=5)
    assert crowd(engine, count=8) == crowd(engine, count=8)


def test_an_event_loop_that_was_left_early_leaves_nothing_behind(model: Any) -> None:
    engine = InProcessEngine(model, [STOP], max_slots=4)

    async def leave() -> None:
        for number in range(6):
            asyncio.ensure_future(engine.generate((5, 6, number + 7), Sampling(3000)))
        for _ in range(7):
            await asyncio.sleep(0)

    asyncio.run(leave())
    (exchanges,) = crowd(engine, count=1)
    assert max(error_of(model, exchange) for exchange in exchanges) < 1e-4
    asyncio.run(leave())
    engine.sync(model)


# What it cannot run -------------------------------------------------------------------------


def test_models_with_sliding_windows_are_refused(make_model: Any) -> None:
    some_layers = make_model(use_sliding_window=True, sliding_window=8, max_window_layers=1)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    all_layers = MistralForCausalLM(MistralConfig(**sizes, **heads, sliding_window=8))
    for model in (some_layers, all_layers):
        with pytest.raises(ValueError, match="needs full attention in every layer.*sliding"):
            InProcessEngine(model, [STOP])


def test_models_with_flash_attention_are_refused(make_model: Any) -> None:
    model = make_model()
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="'flash_attention_2'; load the model with attn_impl"):
        InProcessEngine(model, [STOP])


@pytest.mark.parametrize("values", [{"max_tokens": 0}, {"max_tokens": 1, "temperature": -1.0}])
def test_impossible_sampling_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="max_tokens >= 1 and temperature >= 0, got"):
        Sampling(**values)
