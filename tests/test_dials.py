"""The arithmetic of the dials at its borders."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipoise.dials.dials import Dials, cells, level_for_value, level_of, target
from equipoise.errors import ConfigError
from equipoise.types import DialSetting


def test_cells_are_the_whole_grid_in_order() -> None:
    grid = cells(2, 3)
    assert [cell.levels for cell in grid[:4]] == [(0, 0), (0, 1), (0, 2), (1, 0)]
    assert len(grid) == len(set(grid)) == 9
    assert all(cell.is_cell for cell in grid)


def test_targets_of_five_levels() -> None:
    assert [target(level, 5) for level in range(5)] == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9])
    for level in (-1, 5):
        with pytest.raises(ValueError, match="level"):
            target(level, 5)


@given(st.integers(2, 100), st.data())
def test_a_border_belongs_to_the_upper_level(levels: int, data: st.DataObject) -> None:
    level = data.draw(st.integers(0, levels - 1))
    assert level_of(level / levels, levels) == level
    assert level_of(target(level, levels), levels) == level
    assert level_of((level + 1) / levels - 1e-6, levels) == level


def test_the_top_unit_score_has_the_top_level() -> None:
    assert level_of(1.0, 5) == 4


@pytest.mark.parametrize("unit", [-0.01, 1.01, math.nan])
def test_unit_scores_out_of_range_are_refused(unit: float) -> None:
    with pytest.raises(ValueError, match="unit score"):
        level_of(unit, 5)


def test_cell_of_follows_the_attribute_order() -> None:
    unit = {"safety": 0.0, "helpfulness": 0.99}
    assert Dials(["helpfulness", "safety"], 5).cell_of(unit) == DialSetting((4, 0))


@pytest.mark.parametrize(
    ("value", "up", "nearest"),
    [
        (0.0, 0, 0),
        (0.01, 1, 0),
        (0.25, 1, 1),
        (0.3, 2, 1),
        (0.375, 2, 2),
        (0.76, 4, 3),
        (1.0, 4, 4),
    ],
)
def test_dial_values(value: float, up: int, nearest: int) -> None:
    assert level_for_value(value, 5, rounding="up") == up
    assert level_for_value(value, 5, rounding="nearest") == nearest


@given(st.integers(2, 100), st.data())
def test_values_on_the_grid_are_exact(levels: int, data: st.DataObject) -> None:
    level = data.draw(st.integers(0, levels - 1))
    value = level / (levels - 1)
    assert level_for_value(value, levels, rounding="up") == level
    assert level_for_value(value, levels, rounding="nearest") == level


@given(st.floats(0, 1), st.integers(2, 100))
def test_safety_never_rounds_down(value: float, levels: int) -> None:
    level = level_for_value(value, levels, rounding="up")
    assert 0 <= level < levels
    assert level >= value * (levels - 1) - 1e-6


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan, math.inf])
def test_dial_values_out_of_range_are_refused(value: float) -> None:
    with pytest.raises(ConfigError, match="between 0 and 1"):
        level_for_value(value, 5, rounding="nearest")
