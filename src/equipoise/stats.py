"""Intervals: bootstrap over prompts within a run, t over seeds between runs (docs/evaluate.md)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval and the count of units it was computed from."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Bootstrap:
    """Resampling of prompts with replacement.

    The same numbers give the same weights, so two methods measured on the same prompts are
    resampled alike and their difference is paired.
    """

    draws: int = 1000
    """0: no interval, both ends are the value itself."""
    seed: int = 0

    def weights(self, n_prompts: int) -> Array:
        """Return bootstrap weights (draws, P); each row sums to 1."""
        return _weights(n_prompts, self.draws, self.seed)

    def of(self, per_prompt: Array, statistic: Callable[[Array], Array] | None = None) -> Estimate:
        """Return a statistic of prompt means with its 95 % percentile interval.

        Args:
            per_prompt: Shape (P, …): one row per prompt.
            statistic: Maps means (D, …) to values (D,); the mean itself by default, and then
                ``per_prompt`` is (P,).
        """
        statistic = statistic or (lambda mean: mean)
        flat = per_prompt.reshape(len(per_prompt), -1)  # (P, F)
        uniform = np.full((1, len(flat)), 1.0 / len(flat))
        means = np.concatenate([uniform @ flat, self.weights(len(flat)) @ flat])  # (1 + draws, F)
        values = statistic(means.reshape(-1, *per_prompt.shape[1:]))  # (1 + draws,)
        return _estimate(values[0], values[1:] if len(values) > 1 else values, len(flat))

    def difference(self, first: Array, second: Array) -> Estimate:
        """Return mean(first − second) over the same prompts (P,), in the same order."""
        if first.shape != second.shape:
            raise ValueError(f"not the same prompts: {first.shape} and {second.shape}")
        return self.of(first - second)


BOOTSTRAP = Bootstrap()


def resampled(
    statistic: Callable[[Rows], float],
    groups: Sequence[Rows] | Rows,
    rng: np.random.Generator,
    *,
    draws: int = 1000,
) -> Estimate:
    """Return a statistic of rows with its 95 % interval; whole groups are drawn, with replacement.

    Args:
        statistic: Maps the indices of the chosen rows to a number; draws that give none are left
            out.
        groups: Indices of the rows of each group, e.g. of a prompt.
        rng: Source of the draws.
        draws: How many.
    """
    value = statistic(np.sort(np.concatenate(groups)))
    found = [
        statistic(np.concatenate([groups[i] for i in rng.integers(0, len(groups), len(groups))]))
        for _ in range(draws)
    ]
    finite = [one for one in found if np.isfinite(one)] or [value]
    return _estimate(value, finite, sum(map(len, groups)))


@lru_cache(maxsize=4)
def _weights(n_prompts: int, draws: int, seed: int) -> Array:
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(n_prompts, np.full(n_prompts, 1.0 / n_prompts), size=draws)
    return counts / n_prompts


def _estimate(value: float, draws: Array | Sequence[float], n: int) -> Estimate:
    low, high = np.quantile(draws, [0.025, 0.975])
    return Estimate(float(value), float(low), float(high), n)


def over_seeds(values: Sequence[float]) -> Estimate:
    """Return the mean over seeds with its 95 % t-interval; one seed has no interval (NaN ends)."""
    from scipy import stats

    x = np.asarray(values, float)
    mean = float(x.mean())
    if len(x) < 2:
        return Estimate(mean, float("nan"), float("nan"), len(x))
    half = float(stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)))
    return Estimate(mean, mean - half, mean + half, len(x))
