"""Scoring once, mid-rank calibration, and what the report says about the scale."""

from __future__ import annotations

import logging
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipoise.errors import DataError, RewardError
from equipoise.pool.calibrate import (
    Calibration,
    between_share,
    calibrate,
    calibration_report,
    mid_rank,
    pool_hash,
    top_tie,
    unit_scores,
)
from equipoise.pool.score import score
from equipoise.types import DialSetting, ScoredCompletion
from reward_kit import FixedReward, completion, prompt

NUMBERS = st.floats(min_value=-1e6, max_value=1e6, allow_nan=False)


def pool(**by_prompt: list[float]) -> list[ScoredCompletion]:
    return [
        ScoredCompletion(
            completion(prompt_id, f"{prompt_id} {i}", sample=i),
            {"helpfulness": value},
            {"helpfulness": "h"},
        )
        for prompt_id, values in by_prompt.items()
        for i, value in enumerate(values)
    ]


def test_mid_rank_by_hand() -> None:
    values = (1.0, 2.0, 2.0, 5.0)
    found = [mid_rank(values, raw) for raw in (0.0, 1.0, 1.5, 2.0, 3.0, 5.0, 9.0)]
    assert found == [0.0, 0.125, 0.25, 0.5, 0.75, 0.875, 1.0]


@given(st.lists(NUMBERS, min_size=1), NUMBERS, NUMBERS)
def test_unit_is_monotone_and_in_range(values: list[float], a: float, b: float) -> None:
    scale = Calibration({"x": tuple(sorted(values))}, "h")
    low, high = scale.unit("x", min(a, b)), scale.unit("x", max(a, b))
    assert 0.0 <= low <= high <= 1.0


@given(st.lists(NUMBERS, min_size=1))
def test_mean_unit_score_of_the_pool_is_one_half(values: list[float]) -> None:
    scale = Calibration({"x": tuple(sorted(values))}, "h")
    mean = math.fsum(scale.unit("x", value) for value in values) / len(values)
    assert mean == pytest.approx(0.5)


@given(st.lists(NUMBERS, min_size=1), st.sampled_from(["pooled", "within_prompt"]))
def test_json_round_trip_is_exact(values: list[float], mode: str) -> None:
    scale = Calibration({"x": tuple(sorted(values))}, "h", mode)  # type: ignore[arg-type]
    assert Calibration.from_json(scale.to_json()) == scale


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"mode": "pooled", "pool_hash": "h"}',
        '{"mode": "sideways", "pool_hash": "h", "scores": {"x": [1.0]}}',
        '{"mode": "pooled", "pool_hash": "h", "scores": {"x": [2.0, 1.0]}}',
        '{"mode": "pooled", "pool_hash": "h", "scores": {"x": []}}',
        '{"mode": "pooled", "pool_hash": "h", "scores": {"x": [NaN]}}',
    ],
)
def test_damaged_calibration_is_refused(text: str) -> None:
    with pytest.raises(DataError, match="calibration"):
        Calibration.from_json(text)


def test_unknown_attribute_is_named() -> None:
    with pytest.raises(DataError, match="wit"):
        Calibration({"x": (1.0,)}, "h").unit("wit", 1.0)


def test_within_prompt_ranks_among_fellows() -> None:
    rows = pool(a=[1.0, 2.0], b=[10.0, 20.0])
    pooled = unit_scores(rows, calibrate(rows, mode="pooled"))
    within = unit_scores(rows, calibrate(rows, mode="within_prompt"))
    assert [u["helpfulness"] for u in pooled] == [0.125, 0.375, 0.625, 0.875]
    assert [u["helpfulness"] for u in within] == [0.25, 0.75, 0.25, 0.75]


def test_within_prompt_ranks_a_prompt_without_own_completions_in_the_whole_pool() -> None:
    rows = pool(a=[1.0, 2.0], b=[10.0, 20.0])
    asked = replace(rows[2].completion, prompt_id="c", setting=DialSetting((0, 0)))
    with_prompted = [*rows, replace(rows[2], completion=asked)]
    calibration = calibrate(rows, mode="within_prompt")
    found = [unit["helpfulness"] for unit in unit_scores(with_prompted, calibration)]
    assert found == [0.25, 0.75, 0.25, 0.75, 0.625]


def test_equal_scores_are_refused() -> None:
    with pytest.raises(RewardError, match="All scores for helpfulness are equal"):
        calibrate(pool(a=[1.0, 1.0], b=[1.0]), mode="pooled")
    rows = pool(a=[1.0, 1.0], b=[2.0, 2.0])
    calibrate(rows, mode="pooled")
    with pytest.raises(RewardError, match="equal"):
        calibrate(rows, mode="within_prompt")


def test_empty_pool_is_refused() -> None:
    with pytest.raises(DataError, match="empty"):
        calibrate([], mode="pooled")


@pytest.mark.parametrize(("n_top", "warned"), [(1, False), (9, False), (10, True), (30, True)])
def test_tie_at_the_top_warns_from_a_tenth(
    n_top: int, warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    rows = pool(a=[*map(float, range(100 - n_top)), *[1000.0] * n_top])
    with caplog.at_level(logging.WARNING):
        scale = calibrate(rows, mode="pooled")
    assert bool(caplog.records) is warned
    assert scale.unit("helpfulness", 1000.0) == pytest.approx(1 - n_top / 200)
    assert top_tie(scale.scores["helpfulness"]) == (n_top / 100 if n_top > 1 else 0.0)


def test_between_share_by_hand() -> None:
    assert between_share([[1.0, 1.0], [3.0, 3.0]]) == 1.0
    assert between_share([[1.0, 3.0], [3.0, 1.0]]) == 0.0
    # Mean 3, group means 2 and 4: between 2·1 + 2·1 = 4, total 4 + 0 + 1 + 9 = 14.
    assert between_share([[1.0, 3.0], [2.0, 6.0]]) == pytest.approx(4.0 / 14.0)
    assert between_share([[5.0], [5.0]]) == 0.0


def test_report_sees_the_judge_within_prompts() -> None:
    rows = pool(a=[1.0, 2.0, 3.0], b=[4.0, 5.0, 6.0], c=[7.0, 7.0, 7.0])
    mirrored = pool(a=[3.0, 2.0, 1.0], b=[1.0, 2.0, 3.0], c=[0.0, 1.0, 2.0])
    scale = calibrate(rows, mode="pooled")
    alone = calibration_report(rows, scale)["helpfulness"]
    judged = calibration_report(rows, scale, mirrored)["helpfulness"]
    assert alone["within_prompt_judge_correlation"] is None
    assert judged["within_prompt_judge_correlation"] == pytest.approx(0.0)
    assert judged["between_prompt_share"] == pytest.approx(
        between_share([[1, 2, 3], [4, 5, 6], [7, 7, 7]])
    )
    assert judged["top_tie"] == pytest.approx(1 / 3)
    assert judged["highest_unit"] == pytest.approx(1 - 1 / 6)


def test_pool_hash_knows_content_not_order() -> None:
    rows = pool(a=[1.0, 2.0], b=[3.0])
    assert pool_hash(rows) == pool_hash(rows[::-1])
    assert pool_hash(rows) != pool_hash(pool(a=[1.0, 2.0], b=[3.5]))


def test_equal_texts_of_a_prompt_are_scored_once_and_order_is_kept() -> None:
    prompts = {name: prompt(name, id=name) for name in "ab"}
    rows = [completion("a", t, sample=i) for i, t in enumerate(["x", "y", "x"])]
    rows += [completion("b", t, sample=i) for i, t in enumerate(["x", "x", "zz"])]
    model = FixedReward(lambda asked: [len(p.id + t) + ord(p.id[0]) for p, t in asked])
    chunks = list(score(rows, prompts, {"safety": model}, chunk_size=2))
    assert [len(chunk) for chunk in chunks] == [2, 2, 2]
    flat = [row for chunk in chunks for row in chunk]
    assert [row.completion for row in flat] == rows
    assert [row.raw["safety"] for row in flat] == [99, 99, 99, 100, 100, 101]
    assert flat[0].reward_models == {"safety": "fixed"}
    assert model.asked == [("a", "x"), ("a", "y"), ("b", "x"), ("b", "zz")]


@pytest.mark.parametrize("broken", [math.nan, math.inf, -math.inf])
def test_score_that_is_not_finite_names_the_prompt_and_yields_nothing(broken: float) -> None:
    prompts = {name: prompt(name, id=name) for name in ("good", "bad-one")}
    rows = [completion("good", "x"), completion("bad-one", "y")]
    model = FixedReward(lambda asked: [broken if p.id == "bad-one" else 0.0 for p, _ in asked])
    with pytest.raises(RewardError, match="bad-one"):
        next(score(rows, prompts, {"safety": model}))


@pytest.mark.parametrize("n", [0, 1, 3])
def test_wrong_number_of_scores_is_refused(n: int) -> None:
    prompts = {"a": prompt("a", id="a")}
    rows = [completion("a", "x"), completion("a", "y")]
    with pytest.raises(RewardError, match=f"{n} scores for 2 rows"):
        next(score(rows, prompts, {"safety": FixedReward(lambda asked: [0.0] * n)}))


def test_completion_of_an_unknown_prompt_is_refused() -> None:
    with pytest.raises(DataError, match="stranger"):
        next(score([completion("stranger", "x")], {}, {}))
