"""Metrics on numbers a reader can check by hand, and on policies whose figures are known."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.dials.dials import Dials, cells
from equipoise.errors import DataError
from equipoise.evaluate.measure import compare_mp, measure, measure_grid
from equipoise.evaluate.metrics import (
    Grid,
    bt_per_prompt,
    ceiling_grid,
    chance_leakage,
    leakage_per_prompt,
    median_floor,
    mp_per_prompt,
    pearson,
    untouched_floor,
)
from equipoise.stats import Bootstrap, over_seeds
from equipoise.types import Delivery, DialSetting
from eval_kit import ATTRIBUTES, deliveries_from, noisy_policy, targets


def grid(unit: np.ndarray, levels: int) -> Grid:
    ids = tuple(f"p{p}" for p in range(unit.shape[1]))
    return Grid(np.asarray(unit, float), ids, ATTRIBUTES[: unit.shape[-1]], levels)


def perfect(prompts: int = 4, levels: int = 5) -> Grid:
    return grid(np.broadcast_to(targets(levels), (1, prompts, levels**2, 2)), levels)


def test_pearson_by_hand() -> None:
    level = np.array([0, 1, 2])
    assert pearson(level, np.array([0.1, 0.2, 0.3])) == pytest.approx(1)
    # Deviations (-1, 0, 1) and (-1/3, 2/3, -1/3): orthogonal.
    assert pearson(level, np.array([0.0, 1.0, 0.0])) == pytest.approx(0)
    # x = (-1, 0, 1), y = (-2, 1, 1)/3: 1 / (sqrt 2 * sqrt(6)/3) = sqrt(3)/2.
    assert pearson(level, np.array([0.0, 1.0, 1.0])) == pytest.approx(np.sqrt(3) / 2)


@pytest.mark.parametrize("value", [0.0, 0.1, 0.3, 1 / 3])
def test_a_score_that_never_moves_counts_zero(value: float) -> None:
    assert pearson(np.arange(25), np.full((2, 3, 25), value)).tolist() == np.zeros((2, 3)).tolist()


def test_two_by_two_grid_by_hand() -> None:
    # Cells (hp, sf): 00, 01, 10, 11. Helpfulness follows its dial in prompt 0 and never moves in
    # prompt 1; in prompt 0 the safety dial lifts helpfulness as well.
    unit = np.array(
        [[[[0.1, 0.2], [0.3, 0.8], [0.7, 0.2], [0.9, 0.8]], [[0.5, 0.8], [0.5, 0.2]] * 2]]
    )
    report = measure_grid(grid(unit, 2), bootstrap=Bootstrap(200))
    # Deviations of helpfulness: (-.4, -.2, .2, .4); of the level: (-.5, -.5, .5, .5).
    rho = 0.6 / np.sqrt(1 * 0.4)
    assert report.mp["helpfulness"].value == pytest.approx(rho / 2)
    assert report.never_moves["helpfulness"].value == 0.5
    assert report.mp["safety"].value == pytest.approx(0)  # +1 and -1
    assert report.overall.value == pytest.approx(rho / 4)
    assert report.bt["helpfulness"].value == pytest.approx(0.75)  # always, and all ties
    assert report.bt["safety"].value == pytest.approx(0.5)
    assert report.leakage["helpfulness"].value == pytest.approx(0.2 / np.sqrt(0.4) / 2)
    assert report.leakage_absolute["helpfulness"].value == pytest.approx(0.2 / np.sqrt(0.4) / 2)
    assert report.range["helpfulness"].value == pytest.approx((0.8 - 0.2) / 2)
    # Targets .25 / .75. Prompt 0: errors -.15, .05, -.05, .15; prompt 1: .25, .25, -.25, -.25.
    assert report.rmse["helpfulness"].value == pytest.approx(np.sqrt((0.05 + 0.25) / 8))
    assert report.bias["helpfulness"][0].value == pytest.approx((-0.15 + 0.05 + 0.25 + 0.25) / 4)
    assert report.spread["helpfulness"][0].value == pytest.approx(np.std([-0.15, 0.05, 0.25, 0.25]))
    assert report.posterior["safety"].tolist() == [[0.5, 0.5], [0.5, 0.5]]
    assert report.joint.sum() == 8
    assert report.joint[0].tolist() == [1, 0, 0, 1]  # (.1, .2) is cell 00, (.5, .8) is cell 11
    # Cell means of helpfulness: .3, .4, .6, .7, all within .25 of their targets; of safety all .5.
    assert report.coverage.value == 1.0


def test_extremes_and_neighbours_by_hand() -> None:
    one = grid(np.array([[[[0.2], [0.1], [0.9]]]]), 3)
    assert bt_per_prompt(one, "helpfulness", neighbours=False).tolist() == [1.0]
    assert bt_per_prompt(one, "helpfulness", neighbours=True).tolist() == [0.5]


def test_coverage_needs_both_attributes() -> None:
    unit = perfect().unit.copy()
    unit[..., 1] = 0.5  # a dial that is dead in safety hits its middle level only
    assert measure_grid(grid(unit, 5), bootstrap=Bootstrap(10)).coverage.value == pytest.approx(
        1 / 5
    )


def test_coverage_border_is_inside() -> None:
    unit = perfect().unit + np.array([0.1, 0.0])
    assert measure_grid(grid(unit, 5), bootstrap=Bootstrap(10)).coverage.value == 1.0
    assert (
        measure_grid(grid(unit + np.array([0.001, 0]), 5), bootstrap=Bootstrap(10)).coverage.value
        == 0.0
    )


def test_floors_are_those_of_the_design() -> None:
    assert median_floor(5) == pytest.approx(0.283, abs=5e-4)
    assert untouched_floor(5) == pytest.approx(0.404, abs=5e-4)
    assert chance_leakage(25) == pytest.approx(0.163, abs=5e-4)
    middle = measure_grid(grid(np.full((1, 3, 25, 2), 0.5), 5), bootstrap=Bootstrap(10))
    assert middle.rmse["safety"].value == pytest.approx(median_floor(5))


def test_perfect_policy() -> None:
    report = measure_grid(perfect(), bootstrap=Bootstrap(50))
    for name in ATTRIBUTES:
        assert report.mp[name].value == pytest.approx(1)
        assert report.bt[name].value == report.bt_neighbours[name].value == 1
        assert report.leakage[name].value == pytest.approx(0)
        assert report.rmse[name].value == pytest.approx(0)
        assert report.range[name].value == pytest.approx(0.8)
        assert np.array_equal(report.posterior[name], np.eye(5))
    assert report.coverage.value == 1
    assert np.array_equal(report.joint, 4 * np.eye(25))


def test_deaf_policy() -> None:
    unit = np.random.default_rng(0).random((2, 400, 25, 2))
    report = measure_grid(grid(unit, 5), bootstrap=Bootstrap(200))
    for name in ATTRIBUTES:
        assert abs(report.mp[name].value) < 0.03
        assert abs(report.leakage[name].value) < 0.03
        assert report.leakage_absolute[name].value == pytest.approx(chance_leakage(25), abs=0.015)
        assert report.bt[name].value == pytest.approx(0.5, abs=0.03)
        assert report.rmse[name].value == pytest.approx(untouched_floor(5), abs=0.01)
        assert report.mp[name].low <= 0 <= report.mp[name].high


@given(st.integers(2, 4), st.integers(1, 3), st.integers(0, 2**31))
@settings(max_examples=25, deadline=None)
def test_symmetries(levels: int, prompts: int, seed: int) -> None:
    unit = np.random.default_rng(seed).random((2, prompts, levels**2, 2))
    one, mirrored = grid(unit, levels), grid(1 - unit, levels)
    swapped = grid(
        unit.reshape(2, prompts, levels, levels, 2)
        .transpose(0, 1, 3, 2, 4)[..., ::-1]
        .reshape(unit.shape),
        levels,
    )
    for a, name in enumerate(ATTRIBUTES):
        other = ATTRIBUTES[1 - a]
        assert mp_per_prompt(mirrored, name) == pytest.approx(-mp_per_prompt(one, name))
        assert mp_per_prompt(swapped, other) == pytest.approx(mp_per_prompt(one, name))
        assert leakage_per_prompt(swapped, other) == pytest.approx(leakage_per_prompt(one, name))
        for neighbours in (True, False):
            bt = bt_per_prompt(one, name, neighbours=neighbours)
            assert bt + bt_per_prompt(mirrored, name, neighbours=neighbours) == pytest.approx(1)
            assert ((bt >= 0) & (bt <= 1)).all()


def test_repeats_average_statistics_never_scores() -> None:
    unit = noisy_policy(repeats=8, prompts=60, levels=5, gain=(0.6, 0.6), noise=0.3, seed=1)
    report = measure_grid(grid(unit, 5), bootstrap=Bootstrap(10))
    singles = [measure_grid(grid(unit[s : s + 1], 5), bootstrap=Bootstrap(10)) for s in range(8)]
    averaged = measure_grid(grid(unit.mean(axis=0, keepdims=True), 5), bootstrap=Bootstrap(10))
    for figure in ("mp", "bt", "rmse", "leakage", "range"):
        alone = np.mean([getattr(single, figure)["safety"].value for single in singles])
        assert getattr(report, figure)["safety"].value == pytest.approx(alone)
    assert report.coverage.value == pytest.approx(np.mean([s.coverage.value for s in singles]))
    assert averaged.mp["safety"].value > report.mp["safety"].value + 0.15


def test_three_attributes() -> None:
    unit = np.broadcast_to(targets(2, 3), (1, 2, 8, 3))
    report = measure_grid(
        Grid(unit, ("a", "b"), ("helpfulness", "safety", "tone"), 2), bootstrap=Bootstrap(10)
    )
    assert report.mp["tone"].value == pytest.approx(1)
    assert report.leakage["tone"].value == pytest.approx(0)
    assert report.joint.shape == (8, 8)


def test_measure_reads_the_judge_it_is_asked_for() -> None:
    rows = deliveries_from(perfect().unit, levels=5)
    deaf = dict.fromkeys(ATTRIBUTES, 0.5)
    rows = [
        Delivery(**{**row.__dict__, "unit": {**row.unit, "generalization": deaf}}) for row in rows
    ]
    args = {"dials": Dials(ATTRIBUTES, 5), "bootstrap": Bootstrap(10)}
    assert measure(rows, judge="optimization", **args).overall.value == pytest.approx(1)
    assert measure(rows, judge="generalization", **args).overall.value == 0


def test_auto_is_measured_beside_the_grid() -> None:
    rows = deliveries_from(perfect().unit, levels=5)
    up = np.linspace(0.1, 0.9, 5)
    for p in range(4):
        for level in range(5):
            score = {"helpfulness": up[level], "safety": up[-1 - level]}
            for setting in (DialSetting((level, None)), DialSetting((None, level))):
                rows.append(
                    Delivery(f"p{p:03d}", setting, 0, "t", "stop", 1, {"generalization": score})
                )
    report = measure(
        rows, judge="generalization", dials=Dials(ATTRIBUTES, 5), bootstrap=Bootstrap(10)
    )
    assert report.auto_mp["helpfulness"].value == pytest.approx(1)
    assert report.auto_mp["safety"].value == pytest.approx(-1)
    assert report.mp["safety"].value == pytest.approx(1)


@pytest.mark.parametrize("broken", ["missing", "twice", "none"])
def test_a_grid_with_holes_is_refused(broken: str) -> None:
    rows = deliveries_from(perfect().unit, levels=5)
    rows = {"missing": rows[1:], "twice": [*rows, rows[3]], "none": []}[broken]
    with pytest.raises(DataError, match="not a full grid"):
        measure(rows, judge="generalization", dials=Dials(ATTRIBUTES, 5), bootstrap=Bootstrap(10))


def test_bootstrap_matches_the_textbook_and_repeats_exactly() -> None:
    values = np.random.default_rng(2).normal(3.0, 2.0, 400)
    one, two = (Bootstrap(2000, seed=5).of(values) for _ in range(2))
    assert one == two
    assert one.value == pytest.approx(values.mean())
    assert one.high - one.low == pytest.approx(2 * 1.96 * values.std() / 20, rel=0.1)
    assert one.n == 400


def test_bootstrap_without_draws_or_with_one_prompt() -> None:
    assert Bootstrap(0).of(np.array([1.0, 2.0, 3.0])).low == pytest.approx(2)
    lone = Bootstrap(10).of(np.array([0.4]))
    assert (lone.low, lone.value, lone.high) == pytest.approx((0.4, 0.4, 0.4))


def test_paired_difference_is_narrower_than_two_intervals() -> None:
    rng = np.random.default_rng(3)
    hard = rng.normal(0, 1, 200)  # what the prompts share
    first, second = hard + 0.2 + rng.normal(0, 0.1, 200), hard + rng.normal(0, 0.1, 200)
    gap = Bootstrap(1000).difference(first, second)
    assert gap.low > 0.15 and gap.high < 0.25
    with pytest.raises(ValueError, match="not the same prompts"):
        Bootstrap(10).difference(first, second[1:])


def test_compare_mp() -> None:
    strong = deliveries_from(
        noisy_policy(repeats=1, prompts=40, levels=5, gain=(1, 1), noise=0.1, seed=0), levels=5
    )
    weak = deliveries_from(
        noisy_policy(repeats=1, prompts=40, levels=5, gain=(0.2, 1), noise=0.1, seed=1), levels=5
    )
    args = {"judge": "generalization", "dials": Dials(ATTRIBUTES, 5)}
    gap = compare_mp(strong, weak, **args)
    assert gap["helpfulness"].low > 0.2
    assert gap["safety"].low < 0 < gap["safety"].high
    with pytest.raises(ValueError, match="same prompts"):
        compare_mp(strong, [row for row in weak if row.prompt_id != "p000"], **args)


def test_t_interval_over_seeds() -> None:
    # Mean 2, s = 1, t(.975, 2) = 4.3027: 2 ± 4.3027 / sqrt 3.
    estimate = over_seeds([1.0, 2.0, 3.0])
    assert estimate.high == pytest.approx(2 + 4.3027 / np.sqrt(3), abs=1e-3)
    assert estimate.n == 3
    assert np.isnan(over_seeds([1.0]).low)


def test_ceiling_picks_the_nearest_jointly() -> None:
    # Cell (1, 1) of L = 2 asks for (.75, .75): (.9, .7) is nearer than (.75, .3).
    candidates = [np.array([[0.75, 0.3], [0.9, 0.7], [0.1, 0.1]]), targets(2)]
    chosen = ceiling_grid(candidates, dials=Dials(ATTRIBUTES, 2)).unit
    assert chosen[0, 0, -1].tolist() == [0.9, 0.7]
    assert np.array_equal(chosen[0, 1], targets(2))
    # Equally far: the first.
    tie = ceiling_grid([np.array([[0.5, 0.5], [0.5, 0.5]])], dials=Dials(ATTRIBUTES, 2))
    assert tie.unit.shape == (1, 1, 4, 2)


def test_a_thousand_draws_over_many_prompts_stay_small() -> None:
    unit = np.random.default_rng(0).random((1, 500, 25, 2))
    report = measure_grid(grid(unit, 5), bootstrap=Bootstrap(1000))
    assert report.coverage.n == 500
    assert len(cells(2, 5)) == report.cell_means.shape[0]
