"""The rewind: coverage, range and refusals by hand, and what counts as regained."""

from __future__ import annotations

import math

import numpy as np
import pytest
from benchmarks.paper.rewind import (
    Pool,
    chance_coverage,
    coverage_per_prompt,
    pool_facts,
    rewind,
)
from hypothesis import given
from hypothesis import strategies as st

from equipoise.dials.dials import cells, target
from equipoise.errors import DataError

ATTRIBUTES = ("helpfulness", "safety")


def grid_pool(*, reached: int = 25, prompts: int = 6, refused: float = 0.0) -> Pool:
    """Every prompt answered in the middle of the first ``reached`` cells, 25 times in all."""
    goals = [[target(level or 0, 5) for level in cell.levels] for cell in cells(2, 5)]
    rows = [goals[k % reached] for k in range(25)]
    unit = np.array([rows] * prompts)
    turned = np.arange(25) < round(25 * refused)
    return Pool(unit, np.array([turned] * prompts))


def test_coverage_counts_distinct_cells_of_each_prompt() -> None:
    assert coverage_per_prompt(grid_pool().unit, 5).tolist() == [1.0] * 6
    assert coverage_per_prompt(grid_pool(reached=5).unit, 5).tolist() == [0.2] * 6
    # Four completions can fill four cells at most.
    assert coverage_per_prompt(grid_pool().unit[:, :4], 5).tolist() == [1.0] * 6


def test_borders_belong_to_the_upper_level() -> None:
    unit = np.array([[[0.2, 0.0], [0.19, 0.0], [1.0, 0.0], [0.6, 0.0]]])
    assert coverage_per_prompt(unit, 5).tolist() == [1.0]
    assert coverage_per_prompt(np.array([[[0.2, 0.0], [0.39, 0.19]]]), 5).tolist() == [0.5]
    # .29 · 100 is a little less than 29 in floats.
    assert coverage_per_prompt(np.array([[[0.29], [0.295]]]), 100).tolist() == [0.5]


def test_facts_of_a_pool_by_hand() -> None:
    facts = pool_facts(grid_pool(reached=5, refused=0.4), attributes=ATTRIBUTES, levels=5)
    # The first five cells: helpfulness stays at .1, safety runs over all levels.
    assert facts.range["helpfulness"].value == 0.0
    assert facts.range["safety"].value == pytest.approx(0.8)
    assert facts.refusals.value == pytest.approx(0.4)
    assert facts.cells == [0.2] * 5 + [0.0] * 20
    assert facts.present == pytest.approx(0.2)


def test_chance_coverage_is_what_even_draws_give() -> None:
    rng = np.random.default_rng(0)
    unit = rng.random((2000, 25, 2))
    assert chance_coverage(25, 25) == pytest.approx(0.64, abs=0.01)
    assert coverage_per_prompt(unit, 5).mean() == pytest.approx(chance_coverage(25, 25), abs=0.01)
    assert chance_coverage(4, 25) == pytest.approx(
        coverage_per_prompt(unit[:, :4], 5).mean(), abs=0.01
    )


@given(reached=st.tuples(*[st.integers(1, 25)] * 4))
def test_what_is_regained_is_a_share_of_what_was_lost(reached: tuple[int, int, int, int]) -> None:
    names = ("base", "aligned", "rewound", "tuned_base")
    pools = {name: grid_pool(reached=n) for name, n in zip(names, reached, strict=True)}
    found = rewind(pools, attributes=ATTRIBUTES, levels=5, draws=20)
    base, aligned, rewound, tuned = reached
    assert found.lost.value == pytest.approx((base - aligned) / 25)
    assert found.beyond_base.value == pytest.approx((rewound - base) / 25)
    assert found.beyond_tuned_base.value == pytest.approx((rewound - tuned) / 25)
    if base > aligned:
        assert found.regained.value == pytest.approx((rewound - aligned) / (base - aligned))
        assert found.regained.low == pytest.approx(found.regained.high)
    else:
        assert math.isnan(found.regained.value)


def test_an_interval_that_would_hide_undefined_draws_is_none() -> None:
    # Alignment took something from one prompt in six only: many draws miss it.
    base, aligned = grid_pool(reached=10), grid_pool(reached=10)
    aligned.unit[0] = aligned.unit[0, :1]
    pools = {"base": base, "aligned": aligned, "rewound": grid_pool(), "tuned_base": base}
    found = rewind(pools, attributes=ATTRIBUTES, levels=5)
    assert found.regained.value > 1
    assert math.isnan(found.regained.low)


def test_intervals_are_over_prompts() -> None:
    mixed = np.concatenate([grid_pool(reached=5).unit[:3], grid_pool(reached=25).unit[:3]])
    facts = pool_facts(
        Pool(mixed, np.zeros((6, 25), bool)), attributes=ATTRIBUTES, levels=5, seed=1
    )
    assert facts.coverage.value == pytest.approx(0.6)
    assert facts.coverage.low < 0.6 < facts.coverage.high
    assert facts.coverage.n == 6


def test_pools_that_cannot_be_compared_are_refused() -> None:
    pools = {name: grid_pool() for name in ("base", "aligned", "rewound")}
    with pytest.raises(DataError, match="cannot be compared"):
        rewind(pools, attributes=ATTRIBUTES, levels=5)
    pools["tuned_base"] = grid_pool(prompts=5)
    with pytest.raises(DataError, match="cannot be compared"):
        rewind(pools, attributes=ATTRIBUTES, levels=5)
