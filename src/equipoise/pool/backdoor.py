"""The back door, measured: how well the prompt alone predicts the control (docs/distil.md)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from equipoise.stats import Estimate, resampled
from equipoise.types import ControlledExample

_ALPHA = 0.5
"""Additive smoothing, in rows, of every predicted distribution over cells."""


@dataclass(frozen=True)
class BackDoor:
    """Three measures, each of one set of examples."""

    n_rows: int
    effective_cells: Estimate
    """2^H(ζ | x) per prompt: 1 = one control per prompt, the door is wide open."""
    predictive_bits: Estimate
    """H(ζ) minus the cross-validated cross-entropy of a cell predictor on held-out prompts:
    0 = the prompt says nothing about the control."""
    mutual_information: float
    """Plug-in I(ζ; x) in bits; biased upwards, so read it beside its null only."""
    mutual_information_null: float
    """The same with the cells permuted over all rows."""


def back_door(
    examples: Sequence[ControlledExample], *, n_rows: int, seed: int, folds: int = 5
) -> BackDoor:
    """Measure the back door on a random subset of ``n_rows`` examples.

    Subsets make two sets comparable: use the smaller one's size for both.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(examples))[: min(n_rows, len(examples))]
    chosen = [examples[i] for i in sorted(order)]
    cells = {cell: i for i, cell in enumerate(sorted({e.setting for e in chosen}))}
    prompts = {p: i for i, p in enumerate(sorted({e.prompt.id for e in chosen}))}
    z = np.array([cells[e.setting] for e in chosen])
    x = np.array([prompts[e.prompt.id] for e in chosen])
    null = np.mean([_mutual_information(x, rng.permutation(z)) for _ in range(20)])
    return BackDoor(
        n_rows=len(chosen),
        effective_cells=_effective_cells(x, z, rng),
        predictive_bits=_predictive_bits(chosen, x, z, len(cells), folds, rng),
        mutual_information=_mutual_information(x, z),
        mutual_information_null=float(null),
    )


def _entropy(counts: NDArray[np.int64]) -> float:
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log2(p)).sum())


def _mutual_information(x: NDArray[np.int64], z: NDArray[np.int64]) -> float:
    joint = np.zeros((x.max() + 1, z.max() + 1), dtype=np.int64)
    np.add.at(joint, (x, z), 1)
    return _entropy(joint.sum(0)) + _entropy(joint.sum(1)) - _entropy(joint.ravel())


def _effective_cells(
    x: NDArray[np.int64], z: NDArray[np.int64], rng: np.random.Generator
) -> Estimate:
    by_prompt: dict[int, Counter[int]] = defaultdict(Counter)
    for prompt, cell in zip(x.tolist(), z.tolist(), strict=True):
        by_prompt[prompt][cell] += 1
    values = np.array([2 ** _entropy(np.array(list(c.values()))) for c in by_prompt.values()])
    return _mean(values, rng)


def _predictive_bits(
    examples: Sequence[ControlledExample],
    x: NDArray[np.int64],
    z: NDArray[np.int64],
    n_cells: int,
    folds: int,
    rng: np.random.Generator,
) -> Estimate:
    """Bits per row that a linear bag-of-words predictor gains over the marginal, by prompt."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression
    from threadpoolctl import threadpool_limits

    texts = [" ".join(m.content for m in e.prompt.messages) for e in examples]
    features = CountVectorizer(ngram_range=(1, 2), min_df=2, binary=True).fit_transform(texts)
    fold_of = rng.permutation(x.max() + 1) % folds
    gained = np.zeros(len(z))
    for fold in range(folds):
        test = fold_of[x] == fold
        train = ~test
        if not test.any() or len(set(z[train].tolist())) < 2:
            continue
        marginal = np.bincount(z[train], minlength=n_cells) + _ALPHA
        marginal = marginal / marginal.sum()
        with threadpool_limits(1):  # small products: more threads only wait for each other
            model = LogisticRegression(C=0.05, max_iter=200).fit(features[train], z[train])
        predicted = np.tile(1e-9, (int(test.sum()), n_cells))
        predicted[:, model.classes_] = model.predict_proba(features[test])
        # A little of the marginal keeps an unseen cell from costing infinity.
        predicted = 0.95 * predicted / predicted.sum(1, keepdims=True) + 0.05 * marginal
        rows = np.arange(int(test.sum()))
        gained[test] = np.log2(predicted[rows, z[test]]) - np.log2(marginal[z[test]])
    per_prompt = np.array([gained[x == prompt].mean() for prompt in range(x.max() + 1)])
    return _mean(per_prompt, rng)


def _mean(values: NDArray[np.float64], rng: np.random.Generator) -> Estimate:
    return resampled(lambda rows: float(values[rows].mean()), np.arange(len(values))[:, None], rng)
