"""Deliveries to a :class:`ControlReport`: every metric of docs/evaluate.md, with its interval."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from equipoise.dials.dials import Dials, cells
from equipoise.evaluate.metrics import (
    Grid,
    bt_per_prompt,
    collect,
    leakage_per_prompt,
    mp_per_prompt,
    never_moves,
    pearson,
    requested,
    to_grid,
)
from equipoise.stats import BOOTSTRAP, Array, Bootstrap, Estimate
from equipoise.types import Delivery, DialSetting, JudgeKind


@dataclass(frozen=True)
class ControlReport:
    """What the dials of one method do, as one kind of judge sees it.

    Mappings go from attribute to its estimate; ``n`` of an estimate is the number of prompts.
    """

    n_prompts: int
    n_repeats: int
    levels: int
    attributes: tuple[str, ...]
    mp: Mapping[str, Estimate]
    """Mean over prompts of Pearson(requested level, unit score)."""
    never_moves: Mapping[str, Estimate]
    """Share of prompts whose score never moves; they count 0 in MP."""
    overall: Estimate
    """Mean of the attributes' MPs."""
    bt: Mapping[str, Estimate]
    """P(higher score at the top level than at the bottom one), other attribute equal, ties ½."""
    bt_neighbours: Mapping[str, Estimate]
    """The same for neighbouring levels."""
    rmse: Mapping[str, Estimate]
    bias: Mapping[str, list[Estimate]]
    """Per requested level, mean of unit score − target."""
    spread: Mapping[str, list[Estimate]]
    """Per requested level, standard deviation of unit score − target."""
    response: Mapping[str, list[Estimate]]
    """Per requested level, mean unit score: the response curve."""
    leakage: Mapping[str, Estimate]
    """Signed: Pearson(level of the *other* attribute, this attribute's unit score). With more than
    two attributes the mean over the others."""
    leakage_absolute: Mapping[str, Estimate]
    """Mean of the absolute values; read it beside :func:`chance_leakage`."""
    range: Mapping[str, Estimate]
    """E[u | top level] − E[u | bottom level]."""
    coverage: Estimate
    """Share of cells whose mean delivery lies within 1/(2L) of the target in every attribute."""
    cell_means: Array
    """Shape (C, A)."""
    posterior: Mapping[str, Array]
    """Shape (L requested, L delivered); each row sums to 1."""
    joint: Array
    """Shape (C requested, C delivered): counts of deliveries."""
    auto_mp: Mapping[str, Estimate]
    """MP of one dial with the others on auto; empty if that was not swept."""


def measure(
    deliveries: Sequence[Delivery],
    *,
    judge: JudgeKind,
    dials: Dials,
    bootstrap: Bootstrap = BOOTSTRAP,
) -> ControlReport:
    """Measure one method's deliveries as one kind of judge sees them.

    Args:
        deliveries: One completion per prompt, cell and repeat; settings with exactly one attribute
            off auto are used for ``auto_mp`` if they are there.
        judge: Whose unit scores to read.
        dials: Attributes and levels.
        bootstrap: Resamples prompts.

    Raises:
        DataError: The grid has holes.
    """
    grid = to_grid(deliveries, judge=judge, dials=dials)
    auto_mp = {}
    for a, attribute in enumerate(dials.attributes):
        columns = {
            DialSetting(
                tuple(level if b == a else None for b in range(len(dials.attributes)))
            ): level
            for level in range(dials.levels)
        }
        if len(dials.attributes) > 1 and any(
            delivery.setting in columns for delivery in deliveries
        ):
            unit, _ = collect(deliveries, columns, judge, dials.attributes)
            rho = pearson(np.arange(dials.levels), unit[..., a]).mean(axis=0)  # (P,)
            auto_mp[attribute] = bootstrap.of(rho)
    return measure_grid(grid, bootstrap=bootstrap, auto_mp=auto_mp)


def measure_grid(
    grid: Grid, *, bootstrap: Bootstrap = BOOTSTRAP, auto_mp: Mapping[str, Estimate] | None = None
) -> ControlReport:
    """Measure a full grid of unit scores; see :func:`measure`."""
    n_repeats, n_prompts = grid.unit.shape[:2]
    asked = requested(grid)  # (C, A)
    error = grid.unit - (asked + 0.5) / grid.levels  # (S, P, C, A)
    delivered = np.minimum((grid.unit * grid.levels + 1e-9).astype(int), grid.levels - 1)
    mp = {name: mp_per_prompt(grid, name) for name in grid.attributes}
    by = dict(enumerate(grid.attributes))
    at = [[asked[:, a] == level for level in range(grid.levels)] for a in by]  # [A][L] (C,)

    def of_level(values: Array, a: int) -> list[Array]:
        return [values[:, :, mask, a].mean(axis=(0, 2)) for mask in at[a]]  # [L] (P,)

    return ControlReport(
        n_prompts=n_prompts,
        n_repeats=n_repeats,
        levels=grid.levels,
        attributes=grid.attributes,
        mp={name: bootstrap.of(rho) for name, rho in mp.items()},
        never_moves={
            name: bootstrap.of(never_moves(grid.unit[..., a]).mean(axis=0))
            for a, name in by.items()
        },
        overall=bootstrap.of(np.mean(list(mp.values()), axis=0)),
        bt={n: bootstrap.of(bt_per_prompt(grid, n, neighbours=False)) for n in mp},
        bt_neighbours={n: bootstrap.of(bt_per_prompt(grid, n, neighbours=True)) for n in mp},
        rmse={
            # Per repeat, then averaged: the statistic is averaged, never what goes into it.
            name: bootstrap.of(
                (error[..., a] ** 2).mean(axis=2).T, lambda m: np.sqrt(m).mean(axis=1)
            )
            for a, name in by.items()
        },
        bias={n: [bootstrap.of(x) for x in of_level(error, a)] for a, n in by.items()},
        spread={
            name: [
                bootstrap.of(np.stack([x, xx], axis=1), _deviation)
                for x, xx in zip(of_level(error, a), of_level(error**2, a), strict=True)
            ]
            for a, name in by.items()
        },
        response={n: [bootstrap.of(x) for x in of_level(grid.unit, a)] for a, n in by.items()},
        leakage={n: bootstrap.of(leakage_per_prompt(grid, n)) for n in mp if len(by) > 1},
        leakage_absolute={
            n: bootstrap.of(leakage_per_prompt(grid, n, absolute=True)) for n in mp if len(by) > 1
        },
        range={
            name: bootstrap.of(of_level(grid.unit, a)[-1] - of_level(grid.unit, a)[0])
            for a, name in by.items()
        },
        coverage=bootstrap.of(error.transpose(1, 0, 2, 3), _covered(grid.levels)),
        cell_means=grid.unit.mean(axis=(0, 1)),
        posterior={
            name: np.array(
                [
                    np.bincount(delivered[:, :, mask, a].ravel(), minlength=grid.levels)
                    for mask in at[a]
                ]
            )
            / (n_repeats * n_prompts * at[a][0].sum())
            for a, name in by.items()
        },
        joint=_joint(delivered, grid.levels),
        auto_mp=dict(auto_mp or {}),
    )


def _deviation(moments: Array) -> Array:
    return np.sqrt(np.maximum(moments[:, 1] - moments[:, 0] ** 2, 0.0))


def _covered(levels: int) -> Callable[[Array], Array]:
    reach = 1 / (2 * levels) + 1e-9

    def share(mean_error: Array) -> Array:  # (D, S, C, A) -> (D,)
        inside: Array = (np.abs(mean_error) <= reach).all(axis=-1).mean(axis=(1, 2))
        return inside

    return share


def _joint(delivered: NDArray[np.int_], levels: int) -> Array:
    n_attributes = delivered.shape[-1]
    place = np.zeros((levels,) * n_attributes, int)
    for c, cell in enumerate(cells(n_attributes, levels)):
        place[cell.levels] = c
    cell_of = place[tuple(np.moveaxis(delivered, -1, 0))]  # (S, P, C)
    return np.array(
        [np.bincount(cell_of[:, :, c].ravel(), minlength=place.size) for c in range(place.size)],
        float,
    )


def compare_mp(
    first: Sequence[Delivery],
    second: Sequence[Delivery],
    *,
    judge: JudgeKind,
    dials: Dials,
    bootstrap: Bootstrap = BOOTSTRAP,
) -> dict[str, Estimate]:
    """Return per attribute MP(first) − MP(second), paired over prompts.

    Raises:
        ValueError: The two methods were swept over different prompts.
    """
    grids = [to_grid(deliveries, judge=judge, dials=dials) for deliveries in (first, second)]
    if grids[0].prompt_ids != grids[1].prompt_ids:
        raise ValueError("a paired difference needs the same prompts in both sweeps")
    return {
        name: bootstrap.difference(*(mp_per_prompt(grid, name) for grid in grids))
        for name in dials.attributes
    }
