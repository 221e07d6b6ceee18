"""The continuous batcher: neighbours do not matter, and no slot outlives its reader."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batcher_kit import KINDS, alone, decode, dialled, fresh, generation
from equipoise.config import Sampling
from equipoise.engine.batcher import ContinuousBatcher
from equipoise.engine.cache import keys_values
from equipoise.engine.decode import LiveRows
from equipoise.engine.draw import Row, draw
from equipoise.engine.line import Line, Ticket
from equipoise.engine.sample import TransformersEngine
from equipoise.engine.seam import Generation, Load, Token
from equipoise.errors import DataError, ModelError, ServingError
from equipoise.models.load import LoadedPolicy
from equipoise.types import Branch, GenerationRequest
from tuning_kit import tiny_policy

N_SCHEDULES = 60


def test_a_row_alone_equals_the_sampling_engine() -> None:
    policy = dialled()
    engine = TransformersEngine(policy.model, policy.encoder, model_hash="h")
    for index in range(24):
        asked = generation(index)
        if asked.sampling.temperature == 0:
            continue
        request = GenerationRequest(asked.prompt_ids, (Branch(asked.control_ids, asked.seed),))
        expected = engine.generate([request], asked.sampling)[0][0]
        tokens = alone(index)
        assert tuple(t.id for t in tokens if t.id >= 0) == expected.token_ids
        assert tokens[-1].finish == expected.finish
        assert [t.finish for t in tokens[:-1]] == [None] * (len(tokens) - 1)


def test_neighbours_that_join_and_leave_change_nothing() -> None:
    """One row alone against the same row in 60 random schedules: not one token may differ."""
    different, compared = [], 0
    for schedule in range(N_SCHEDULES):
        rng = random.Random(schedule)
        live = fresh(prefix_tokens=rng.choice([0, 200, 4096]))
        indices = rng.sample(range(40), rng.randint(4, 9))
        arrivals = [(rng.randrange(15), generation(i)) for i in indices]
        cancel = {p: rng.randint(1, 4) for p in range(len(indices)) if rng.random() < 0.3}
        found = decode(live, arrivals, cancel=cancel)
        for place, index in enumerate(indices):
            expected = alone(index)
            got = found[place]
            # A cancelled row has said what it would have said, up to there.
            wanted = expected[: len(got)] if place in cancel else expected
            compared += len(wanted)
            if got != wanted:
                different.append((schedule, index))
    assert compared > 3000
    assert different == []


def test_rows_of_other_lengths_share_steps_and_prefixes() -> None:
    """What the schedules above rest on: several rows per step, padding, and reused prompts."""
    live = fresh()
    long = generation(0, prompt_ids=tuple(range(5, 65)), sampling=KINDS[2])
    shapes: list[tuple[int, int]] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        shapes.append(tuple(kwargs["attention_mask"].shape))

    handle = live.model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        found = decode(
            live,
            [(0, generation(1)), (2, long), (2, generation(21)), (3, generation(0))],
            cancel={},
        )
    finally:
        handle.remove()
    assert (found[0], found[2], found[3]) == (alone(1), alone(21), alone(0))
    steps = [shape for shape in shapes if shape[0] > 1]
    assert max(rows for rows, _ in steps) == 4
    assert any(later < earlier for (_, earlier), (_, later) in pairwise(steps))
    assert live.prefixes.counters.hits >= 1


def test_columns_are_given_back_when_the_longest_row_leaves() -> None:
    live = fresh(prefix_tokens=0)
    long = generation(0, prompt_ids=tuple(range(5, 65)))
    short = generation(0, prompt_ids=(5, 6, 7))
    first, second = live.join([long, short])
    assert live.batch is not None and live.batch.mask.shape == (2, 62)
    assert isinstance(first, Row) and isinstance(second, Row)
    live.leave([first])
    assert live.rows == [second]
    assert live.batch.mask.tolist() == [[1] * 5]
    assert keys_values(live.batch.cache)[0][0].shape[2] == 5
    live.leave([second])
    assert live.batch is None


def test_nothing_masked_is_sampled_whatever_the_bias() -> None:
    policy = dialled()
    masked = policy.encoder.masked_ids
    assert policy.manifest is not None and set(policy.manifest.all_ids) <= set(masked)
    usable = next(i for i in range(5, 400) if i not in masked)
    bias = (*((i, 100.0) for i in masked), (usable, 90.0))
    hot = Sampling(temperature=2.0, top_p=1.0, top_k=0, max_tokens=30)
    asked = generation(3, sampling=hot, logit_bias=bias)
    tokens = decode(fresh(), [(0, asked)], cancel={})[0]
    assert {t.id for t in tokens} == {usable}


def test_a_nucleus_of_the_whole_vocabulary_takes_the_likeliest() -> None:
    logits = torch.tensor([[0.1, 0.5, 0.1, 0.3]]).log()
    grid = torch.linspace(0, 0.999, 50)
    drawn = draw(logits.repeat(50, 1), grid, temperature=1.0, top_p=0.7, top_k=0)
    assert sorted(set(drawn.tolist())) == [1, 3]


@pytest.mark.parametrize("top_k", [0, 5, 256])
@pytest.mark.parametrize("number", [1 - 2**-26, 1 - 2**-53, 1 - 2**-24])
def test_a_number_that_rounds_to_one_draws_nothing_masked(number: float, top_k: int) -> None:
    logits = torch.randn(4, 91, generator=torch.Generator().manual_seed(0))
    logits[:, 3:] = -torch.inf
    drawn = draw(logits, torch.tensor([number] * 4), temperature=1.0, top_p=1.0, top_k=top_k)
    assert all(token < 3 for token in drawn.tolist())


EXTREME = st.builds(
    Sampling,
    temperature=st.sampled_from([0.0, 0.01, 1.0, 2.0, 1e3]),
    top_p=st.sampled_from([1e-50, 1e-38, 1e-6, 0.5, 1 - 1e-9, 1.0]),
    top_k=st.sampled_from([0, 1, 2, 256, 10**6]),
    max_tokens=st.integers(1, 3),
)
BIASES = st.dictionaries(
    st.integers(0, 300), st.sampled_from([-100.0, -1e-45, 0.0, 1e-45, 100.0]), max_size=301
)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(EXTREME, BIASES), min_size=1, max_size=3))
def test_no_sampling_however_extreme_touches_its_neighbour(
    asked: list[tuple[Sampling, dict[int, float]]],
) -> None:
    odd = [
        generation(i, sampling=sampling, logit_bias=tuple(biases.items()))
        for i, (sampling, biases) in enumerate(asked)
    ]
    found = decode(fresh(), [(0, generation(9)), *((0, one) for one in odd)], cancel={})
    assert found[0] == alone(9)
    masked = set(dialled().encoder.masked_ids)
    assert not masked & {token.id for tokens in found.values() for token in tokens}


def test_a_model_with_other_memory_is_refused() -> None:
    policy = tiny_policy()
    policy.model.config.layer_types = ["full_attention", "linear_attention"]
    with pytest.raises(ModelError, match="linear_attention"):
        LiveRows(policy.model, policy.encoder)


# The thread, the tickets, the end.


def serve(
    work: Callable[[ContinuousBatcher], Awaitable[None]], *, policy: LoadedPolicy | None = None
) -> None:
    async def main() -> None:
        found = policy or dialled()
        batcher = ContinuousBatcher(found.model, found.encoder, slots=4)
        await batcher.start()
        try:
            await asyncio.wait_for(work(batcher), 60)
        finally:
            await batcher.drain(0)
            assert not batcher.healthy

    asyncio.run(main())


async def collect(batcher: ContinuousBatcher, asked: Generation) -> list[Token]:
    return [token async for token in batcher.stream(asked)]


async def idle(batcher: ContinuousBatcher) -> None:
    while batcher.load() != Load(0, 0, 4):
        await asyncio.sleep(0.001)


LONG = Sampling(temperature=1.0, top_p=1.0, top_k=50, max_tokens=150)


def test_more_requests_than_slots_all_get_their_own_completion() -> None:
    async def work(batcher: ContinuousBatcher) -> None:
        found = await asyncio.gather(*(collect(batcher, generation(i)) for i in range(20)))
        assert found == [alone(i) for i in range(20)]
        assert batcher.load() == Load(0, 0, 4)
        assert batcher.prefixes.counters.hits > 0

    serve(work)


def test_one_key_cannot_take_all_slots_in_turn() -> None:
    """A newcomer of another key is next, however many of the first are in line."""

    async def work() -> None:
        line, loop = Line(4), asyncio.get_running_loop()
        many = [Ticket(generation(1, prefix_salt="many"), loop) for _ in range(9)]
        one, two = (Ticket(generation(1, prefix_salt=salt), loop) for salt in ("one", "two"))
        line.waiting.extend([*many, one, two])
        assert line.turn() == ([], [many[0], one, two, many[1]])
        line.deliver([(many[0], Token(-1, "stop"))])
        line.waiting.append(again := Ticket(generation(1, prefix_salt="one"), loop))
        assert line.turn() == ([], [many[2]])  # each has a row, so it goes by time again
        line.cancel(one)
        assert line.turn() == ([one], [again])
        assert line.load() == Load(4, 6, 4)

    asyncio.run(work())


def test_closing_frees_the_slot_within_one_step() -> None:
    steps = 0
    policy = dialled()

    def count(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal steps
        steps += kwargs["input_ids"].shape[1] == 1

    async def work(batcher: ContinuousBatcher) -> None:
        nonlocal steps
        # The end is never drawn, so only the reader's leaving can free the slot early.
        ends = tuple((i, -100.0) for i in policy.encoder.eos_ids)
        stream = batcher.stream(generation(0, sampling=LONG, logit_bias=ends))
        await anext(stream)
        await stream.aclose()  # type: ignore[attr-defined]
        before = steps
        await idle(batcher)
        # One step may be under way while the reader leaves, and one may have begun meanwhile.
        assert steps - before <= 2

    handle = policy.model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        serve(work)
    finally:
        handle.remove()


def test_cancelling_the_task_and_leaving_the_queue_free_everything() -> None:
    async def work(batcher: ContinuousBatcher) -> None:
        tasks = [
            asyncio.create_task(collect(batcher, generation(i, sampling=LONG))) for i in range(9)
        ]
        while batcher.load().queued < 5:
            await asyncio.sleep(0)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert batcher.load().queued == 0
        await idle(batcher)
        assert await collect(batcher, generation(1)) == alone(1)

    serve(work)


def test_a_thousand_disconnects_leave_nothing_behind() -> None:
    async def work(batcher: ContinuousBatcher) -> None:
        rng = random.Random(5)

        async def leave_early(index: int) -> None:
            stream = batcher.stream(generation(index % 40, sampling=LONG))
            for _ in range(rng.randrange(3)):
                await anext(stream, None)
            await stream.aclose()  # type: ignore[attr-defined]

        for _ in range(20):
            await asyncio.gather(*(leave_early(i) for i in range(50)))
        await idle(batcher)
        assert len(asyncio.all_tasks()) == 2  # this one, and the one that times it
        assert batcher._live.rows == []
        assert await collect(batcher, generation(2)) == alone(2)

    serve(work)


def test_a_failing_newcomer_and_a_poisoned_row_leave_the_others_alone() -> None:
    policy = dialled()
    poison = 37
    raising = (9, 9, 9)

    def fail(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["input_ids"][0, :3].tolist() == list(raising):
            raise RuntimeError("no memory for this one")

    def break_row(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        output.logits[(kwargs["input_ids"][:, -1] == poison)] = float("nan")

    async def work(batcher: ContinuousBatcher) -> None:
        asked = [generation(i) for i in range(3)]
        asked.append(generation(3, prompt_ids=raising, prefix_salt="other"))
        asked.append(generation(4, control_ids=(poison,), prefix_salt="other"))
        asked += [generation(i) for i in range(5, 9)]
        found = await asyncio.gather(*(collect(batcher, a) for a in asked), return_exceptions=True)
        assert isinstance(found[3], ServingError) and "RuntimeError" in str(found[3])
        assert "no memory" not in str(found[3])  # a library's text may hold anything
        assert isinstance(found[4], ServingError) and "not finite" in str(found[4])
        assert [found[i] for i in (0, 1, 2, 5, 6, 7, 8)] == [
            alone(i) for i in (0, 1, 2, *range(5, 9))
        ]
        assert batcher.healthy

    handles = [
        policy.model.register_forward_pre_hook(fail, with_kwargs=True),
        policy.model.register_forward_hook(break_row, with_kwargs=True),
    ]
    try:
        serve(work)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("fatal", [True, False])
def test_a_dead_thread_or_a_model_that_fails_every_step_is_unhealthy(fatal: bool) -> None:
    policy = dialled()

    def fail(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        if kwargs["input_ids"].shape[1] == 1:
            raise SystemExit if fatal else RuntimeError("every step")

    async def work(batcher: ContinuousBatcher) -> None:
        for _ in range(1 if fatal else 3):
            assert batcher.healthy
            with pytest.raises(ServingError):
                await collect(batcher, generation(0))
            await asyncio.sleep(0.05)
        assert not batcher.healthy
        with pytest.raises(ServingError, match="takes no more"):
            await collect(batcher, generation(0))
        assert batcher.load() == Load(0, 0, 4)

    handle = policy.model.register_forward_pre_hook(fail, with_kwargs=True)
    try:
        serve(work)
    finally:
        handle.remove()


def test_one_failed_step_ends_its_rows_only() -> None:
    policy = dialled()
    left = 1

    def fail(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal left
        if kwargs["input_ids"].shape[1] == 1 and left:
            left -= 1
            raise RuntimeError("once")

    async def work(batcher: ContinuousBatcher) -> None:
        with pytest.raises(ServingError):
            await collect(batcher, generation(0))
        assert batcher.healthy
        assert await collect(batcher, generation(1)) == alone(1)

    handle = policy.model.register_forward_pre_hook(fail, with_kwargs=True)
    try:
        serve(work)
    finally:
        handle.remove()


def test_draining_lets_requests_finish_and_takes_no_new_ones() -> None:
    async def work(batcher: ContinuousBatcher) -> None:
        tasks = [asyncio.create_task(collect(batcher, generation(i))) for i in range(8)]
        await asyncio.sleep(0)
        draining = asyncio.create_task(batcher.drain(30))
        await asyncio.sleep(0)
        with pytest.raises(ServingError, match="takes no more"):
            await collect(batcher, generation(0))
        assert await asyncio.gather(*tasks) == [alone(i) for i in range(8)]
        await draining
        assert not batcher.healthy

    serve(work)


def test_what_has_not_finished_when_time_is_up_gets_an_error() -> None:
    async def work(batcher: ContinuousBatcher) -> None:
        ends = tuple((i, -100.0) for i in dialled().encoder.eos_ids)
        long = [generation(i, sampling=LONG, logit_bias=ends) for i in range(8)]
        tasks = [asyncio.create_task(collect(batcher, asked)) for asked in long]
        await asyncio.sleep(0)
        await batcher.drain(0)
        found = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(item, ServingError) for item in found)
        assert batcher.load() == Load(0, 0, 4)

    serve(work)


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt_ids": (10**6,)},
        {"prompt_ids": (-1,)},
        {"prompt_ids": (), "control_ids": ()},
        {"prompt_ids": tuple(range(5, 250))},
        {"logit_bias": ((10**6, 1.0),)},
        {"sampling": LONG.model_copy(update={"max_tokens": 0})},
    ],
)
def test_a_generation_that_does_not_fit_is_refused_before_the_model(
    changes: dict[str, Any],
) -> None:
    async def work(batcher: ContinuousBatcher) -> None:
        with pytest.raises(DataError):
            await collect(batcher, generation(0, **{"sampling": LONG, **changes}))
        assert batcher.healthy and batcher.load() == Load(0, 0, 4)

    serve(work)
