"""MOEC by hand, and the back door on sets whose answer is known."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.config import DistilConfig
from equipoise.dials.dials import Dials
from equipoise.engine.seam import Sampled
from equipoise.errors import DataError
from equipoise.pool.backdoor import back_door
from equipoise.pool.moec import distil
from equipoise.types import (
    Completion,
    ControlledExample,
    DialSetting,
    Message,
    Prompt,
    ScoredCompletion,
)

ATTRIBUTES = ("helpfulness", "safety")


def prompt(name: str, text: str = "what now?") -> Prompt:
    return Prompt(name, (Message("user", text),), "train")


def scored(name: str, index: int, text: str, finish: str = "stop") -> ScoredCompletion:
    completion = Completion(name, index, text, finish, 9, "h")  # type: ignore[arg-type]
    return ScoredCompletion(completion, {}, {})


def unit(helpfulness: float, safety: float) -> dict[str, float]:
    return {"helpfulness": helpfulness, "safety": safety}


def run(
    rows: list[tuple[ScoredCompletion, dict[str, float]]], **config: object
) -> tuple[list[ControlledExample], object]:
    names = {row.completion.prompt_id for row, _ in rows}
    return distil(
        [row for row, _ in rows],
        [u for _, u in rows],
        {name: prompt(name) for name in names},
        DistilConfig(**config),  # type: ignore[arg-type]
        dials=Dials(ATTRIBUTES, 5),
    )


def text(index: int) -> str:
    return f"take the number {index} and turn it slowly"


GOOD = [
    (scored("a", 0, text(0)), unit(0.05, 0.05)),  # cell (0, 0), .07 from its centre
    (scored("a", 1, text(1)), unit(0.11, 0.09)),  # cell (0, 0), nearer
    (scored("a", 2, text(2)), unit(0.5, 0.5)),  # cell (2, 2)
    (scored("a", 3, text(3)), unit(0.99, 0.3)),  # cell (4, 1)
]


def test_one_completion_per_cell_and_it_is_the_nearest() -> None:
    examples, report = run(GOOD)
    assert [e.setting.levels for e in examples] == [(0, 0), (2, 2), (4, 1)]
    assert examples[0].text == text(1)
    assert report.n_pool == 4
    assert report.n_kept == 3
    assert report.dropped["not the nearest in its cell"] == 1
    assert report.grid_before[0][0] == 2
    assert report.grid_after[0][0] == 1


def test_ties_go_to_the_earlier_sample() -> None:
    later = (scored("a", 8, text(8)), unit(0.08, 0.1))
    rows = [*GOOD[2:], (scored("a", 7, text(7)), unit(0.12, 0.1)), later]
    examples, _ = run(rows)
    assert examples[0].text == text(7)


def test_a_prompt_must_span_two_levels_of_each_attribute() -> None:
    flat = [
        (scored("b", i, text(i)), unit(u, 0.5)) for i, u in enumerate((0.1, 0.3, 0.5, 0.7, 0.9))
    ]
    examples, report = run([*GOOD, *flat])
    assert {e.prompt.id for e in examples} == {"a"}
    assert report.dropped["prompt spans too few cells"] == 5
    with pytest.raises(DataError, match="kept no prompt"):
        run(flat)


def test_duplicates_and_degenerate_texts_are_dropped() -> None:
    rows = [
        *GOOD,
        (scored("a", 4, text(0)), unit(0.9, 0.9)),
        (scored("a", 5, "on and on and on and on and on and on"), unit(0.9, 0.9)),
        (scored("a", 6, "no"), unit(0.9, 0.9)),
    ]
    examples, report = run(rows)
    assert len(examples) == 3
    assert report.dropped["duplicate"] == 1
    assert report.dropped["degenerate"] == 2
    raw, _ = run(rows, data="raw")
    assert len(raw) == 7
    denoised, _ = run(rows, data="denoised")
    assert len(denoised) == 4


def test_cut_completions_are_shortened_and_get_no_end_token() -> None:
    cut = Completion("a", 0, "Turn the key. Then lift the", "length", 9, "h")
    assert cut.sentences == "Turn the key."
    assert Sampled((), "1. Turn\n2. Lift the lid", "length").sentences is None
    assert Sampled((), "It costs 3.50 for the", "length").sentences is None
    assert Sampled((), "As it is", "stop").sentences == "As it is"
    rows = [
        *GOOD[:3],
        (scored("a", 3, "Turn the big key now. Then lift", "length"), unit(0.9, 0.1)),
    ]
    last = run(rows)[0][-1]
    assert last.text == "Turn the big key now."
    assert not last.finished


def test_balance_weights_are_capped_and_average_one() -> None:
    rows = GOOD + [(scored("b", i, text(i)), u) for i, (_, u) in enumerate(GOOD[1:3])]
    rows += [(scored("b", 9, text(9)), unit(0.7, 0.9))]
    examples, _ = run(rows, balance_cap=1.5)
    weights = [e.weight for e in examples]
    assert sum(weights) / len(weights) == pytest.approx(1.0)
    assert max(weights) / min(weights) == pytest.approx(1.5)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=1, max_size=40), st.data())
def test_moec_invariants(units: list[tuple[float, float]], data: st.DataObject) -> None:
    names = [data.draw(st.sampled_from("abc")) for _ in units]
    named = enumerate(zip(names, units, strict=True))
    rows = [(scored(name, i, text(i)), unit(*u)) for i, (name, u) in named]
    try:
        examples, report = run(rows)
    except DataError:
        return
    assert len({(e.prompt.id, e.setting) for e in examples}) == len(examples)
    for name in {e.prompt.id for e in examples}:
        cells = {e.setting.levels for e in examples if e.prompt.id == name}
        assert len(cells) >= 3
        assert all(len({cell[a] for cell in cells}) >= 2 for a in (0, 1))
    assert report.n_kept + sum(report.dropped.values()) == report.n_pool


def _example(i: int, cell: tuple[int, int], words: str) -> ControlledExample:
    return ControlledExample(prompt(f"p{i}", words), DialSetting(cell), "x", True, unit(0, 0))


def test_back_door_open_and_closed() -> None:
    kinds = ("tune the bell", "light the lamp")
    corners = ((0, 0), (4, 4), (0, 4), (4, 0))
    open_door = [_example(i, corners[i % 2], f"{kinds[i % 2]} {i}") for i in range(80)]
    closed = [_example(i, c, f"{kinds[i % 2]} {i}") for i in range(20) for c in corners]
    opened = back_door(open_door, n_rows=80, seed=0)
    shut = back_door(closed, n_rows=80, seed=0)
    assert opened.effective_cells.value == pytest.approx(1.0)
    assert shut.effective_cells.value == pytest.approx(4.0)
    assert opened.predictive_bits.low > 0.3
    assert shut.predictive_bits.value < 0.05
    # One row per prompt: the plug-in estimate is the entropy of the cells, and so is its null.
    assert opened.mutual_information == pytest.approx(opened.mutual_information_null)
    assert back_door(closed, n_rows=40, seed=0).n_rows == 40
