"""Prefixes are shared under one salt only, and the cache stays within its tokens."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batcher_kit import decode, dialled, fresh, generation
from equipoise.engine.cache import MIN_SHARED, PrefixCache
from equipoise.engine.decode import LiveRows

LONG = tuple(range(5, 45))


def test_the_same_prefix_under_two_salts_is_no_hit_and_under_one_is() -> None:
    """Both halves: a cache that is off would pass the first alone."""
    for salts, hits in ((("a", "b"), 0), (("a", "a"), 1)):
        live = fresh()
        first, second = (generation(0, prompt_ids=LONG, prefix_salt=salt) for salt in salts)
        decode(live, [(0, first), (1, second)], cancel={})
        assert live.prefixes.counters.hits == hits
        assert live.prefixes.counters.tokens_saved == hits * len(LONG)


def test_a_reused_prefix_is_not_computed_again_and_changes_no_token() -> None:
    live, lengths = fresh(), []
    handle = live.model.register_forward_pre_hook(
        lambda m, a, k: lengths.append(k["input_ids"].shape[1]), with_kwargs=True
    )
    other = generation(1, prompt_ids=(*LONG, 7, 8, 9), prefix_salt="a")
    try:
        decode(live, [(0, generation(0, prompt_ids=LONG, prefix_salt="a"))], cancel={})
        lengths.clear()
        reused = decode(live, [(0, other)], cancel={})[0]
    finally:
        handle.remove()
    assert lengths[0] == 3 + len(other.control_ids)
    assert reused == decode(fresh(prefix_tokens=0), [(0, other)], cancel={})[0]


def test_a_prompt_that_several_bring_along_is_read_once_per_salt() -> None:
    live, shapes = fresh(prefix_tokens=0), []
    handle = live.model.register_forward_pre_hook(
        lambda m, a, k: shapes.append(tuple(k["input_ids"].shape)), with_kwargs=True
    )
    asked = [generation(i, prompt_ids=LONG, prefix_salt="aab"[i]) for i in range(3)]
    try:
        found = decode(live, [(0, one) for one in asked], cancel={})
    finally:
        handle.remove()
    assert shapes[:2] == [(2, len(LONG)), (3, len(asked[0].control_ids))]
    for i, one in enumerate(asked):
        assert found[i] == decode(fresh(prefix_tokens=0), [(0, one)], cancel={})[0]


def test_the_whole_prompt_again_without_controls_still_has_a_position_to_compute() -> None:
    live = fresh()
    asked = generation(0, prompt_ids=LONG, control_ids=(), prefix_salt="a")
    first = decode(live, [(0, asked)], cancel={})[0]
    assert decode(live, [(0, asked)], cancel={})[0] == first
    assert live.prefixes.counters.hits == 1


def test_a_prompt_of_another_key_never_changes_what_is_computed() -> None:
    """Fill the cache under one salt; the other salt recomputes everything."""
    policy = dialled()
    cache: PrefixCache[object] = PrefixCache(4096)
    live = LiveRows(policy.model, policy.encoder, cache)  # type: ignore[arg-type]
    decode(live, [(0, generation(0, prompt_ids=LONG, prefix_salt="a"))], cancel={})
    lengths: list[int] = []
    handle = live.model.register_forward_pre_hook(
        lambda m, a, k: lengths.append(k["input_ids"].shape[1]), with_kwargs=True
    )
    try:
        decode(live, [(0, generation(0, prompt_ids=LONG, prefix_salt="b"))], cancel={})
    finally:
        handle.remove()
    assert lengths[0] == len(LONG) + 2


def test_the_oldest_entry_makes_room_and_a_used_one_stays() -> None:
    cache: PrefixCache[str] = PrefixCache(3 * MIN_SHARED)
    prompts = {name: (i,) * MIN_SHARED for i, name in enumerate("abcd")}
    for name in "abc":
        cache.put("s", prompts[name], name)
    assert cache.match("s", prompts["a"]) == (MIN_SHARED, "a")
    cache.put("s", prompts["d"], "d")
    assert cache.match("s", prompts["b"]) == (0, None)
    assert cache.match("s", prompts["a"]) == (MIN_SHARED, "a")
    assert cache.tokens == 3 * MIN_SHARED


def test_a_longer_prompt_replaces_the_one_it_extends() -> None:
    cache: PrefixCache[str] = PrefixCache(1000)
    cache.put("s", LONG[:20], "short")
    cache.put("s", LONG, "long")
    assert cache.tokens == len(LONG)
    assert cache.match("s", LONG[:20]) == (20, "long")
    cache.put("s", LONG[:30], "part of what is there")
    assert cache.tokens == len(LONG)


@pytest.mark.parametrize("size", [0, 5, 39])
def test_what_does_not_fit_is_not_kept(size: int) -> None:
    cache: PrefixCache[str] = PrefixCache(size)
    cache.put("s", LONG, "x")
    assert cache.tokens == 0 and cache.match("s", LONG) == (0, None)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(10, 200))
def test_against_a_plain_model_of_the_cache(seed: int, limit: int) -> None:
    """Whatever is put in: the bound holds, and a match is a true prefix under the same salt."""
    rng = random.Random(seed)
    cache: PrefixCache[tuple[str, tuple[int, ...]]] = PrefixCache(limit)
    put: list[tuple[str, tuple[int, ...]]] = []
    for _ in range(40):
        salt, ids = rng.choice("ab"), tuple(rng.randrange(2) for _ in range(rng.randrange(40)))
        length, state = cache.match(salt, ids)
        if state is not None:
            assert state in put and state[0] == salt
            assert length >= MIN_SHARED and state[1][:length] == ids[:length]
            assert state[1][: length + 1] != ids[: length + 1] or length == len(ids)
        cache.put(salt, ids, (salt, ids))
        put.append((salt, ids))
        assert cache.tokens <= limit
        assert cache.tokens == sum(len(key[1]) for key in cache._entries)
        if MIN_SHARED <= len(ids) <= limit:
            assert cache.match(salt, ids)[0] == len(ids)
