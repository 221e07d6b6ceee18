"""Which setting was asked for, and which were not: the draws of one presentation."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from equipoise.config import TuneConfig
from equipoise.dials.dials import cells
from equipoise.types import DialSetting


def drop_to_auto(setting: DialSetting, rate: float, rng: np.random.Generator) -> DialSetting:
    """Set each attribute to auto with probability ``rate``, on its own."""
    draws = rng.random(len(setting.levels))
    return DialSetting(
        tuple(
            None if draw < rate else level
            for draw, level in zip(draws, setting.levels, strict=True)
        )
    )


def counterfactuals(
    asked: DialSetting,
    occupied: Sequence[DialSetting],
    config: TuneConfig,
    levels: int,
    rng: np.random.Generator,
) -> list[DialSetting]:
    """Draw a setting ζ' ≠ ζ; auto attributes stay auto.

    Args:
        asked: ζ, possibly with attributes on auto.
        occupied: Cells of the other completions of the same prompt (for ``observed``).
        config: Which settings are drawn from.
        levels: L.
        rng: The presentation's own stream.

    Returns:
        One setting; none if every attribute is on auto, or if nothing was observed.
    """

    def masked(cell: DialSetting) -> DialSetting:
        return DialSetting(
            tuple(None if a is None else b for a, b in zip(asked.levels, cell.levels, strict=True))
        )

    source = occupied if config.counterfactual == "observed" else cells(len(asked.levels), levels)
    others = sorted({masked(cell) for cell in source} - {asked}, key=_order)
    if config.counterfactual == "one_attribute":
        others = [other for other in others if _n_different(asked, other) == 1]
    return [others[rng.permutation(len(others))[0]]] if others else []


def _order(setting: DialSetting) -> tuple[int, ...]:
    return tuple(-1 if level is None else level for level in setting.levels)


def _n_different(one: DialSetting, other: DialSetting) -> int:
    return sum(a != b for a, b in zip(one.levels, other.levels, strict=True))
