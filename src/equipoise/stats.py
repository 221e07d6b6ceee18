"""Intervals: bootstrap over prompts within a run, t over seeds between runs (DESIGN §1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Estimate:
    """A number with its 95 % interval and the count of units it was computed from."""

    value: float
    low: float
    high: float
    n: int


def prompt_weights(n_prompts: int, *, draws: int, seed: int) -> Array:
    """Return bootstrap weights (draws, P); each row sums to 1.

    The same arguments give the same weights, so two methods measured on the same prompts with the
    same seed are resampled alike and their difference is paired.
    """
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(n_prompts, np.full(n_prompts, 1.0 / n_prompts), size=draws)
    return counts / n_prompts


def bootstrap(
    per_prompt: Array, weights: Array, statistic: Callable[[Array], Array] | None = None
) -> Estimate:
    """Return a statistic of prompt means with its 95 % percentile interval.

    Args:
        per_prompt: Shape (P, …): one row per prompt.
        weights: Shape (draws, P), from :func:`prompt_weights`; with no draws the interval is the
            value itself.
        statistic: Maps means (D, …) to values (D,); the mean itself by default, and then
            ``per_prompt`` is (P,).
    """
    statistic = statistic or (lambda mean: mean)
    flat = per_prompt.reshape(len(per_prompt), -1)  # (P, F)
    uniform = np.full((1, len(flat)), 1.0 / len(flat))
    means = np.concatenate([uniform @ flat, weights @ flat])  # (1 + draws, F)
    values = statistic(means.reshape(-1, *per_prompt.shape[1:]))  # (1 + draws,)
    spread = values[1:] if len(values) > 1 else values
    low, high = np.quantile(spread, [0.025, 0.975])
    return Estimate(float(values[0]), float(low), float(high), len(flat))


def paired_difference(first: Array, second: Array, *, draws: int, seed: int) -> Estimate:
    """Return mean(first − second) over the same prompts, with its bootstrap interval.

    Args:
        first: Shape (P,): one value per prompt.
        second: Shape (P,), the same prompts in the same order.
        draws: Bootstrap draws.
        seed: Seed of the draws.
    """
    if first.shape != second.shape:
        raise ValueError(f"not the same prompts: {first.shape} and {second.shape}")
    return bootstrap(first - second, prompt_weights(len(first), draws=draws, seed=seed))


def over_seeds(values: Sequence[float]) -> Estimate:
    """Return the mean over seeds with its 95 % t-interval; one seed has no interval (NaN ends)."""
    from scipy import stats

    x = np.asarray(values, float)
    mean = float(x.mean())
    if len(x) < 2:
        return Estimate(mean, float("nan"), float("nan"), len(x))
    half = float(stats.t.ppf(0.975, len(x) - 1) * x.std(ddof=1) / np.sqrt(len(x)))
    return Estimate(mean, mean - half, mean + half, len(x))
