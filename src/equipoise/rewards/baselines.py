"""How good a reward model is on held-out rows, and how good it must be to mean something."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from equipoise.data.pairs import LabelledAnswer
from equipoise.overlap import prompt_key
from equipoise.rewards.card import HeldOut
from equipoise.rewards.input import flatten
from equipoise.stats import Estimate, resampled
from equipoise.types import PreferencePair, RewardModel

Floats = npt.NDArray[np.float64]
Row = PreferencePair | LabelledAnswer


def measure(
    model: RewardModel, train: Sequence[Row], held_out: Sequence[Row], *, seed: int
) -> tuple[HeldOut, int]:
    """Accuracy or AUC of a reward model on held-out rows, beside its

    Returns:
        The numbers, and how many held-out inputs were truncated.
    """
    prompts = [prompt_key(row.prompt.messages) for row in held_out]
    if isinstance(held_out[0], PreferencePair):
        pairs = [row for row in held_out if isinstance(row, PreferencePair)]
        both = [(row.prompt, text) for row in pairs for text in (row.chosen, row.rejected)]
        raw = np.array(model.score(both))
        scores = raw[0::2] - raw[1::2]  # (R,)
    else:
        answers = [row for row in held_out if isinstance(row, LabelledAnswer)]
        scores = np.array(model.score([(row.prompt, row.completion) for row in answers]))  # (R,)
    compared = [
        held_out_estimate(values, held_out, prompts, seed=seed)
        for values in (
            scores,
            length_scores(train, held_out),
            bag_of_words_scores(train, held_out),
        )
    ]
    held = HeldOut(
        metric="accuracy" if isinstance(held_out[0], PreferencePair) else "auc",
        model=compared[0],
        length_only=compared[1],
        bag_of_words=compared[2],
    )
    return held, int(getattr(model, "n_truncated", 0))


def auc(scores: Floats, positive: npt.NDArray[np.bool_]) -> float:
    """Probability that a positive row scores above a negative one, ties ½; nan if one is absent."""
    n = int(positive.sum())
    if n == 0 or n == len(positive):
        return float("nan")
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]  # mid-ranks, from 1
    return float((ranks[positive].sum() - n * (n + 1) / 2) / (n * (len(positive) - n)))


def held_out_estimate(
    scores: Floats, rows: Sequence[Row], prompts: Sequence[str], *, seed: int
) -> Estimate:
    """Accuracy (pairs) or AUC (labels) with a 95 % interval by bootstrap over prompts.

    Args:
        scores: (R,) score, or score of the chosen minus score of the rejected completion.
        rows: (R,) pairs, or labelled answers; a score over ½ is positive.
        prompts: (R,) prompt keys.
        seed: Of the bootstrap.
    """
    if isinstance(rows[0], PreferencePair):
        wins = (scores > 0) + 0.5 * (scores == 0)

        def measure(index: npt.NDArray[np.int64]) -> float:
            return float(wins[index].mean())
    else:
        labels = [row.score for row in rows if isinstance(row, LabelledAnswer)]
        positive = np.array(labels) > 0.5

        def measure(index: npt.NDArray[np.int64]) -> float:
            return auc(scores[index], positive[index])

    groups: dict[str, list[int]] = {}
    for i, prompt in enumerate(prompts):
        groups.setdefault(prompt, []).append(i)
    members = [np.array(group) for group in groups.values()]
    return resampled(measure, members, np.random.default_rng(seed))


def length_scores(train: Sequence[Row], held_out: Sequence[Row]) -> Floats:
    """(R,) scores of the length-only baseline, with the sign that holds on the training rows."""
    fitted, asked = _lengths(train), _lengths(held_out)
    if isinstance(train[0], PreferencePair):
        favour = float(np.sign(fitted).mean())
    else:
        labels = np.array([row.score for row in train if isinstance(row, LabelledAnswer)])
        favour = float(((fitted - fitted.mean()) * (labels - labels.mean())).mean())
    return asked if favour >= 0 else -asked


def _lengths(rows: Sequence[Row]) -> Floats:
    return np.array(
        [
            len(row.chosen) - len(row.rejected)
            if isinstance(row, PreferencePair)
            else len(row.completion)
            for row in rows
        ],
        dtype=np.float64,
    )


def bag_of_words_scores(train: Sequence[Row], held_out: Sequence[Row]) -> Floats:
    """(R,) scores of TF-IDF of 1- and 2-grams with logistic regression (C = 4).

    Pairs: difference of the completions' vectors. Labels: prompt and completion as one text.
    """
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression

    words = TfidfVectorizer(ngram_range=(1, 2), max_features=40_000, sublinear_tf=True)
    try:
        words.fit([text for row in train for text in _texts(row)])
    except ValueError:  # nothing but single characters and signs: no word, no knowledge
        return np.zeros(len(held_out))
    if isinstance(train[0], PreferencePair):

        def vectors(rows: Sequence[Row]) -> Any:
            left, right = zip(*(_texts(row) for row in rows), strict=True)
            return words.transform(left) - words.transform(right)

        flips = np.where(np.arange(len(train)) % 2 == 0, 1.0, -1.0)
        inputs, labels = vectors(train).multiply(flips[:, None]).tocsr(), flips > 0
    else:

        def vectors(rows: Sequence[Row]) -> Any:
            return words.transform([_texts(row)[0] for row in rows])

        inputs = vectors(train)
        scores = [row.score for row in train if isinstance(row, LabelledAnswer)]
        labels = np.array(scores) > 0.5
    if len(set(labels.tolist())) < 2:
        return np.zeros(len(held_out))
    paired = isinstance(train[0], PreferencePair)
    model = LogisticRegression(C=4.0, max_iter=200, fit_intercept=not paired)
    decided: Floats = model.fit(inputs, labels).decision_function(vectors(held_out))
    return decided


def _texts(row: Row) -> tuple[str, ...]:
    if isinstance(row, PreferencePair):
        return row.chosen, row.rejected
    return (f"{flatten(row.prompt.messages)}\n{row.completion}",)
