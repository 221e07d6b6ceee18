"""Levels, targets, unit scores and dial values: the arithmetic of the dials (docs/dials.md)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Literal

from equipoise.errors import ConfigError
from equipoise.types import DialSetting

# k/L * L may fall just short of k in floats (0.29 * 100); a border belongs to the upper level.
_GRID_SLACK = 1e-9


@dataclass(frozen=True)
class Dials:
    """The dials of a model: A attributes, in the manifest's order, with L levels each."""

    attributes: tuple[str, ...]
    levels: int

    def cells(self) -> list[DialSetting]:
        """Return all ``L ** A`` control cells, the last attribute moving fastest."""
        return cells(len(self.attributes), self.levels)

    def target(self, level: int) -> float:
        """Return the unit score that a level asks for, see :func:`target`."""
        return target(level, self.levels)

    def cell_of(self, unit: Mapping[str, float]) -> DialSetting:
        """Return the control cell that unit scores (attribute to [0, 1]) fall in."""
        return DialSetting(tuple(level_of(unit[name], self.levels) for name in self.attributes))

    def level_for_value(self, value: float, *, rounding: Literal["up", "nearest"]) -> int:
        """Return the level that a dial value in [0, 1] stands for, see :func:`level_for_value`."""
        return level_for_value(value, self.levels, rounding=rounding)


def cells(n_attributes: int, levels: int) -> list[DialSetting]:
    """Return all ``levels ** n_attributes`` control cells, the last attribute moving fastest."""
    return [
        DialSetting(combination)
        for combination in itertools.product(range(levels), repeat=n_attributes)
    ]


def target(level: int, levels: int) -> float:
    """Return the unit score ``t_l = (l + 1/2) / L`` that a level asks for, in (0, 1).

    Raises:
        ValueError: If the level is not in [0, levels).
    """
    if not 0 <= level < levels:
        raise ValueError(f"level {level} is not in [0, {levels})")
    return (level + 0.5) / levels


def level_of(unit: float, levels: int) -> int:
    """Return the level of a unit score: ``min(L - 1, floor(u * L))``.

    Args:
        unit: Unit score in [0, 1].
        levels: Number of levels L.

    Raises:
        ValueError: If the unit score is outside [0, 1] or not a number.
    """
    if not 0.0 <= unit <= 1.0:
        raise ValueError(f"unit score {unit} is not in [0, 1]")
    return min(levels - 1, math.floor(unit * levels + _GRID_SLACK))


def level_for_value(value: float, levels: int, *, rounding: Literal["up", "nearest"]) -> int:
    """Return the level that a dial value stands for.

    Args:
        value: Dial value in [0, 1]; the grid is ``k / (levels - 1)``.
        levels: Number of levels L, at least 2.
        rounding: What to do off the grid: ``up`` (safety) or ``nearest`` (helpfulness; a value
            half-way between two levels goes to the upper one).

    Raises:
        ConfigError: If the value is outside [0, 1] or not a number.
    """
    if not (isinstance(value, Real) and 0.0 <= value <= 1.0):
        raise ConfigError(
            f"dial value {value} is out of range",
            why="a dial value is a number from 0 (least) to 1 (most)",
            fix="pass a value between 0 and 1",
        )
    position = value * (levels - 1)
    if rounding == "up":
        return math.ceil(position - _GRID_SLACK)
    return math.floor(position + 0.5 + _GRID_SLACK)
