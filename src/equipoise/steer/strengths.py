"""How hard to push for a level: a monotone map from level to strength, fitted on dev prompts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from equipoise.dials.attributes import target
from equipoise.types import DialSetting


@dataclass(frozen=True)
class Tried:
    """One strength as it came out on dev prompts, the other attributes left alone."""

    strength: float
    unit: float
    """Mean unit score of the attribute, in [0, 1]."""
    fluency: float
    """Mean log-likelihood per token of the outputs under the untouched model."""


@dataclass(frozen=True)
class Strengths:
    """Strength per attribute and level, in units of the direction's own length."""

    by_level: Mapping[str, tuple[float, ...]]
    """Attribute to L strengths, never falling with the level."""

    def of(self, setting: DialSetting) -> tuple[float, ...]:
        """Return one strength per attribute; 0 on auto."""
        return tuple(
            0.0 if level is None else levels[level]
            for level, levels in zip(setting.levels, self.by_level.values(), strict=True)
        )


def strengths_for_levels(
    tried: Sequence[Tried], levels: int, *, max_fluency_drop: float | None
) -> tuple[float, ...]:
    """Return the strength that delivers each level's target, by the monotone map of what was tried.

    The mean unit score is made to rise with the strength (isotonic regression: neighbours that fall
    are averaged) and read backwards, straight between the strengths that were tried. Where several
    give the same, the mildest counts. A target out of reach gets the last strength in reach.

    Args:
        tried: Different strengths, 0 among them, in any order.
        levels: L.
        max_fluency_drop: Leave out strengths whose fluency lies more than this below that of
            strength 0, in nats per token; and all that are further out. ``None``: leave in all.

    Returns:
        L strengths, not falling.
    """
    ordered = sorted(tried, key=lambda one: one.strength)
    kept = ordered if max_fluency_drop is None else _fluent(ordered, max_fluency_drop)
    rising = _isotonic([one.unit for one in kept])
    mildest: dict[float, float] = {}
    for unit, one in zip(rising, kept, strict=True):
        if unit not in mildest or abs(one.strength) < abs(mildest[unit]):
            mildest[unit] = one.strength
    goals = [target(level, levels) for level in range(levels)]
    found = np.interp(goals, list(mildest), list(mildest.values()))
    return tuple(float(value) for value in found)


def _fluent(ordered: Sequence[Tried], max_drop: float) -> list[Tried]:
    """Return the run of strengths around 0 that do not babble."""
    own = next(one.fluency for one in ordered if one.strength == 0)

    def run(side: Sequence[Tried]) -> list[Tried]:
        found = []
        for one in side:
            if not one.fluency >= own - max_drop:
                break
            found.append(one)
        return found

    down = run([one for one in reversed(ordered) if one.strength <= 0])
    up = run([one for one in ordered if one.strength > 0])
    return [*reversed(down), *up]


def _isotonic(values: Sequence[float]) -> list[float]:
    """Return the nearest not falling sequence (least squares): pool adjacent violators."""
    blocks: list[tuple[float, int]] = []  # mean, size
    for value in values:
        mean, size = value, 1
        while blocks and blocks[-1][0] > mean:
            before, count = blocks.pop()
            mean, size = (before * count + mean * size) / (count + size), count + size
        blocks.append((mean, size))
    return [mean for mean, size in blocks for _ in range(size)]
