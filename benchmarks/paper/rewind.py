"""The rewind in numbers: does an aligned model regain what its base model could say?

Alignment narrows what a model answers with; dials on the aligned model should bring the lost cells
back without a way to the base model. Four pools of completions of the same prompts, equally large
and on one scale, tell: the base model's, the aligned model's, and those of both after tuning, asked
for every cell of the grid. The scale is the base model's own pool, so that its median is .5.

Shapes: P prompts, K completions per prompt, A attributes, L levels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from equipoise.errors import DataError
from equipoise.stats import Array, Bootstrap, Estimate

LOW, HIGH = 10.0, 90.0
"""Percentiles between which a prompt's range lies: an odd completion makes no range."""
PRESENT = 0.25
"""A cell is present in a pool that puts this share of an even pool's mass into it."""


@dataclass(frozen=True)
class Pool:
    """Completions of the same prompts by one model."""

    unit: Array
    """(P, K, A) unit scores in [0, 1], on the scale of the base model's pool."""
    refused: NDArray[np.bool_]
    """(P, K)."""


@dataclass(frozen=True)
class PoolFacts:
    """What one pool holds; intervals are bootstraps over prompts."""

    range: Mapping[str, Estimate]
    """Mean over prompts of the 10th to 90th percentile span of a prompt's own completions."""
    coverage: Estimate
    """Mean over prompts of distinct cells among K completions, over min(K, L^A)."""
    present: float
    """Share of the L^A cells that hold at least a quarter of an even share of the whole pool."""
    refusals: Estimate
    cells: list[float]
    """Share of the pool per cell, the last attribute moving fastest."""


@dataclass(frozen=True)
class Rewind:
    """All pools side by side, and what the rewound model regained of what alignment took."""

    pools: Mapping[str, PoolFacts]
    lost: Estimate
    """Coverage of the base model minus that of the aligned model, over the same prompts."""
    regained: Estimate
    """(rewound − aligned) / (base − aligned) coverage; 1 = all of it. NaN ends where alignment
    took nothing, value included."""
    beyond_base: Estimate
    """Coverage of the rewound model minus that of the base model."""
    beyond_tuned_base: Estimate
    """Coverage of the rewound model minus that of the base model tuned in the same way."""


def rewind(
    pools: Mapping[str, Pool],
    *,
    attributes: Sequence[str],
    levels: int,
    draws: int = 1000,
    seed: int = 0,
) -> Rewind:
    """Compare the pools ``base``, ``aligned``, ``rewound`` and ``tuned_base``.

    Args:
        pools: All four, of the same prompts in the same order and with equally many completions.
        attributes: A names.
        levels: L.
        draws: Bootstrap draws.
        seed: Seed of the draws.

    Raises:
        DataError: A pool is missing, or they are not of one shape.
    """
    wanted = ("base", "aligned", "rewound", "tuned_base")
    shapes = {name: pools[name].unit.shape for name in wanted if name in pools}
    if len(shapes) < len(wanted) or len({*shapes.values()}) != 1:
        raise DataError(
            f"the pools cannot be compared: {shapes}",
            why=f"needed are {', '.join(wanted)}, each with as many completions of each prompt",
            fix="sample all of them on the same prompts with the same K",
        )
    covered = {name: coverage_per_prompt(pools[name].unit, levels) for name in wanted}
    bootstrap = Bootstrap(draws, seed)
    stacked = np.stack([covered[name] for name in wanted], axis=1)  # (P, 4)

    def difference(first: str, second: str) -> Estimate:
        return bootstrap.of(covered[first] - covered[second])

    lost = difference("base", "aligned")
    return Rewind(
        pools={
            name: pool_facts(
                pools[name], attributes=attributes, levels=levels, draws=draws, seed=seed
            )
            for name in wanted
        },
        lost=lost,
        regained=_regained(stacked, bootstrap.weights(len(stacked)))
        if lost.value > 0
        else _nothing(len(stacked)),
        beyond_base=difference("rewound", "base"),
        beyond_tuned_base=difference("rewound", "tuned_base"),
    )


def pool_facts(
    pool: Pool, *, attributes: Sequence[str], levels: int, draws: int = 1000, seed: int = 0
) -> PoolFacts:
    """Measure one pool; see :class:`PoolFacts`."""
    bootstrap = Bootstrap(draws, seed)
    low, high = np.percentile(pool.unit, [LOW, HIGH], axis=1)  # (P, A) each
    counts = np.bincount(_cells(pool.unit, levels).ravel(), minlength=levels ** pool.unit.shape[-1])
    shares = counts / counts.sum()
    return PoolFacts(
        range={name: bootstrap.of((high - low)[:, a]) for a, name in enumerate(attributes)},
        coverage=bootstrap.of(coverage_per_prompt(pool.unit, levels)),
        present=float((shares >= PRESENT / len(shares)).mean()),
        refusals=bootstrap.of(pool.refused.mean(axis=1, dtype=float)),
        cells=[float(share) for share in shares],
    )


def coverage_per_prompt(unit: Array, levels: int) -> Array:
    """Return distinct cells among each prompt's completions, over as many as there could be: (P,).

    Args:
        unit: (P, K, A).
        levels: L.
    """
    possible = min(unit.shape[1], levels ** unit.shape[2])
    return np.array([len(np.unique(row)) / possible for row in _cells(unit, levels)])


def chance_coverage(n_completions: int, n_cells: int) -> float:
    """Return the coverage of a pool that falls evenly over all cells: .64 for 25 into 25."""
    return n_cells * (1 - (1 - 1 / n_cells) ** n_completions) / min(n_completions, n_cells)


def _cells(unit: Array, levels: int) -> NDArray[np.int_]:
    """Return the cell index (P, K) of unit scores (P, K, A)."""
    # As in dials.dials: a border belongs to the upper level, float slack included.
    level = np.minimum(np.floor(unit * levels + 1e-9).astype(int), levels - 1)
    place = levels ** np.arange(unit.shape[-1])[::-1]
    found: NDArray[np.int_] = level @ place
    return found


def _regained(stacked: Array, weights: Array) -> Estimate:
    """Ratio of means over the columns base, aligned, rewound, tuned base."""

    def ratio(means: Array) -> Array:
        gap = means[:, 0] - means[:, 1]
        # A draw in which alignment took nothing says nothing about what was regained.
        return np.where(gap > 0, (means[:, 2] - means[:, 1]) / np.where(gap > 0, gap, 1), np.nan)

    uniform = np.full((1, len(stacked)), 1.0 / len(stacked))
    values = ratio(np.concatenate([uniform @ stacked, weights @ stacked]))
    if np.isnan(values).mean() > 0.025:
        # Its interval would leave out the draws that make it undefined.
        return Estimate(float(values[0]), float("nan"), float("nan"), len(stacked))
    low, high = np.nanquantile(values[1:], [0.025, 0.975]) if len(values) > 1 else values[[0, 0]]
    return Estimate(float(values[0]), float(low), float(high), len(stacked))


def _nothing(n: int) -> Estimate:
    nan = float("nan")
    return Estimate(nan, nan, nan, n)
