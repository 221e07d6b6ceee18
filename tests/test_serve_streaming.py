"""Streamed text is byte for byte the decoded text, and stop strings never leak."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.encoding.encode import Encoder
from equipoise.engine.text import Detokenizer, StopStrings
from tokenizer_kit import FAMILIES, ordinary

CHUNKINGS = 20
TEXTS = 334
"""Per family: 2,004 texts in all."""
_RICH = [
    "\N{FAMILY}\N{ZERO WIDTH JOINER}\U0001f469",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467",
    "🙂🙃",
    "東京都",
    "e\u0301a\u0308",
    "नमस्ते",
    "\u200f\u05e9\u05dc\u05d5\u05dd",
    "\N{REPLACEMENT CHARACTER}",
    "👍🏽",
    " ",
    "\n\n",
    "▁",
    "\x00",
]


def rich(rng: random.Random) -> str:
    parts = [rng.choice([*_RICH, ordinary(rng)[:30]]) for _ in range(rng.randint(1, 6))]
    return rng.choice(["", " "]).join(parts)


def chunks(rng: random.Random, ids: list[int]) -> list[list[int]]:
    result, at = [], 0
    while at < len(ids):
        size = rng.choice([1, 1, 1, 2, 3, 7])
        result.append(ids[at : at + size])
        at += size
    return result


def streamed(encoder: Encoder, pieces: list[list[int]]) -> list[str]:
    detokenizer = Detokenizer(encoder)
    return [*(detokenizer.push(piece) for piece in pieces), detokenizer.flush()]


@pytest.mark.parametrize("family", FAMILIES)
def test_deltas_are_the_text_for_every_chunking(family: str) -> None:
    encoder, rng = Encoder(FAMILIES[family]()), random.Random(3)
    for _ in range(TEXTS):
        ids = encoder.completion_ids(rich(rng), finished=False)
        whole = encoder.decode(ids)
        for _ in range(CHUNKINGS):
            deltas = streamed(encoder, chunks(rng, ids))
            assert "".join(deltas) == whole
            assert sum(delta.count("\ufffd") for delta in deltas) == whole.count("\ufffd")


@pytest.mark.parametrize("family", FAMILIES)
def test_ids_that_spell_no_text_are_decoded_alike(family: str) -> None:
    """A model may sample halves of characters in any order."""
    encoder, rng = Encoder(FAMILIES[family]()), random.Random(4)
    allowed = sorted(set(range(len(encoder.tokenizer))) - encoder.forbidden)
    for _ in range(300):
        ids = rng.choices(allowed, k=rng.randint(1, 30))
        assert "".join(streamed(encoder, chunks(rng, ids))) == encoder.decode(ids)


def test_text_comes_while_it_is_written() -> None:
    """Holding all of it back until the end would pass the tests above."""
    encoder = Encoder(FAMILIES["byte_bpe"]())
    ids = encoder.completion_ids("The ferry leaves at noon. " * 20, finished=False)
    deltas = streamed(encoder, [[one] for one in ids])
    assert all(deltas[:-1]) and deltas[-1] == ""


_LETTERS = st.text("ab", max_size=30)


@settings(max_examples=2000, deadline=None, derandomize=True)
@given(_LETTERS, st.lists(st.text("ab", min_size=1, max_size=5), max_size=4), st.randoms())
def test_the_cut_does_not_depend_on_the_chunks(
    text: str, stops: list[str], rng: random.Random
) -> None:
    complete = [
        (end, start)
        for end in range(1, len(text) + 1)
        for stop in stops
        if text[:end].endswith(stop)
        for start in [end - len(stop)]
    ]
    expected = text[: min(complete)[1]] if complete else text
    filter_, shown, at = StopStrings(stops), "", 0
    while at < len(text):
        size = rng.randint(1, 6)
        shown += filter_.push(text[at : at + size])
        assert expected.startswith(shown)
        at += size
    shown += filter_.flush()
    assert shown == expected
    assert filter_.stopped == bool(complete)


def test_only_a_possible_beginning_is_held_back() -> None:
    filter_ = StopStrings(["END"])
    assert [filter_.push(part) for part in ("xE", "N", "x", "EN")] == ["x", "", "ENx", ""]
    assert filter_.flush() == "EN"
    assert StopStrings([]).push("anything") == "anything"
