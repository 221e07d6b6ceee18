"""How well dials are followed: the metrics of docs/evaluate.md, one value per prompt.

Every statistic is computed per prompt on *one* completion per cell, then averaged over prompts and
repeats. Scores are never averaged over repeats first: that hides noise a user would meet (it lifts
MP from .77 to .92 at four repeats with no change of the model).

Shapes: S repeats, P prompts, C = L^A cells, A attributes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from equipoise.dials.dials import Dials, cells
from equipoise.errors import DataError
from equipoise.stats import Array
from equipoise.types import Delivery, DialSetting, JudgeKind


class Grid(NamedTuple):
    """Delivered unit scores over all cells."""

    unit: Array
    """Shape (S, P, C, A), in [0, 1]."""
    prompt_ids: tuple[str, ...]
    """P ids, sorted."""
    attributes: tuple[str, ...]
    levels: int


def requested(grid: Grid) -> NDArray[np.int_]:
    """Return the level of every cell and attribute, shape (C, A)."""
    return np.array([cell.levels for cell in cells(len(grid.attributes), grid.levels)], int)


def to_grid(deliveries: Sequence[Delivery], *, judge: JudgeKind, dials: Dials) -> Grid:
    """Collect the deliveries for control cells into an array; settings with auto are left aside.

    Raises:
        DataError: A prompt lacks a cell or a repeat, or has one twice.
    """
    columns = {cell: c for c, cell in enumerate(dials.cells())}
    unit, prompt_ids = collect(deliveries, columns, judge, dials.attributes)
    return Grid(unit, prompt_ids, tuple(dials.attributes), dials.levels)


def collect(
    deliveries: Sequence[Delivery],
    columns: Mapping[DialSetting, int],
    judge: JudgeKind,
    attributes: Sequence[str],
) -> tuple[Array, tuple[str, ...]]:
    """Return the unit scores (S, P, C, A) of the settings in ``columns``, and the P prompt ids.

    Raises:
        DataError: A prompt lacks a setting or a repeat, or has one twice.
    """
    wanted = [delivery for delivery in deliveries if delivery.setting in columns]
    prompt_ids = tuple(sorted({delivery.prompt_id for delivery in wanted}))
    row = {prompt_id: p for p, prompt_id in enumerate(prompt_ids)}
    repeats = 1 + max((delivery.repeat for delivery in wanted), default=-1)
    unit = np.full((repeats, len(row), len(columns), len(attributes)), np.nan)  # (S, P, C, A)
    for delivery in wanted:
        place = (delivery.repeat, row[delivery.prompt_id], columns[delivery.setting])
        unit[place] = [delivery.unit[judge][attribute] for attribute in attributes]
    n_missing = int(np.isnan(unit).any(axis=-1).sum())
    if not wanted or n_missing or len(wanted) != math.prod(unit.shape[:3]):
        raise DataError(
            f"the sweep is not a full grid: {len(wanted)} deliveries, {n_missing} missing",
            why="every metric needs one completion per prompt, cell and repeat",
            fix="run the evaluate stage again; it adds what is missing",
        )
    return unit, prompt_ids


def pearson(level: NDArray[np.int_], unit: Array) -> Array:
    """Return Pearson's correlation along the last axis; 0 where the score never moves.

    Args:
        level: Shape (C,).
        unit: Shape (…, C).
    """
    x = level - level.mean()  # (C,)
    y = unit - unit.mean(axis=-1, keepdims=True)  # (…, C)
    norm = np.sqrt((x**2).sum() * (y**2).sum(axis=-1))
    moves = ~never_moves(unit)
    return np.where(moves, (y @ x) / np.where(moves, norm, 1.0), 0.0)


def never_moves(unit: Array) -> NDArray[np.bool_]:
    """Return whether the score is the same over the whole last axis."""
    # By range, not by variance: the variance of equal floats need not be exactly 0.
    still: NDArray[np.bool_] = np.ptp(unit, axis=-1) <= 1e-12
    return still


def mp_per_prompt(grid: Grid, attribute: str) -> Array:
    """Return each prompt's Pearson(requested level, unit score), averaged over repeats: (P,)."""
    a = grid.attributes.index(attribute)
    rho: Array = pearson(requested(grid)[:, a], grid.unit[..., a]).mean(axis=0)
    return rho


def bt_per_prompt(grid: Grid, attribute: str, *, neighbours: bool) -> Array:
    """Return each prompt's P(u at the higher request > u at the lower one): (P,).

    Pairs are single completions of one prompt and repeat that differ in this attribute only.

    Args:
        grid: Full grid.
        attribute: The dial that is turned.
        neighbours: Compare neighbouring levels instead of the extremes.
    """
    a = grid.attributes.index(attribute)
    steps = list(pairwise(range(grid.levels))) if neighbours else [(0, grid.levels - 1)]
    place = {cell.levels: c for c, cell in enumerate(cells(len(grid.attributes), grid.levels))}
    low, high = zip(
        *(
            (place[levels], place[(*levels[:a], top, *levels[a + 1 :])])
            for bottom, top in steps
            for levels in place
            if levels[a] == bottom
        ),
        strict=True,
    )
    gap = grid.unit[:, :, list(high), a] - grid.unit[:, :, list(low), a]  # (S, P, pairs)
    wins: Array = ((gap > 0) + 0.5 * (gap == 0)).mean(axis=(0, 2))
    return wins


def leakage_per_prompt(grid: Grid, attribute: str, *, absolute: bool = False) -> Array:
    """Return each prompt's Pearson(level of the other attributes, this unit score): (P,)."""
    a = grid.attributes.index(attribute)
    asked = requested(grid)
    others = [b for b in range(len(grid.attributes)) if b != a]
    rho = np.stack([pearson(asked[:, b], grid.unit[..., a]) for b in others])  # (A−1, S, P)
    leaked: Array = (np.abs(rho) if absolute else rho).mean(axis=(0, 1))
    return leaked


def chance_leakage(n_cells: int) -> float:
    """Return E|ρ| of a model deaf to both dials: √(2/(π(J−1))), .16 at 25 cells (peers, §3)."""
    return math.sqrt(2 / (math.pi * (n_cells - 1)))


def median_floor(levels: int) -> float:
    """Return the RMSE of a model that always answers at the median: √((L²−1)/12)/L, .283 at 5."""
    return math.sqrt((levels**2 - 1) / 12) / levels


def untouched_floor(levels: int) -> float:
    """Return the RMSE of the untouched model, uniform over its own pool: .404 at L = 5."""
    return math.sqrt(median_floor(levels) ** 2 + 1 / 12)


def ceiling_grid(candidates: Sequence[Array], *, dials: Dials) -> Grid:
    """Return the grid of a policy that picks, per prompt and cell, the nearest candidate.

    Args:
        candidates: Per prompt the unit scores (K, A) of everything it could answer; K may differ.
        dials: Attributes and levels.

    Returns:
        One repeat. Nearest is Euclidean on unit scores, in all attributes jointly; ties go to the
        lower index.
    """
    goals = np.array([cell.levels for cell in dials.cells()]) + 0.5
    goals /= dials.levels  # (C, A)
    unit = np.empty((1, len(candidates), len(goals), len(dials.attributes)))
    for p, scores in enumerate(candidates):
        distance = ((goals[:, None, :] - scores[None, :, :]) ** 2).sum(axis=-1)  # (C, K)
        unit[0, p] = scores[distance.round(12).argmin(axis=1)]
    ids = tuple(str(p) for p in range(len(candidates)))
    return Grid(unit, ids, tuple(dials.attributes), dials.levels)
