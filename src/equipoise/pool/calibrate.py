"""Raw scores to unit scores by mid-rank over the start model's own pool (docs/score.md).

    u(r) = (#{pool scores < r} + ½ · #{pool scores = r}) / N

A score is meaningless without its calibration, so the calibration carries the pool's hash.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from equipoise.errors import DataError, RewardError
from equipoise.types import ScoredCompletion

Mode = Literal["pooled", "within_prompt"]
TIE_WARNING = 0.1
"""Share of the pool that ties at the top from which a warning is due."""

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Calibration:
    """The unit scale of a pool."""

    scores: Mapping[str, tuple[float, ...]]
    """Attribute to the pool's raw scores, ascending."""
    pool_hash: str
    """Of the pool it was made from, see :func:`pool_hash`."""
    mode: Mode = "pooled"
    """How the *pool's own* unit scores are made, see :func:`unit_scores`. A completion outside
    the pool has no fellows to be ranked among, so :meth:`unit` is pooled in either mode."""

    def unit(self, attribute: str, raw: float) -> float:
        """Return the unit score in [0, 1] of a raw score: its mid-rank in the pool.

        Raises:
            DataError: The pool was never scored for this attribute.
        """
        if attribute not in self.scores:
            raise DataError(
                f"The pool is not calibrated for {attribute}",
                why=f"It was scored for {', '.join(self.scores)}.",
                fix="Score the pool with a reward model for this attribute.",
            )
        return mid_rank(self.scores[attribute], raw)

    def to_json(self) -> str:
        """Write as JSON; :meth:`from_json` gives back exactly the same numbers."""
        content = {"mode": self.mode, "pool_hash": self.pool_hash, "scores": dict(self.scores)}
        return json.dumps(content, allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> Calibration:
        """Read what :meth:`to_json` wrote.

        Raises:
            DataError: The text is not a calibration.
        """
        try:
            content = json.loads(text)
            scores = {a: tuple(map(float, values)) for a, values in content["scores"].items()}
            mode, pool = content["mode"], str(content["pool_hash"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _damaged(f"{type(error).__name__}: {error}") from error
        if mode not in ("pooled", "within_prompt"):
            raise _damaged(f"The mode {mode!r} is unknown.")
        for values in scores.values():
            if not values or not all(map(math.isfinite, values)) or [*values] != sorted(values):
                raise _damaged("Its scores are missing, not finite or not ascending.")
        return cls(scores, pool, mode)


def _damaged(why: str) -> DataError:
    return DataError("The calibration cannot be read", why=why, fix="Score the pool again.")


def mid_rank(ascending: Sequence[float], raw: float) -> float:
    """Share of scores below ``raw`` plus half of the share equal to it, in [0, 1]."""
    below = bisect_left(ascending, raw)
    return (below + bisect_right(ascending, raw)) / (2 * len(ascending))


def calibrate(scored: Sequence[ScoredCompletion], *, mode: Mode) -> Calibration:
    """Make the unit scale of a pool.

    Args:
        scored: The start model's own pool, all attributes scored.
        mode: ``pooled``: ranks over the pool. ``within_prompt``: the pool's own unit scores are
            ranks among the completions of one prompt.

    Raises:
        DataError: The pool is empty.
        RewardError: All scores of an attribute are equal (or all within each prompt, for
            ``within_prompt``): nothing can be asked for on such an axis.
    """
    if not scored:
        raise DataError(
            "The pool is empty",
            why="There is no completion to calibrate on.",
            fix="Generate completions first, or look at why all of them were dropped.",
        )
    scores = {a: tuple(sorted(row.raw[a] for row in scored)) for a in scored[0].raw}
    for attribute, values in scores.items():
        flat = values[0] == values[-1] or (
            mode == "within_prompt"
            and all(v[0] == v[-1] for v in _by_prompt(scored, attribute).values())
        )
        if flat:
            raise RewardError(
                f"All scores for {attribute} are equal",
                why=f"The reward model gave {values[0]} to all {len(values)} completions"
                + ("." if values[0] == values[-1] else " of a prompt, for every prompt."),
                fix="Check the reward model's format and logit, or raise the temperature of "
                "generation so that completions differ.",
            )
        tie = top_tie(values)
        if tie >= TIE_WARNING:
            log.warning(
                "%s: %.0f %% of the pool share the top score; no unit score above %.2f can be "
                "reached",
                attribute,
                100 * tie,
                1 - tie / 2,
            )
    return Calibration(scores, pool_hash(scored), mode)


def own_pool(scored: Sequence[ScoredCompletion]) -> list[ScoredCompletion]:
    """Return what the start model wrote unasked: prompted completions give no scale."""
    return [row for row in scored if row.completion.setting is None]


def unit_scores(
    scored: Sequence[ScoredCompletion], calibration: Calibration
) -> list[Mapping[str, float]]:
    """Unit scores of the pool that the calibration was made from, in order.

    Returns:
        Attribute to unit score in [0, 1]; with ``within_prompt`` the rank among the model's own
        completions of the same prompt, and of a prompt that has none in the whole pool.
    """
    if calibration.mode == "pooled":
        return [{a: calibration.unit(a, raw) for a, raw in row.raw.items()} for row in scored]
    own = own_pool(scored)
    fellows = {attribute: _by_prompt(own, attribute) for attribute in calibration.scores}
    return [
        {
            a: mid_rank(fellows[a].get(row.completion.prompt_id, calibration.scores[a]), raw)
            for a, raw in row.raw.items()
        }
        for row in scored
    ]


def top_tie(ascending: Sequence[float]) -> float:
    """Share of scores that tie at the top; 0 where the top is held alone."""
    tied = len(ascending) - bisect_left(ascending, ascending[-1])
    return tied / len(ascending) if tied > 1 else 0.0


def between_share(groups: Iterable[Sequence[float]]) -> float:
    """Share of the variance that lies between groups: η² = SS_between / SS_total, in [0, 1]."""
    kept = [group for group in groups if group]
    n = sum(len(group) for group in kept)
    mean = sum(sum(group) for group in kept) / n
    total = sum((value - mean) ** 2 for group in kept for value in group)
    between = sum(len(group) * (sum(group) / len(group) - mean) ** 2 for group in kept)
    return min(1.0, between / total) if total > 0 else 0.0


def calibration_report(
    scored: Sequence[ScoredCompletion],
    calibration: Calibration,
    judged: Sequence[ScoredCompletion] | None = None,
) -> dict[str, dict[str, float | None]]:
    """What the report prints about the scale, per attribute.

    Args:
        scored: The pool.
        calibration: Made from it.
        judged: The same completions, in the same order, scored by the judges.

    Returns:
        Attribute to ``n``, ``between_prompt_share`` (η² of the raw scores; with K completions per
        prompt a model that knows nothing of the prompt gets about 1/K), ``top_tie``,
        ``highest_unit`` and ``within_prompt_judge_correlation`` (mean over prompts of Pearson;
        ``None`` without judge, or where no prompt varies).
    """
    report: dict[str, dict[str, float | None]] = {}
    for attribute, values in calibration.scores.items():
        correlation = None
        if judged is not None and attribute in judged[0].raw:
            correlation = _within_correlation(scored, judged, attribute)
        tie = top_tie(values)
        report[attribute] = {
            "n": len(values),
            "between_prompt_share": between_share(_by_prompt(scored, attribute).values()),
            "top_tie": tie,
            "highest_unit": mid_rank(values, values[-1]),
            "within_prompt_judge_correlation": correlation,
        }
    return report


def pool_hash(scored: Iterable[ScoredCompletion]) -> str:
    """SHA-256 over prompts, samples, texts and raw scores; the order of rows does not count."""
    lines = sorted(
        json.dumps(
            [
                row.completion.prompt_id,
                row.completion.round,
                row.completion.sample_index,
                row.completion.text,
                sorted(row.raw.items()),
            ]
        )
        for row in scored
    )
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _by_prompt(scored: Iterable[ScoredCompletion], attribute: str) -> dict[str, list[float]]:
    groups: dict[str, list[float]] = {}
    for row in scored:
        groups.setdefault(row.completion.prompt_id, []).append(row.raw[attribute])
    return {prompt: sorted(values) for prompt, values in groups.items()}


def _within_correlation(
    scored: Sequence[ScoredCompletion], judged: Sequence[ScoredCompletion], attribute: str
) -> float | None:
    from statistics import StatisticsError, correlation, fmean

    groups: dict[str, list[tuple[float, float]]] = {}
    for ours, theirs in zip(scored, judged, strict=True):
        pair = (ours.raw[attribute], theirs.raw[attribute])
        groups.setdefault(ours.completion.prompt_id, []).append(pair)
    found = []
    for pairs in groups.values():
        try:
            found.append(correlation(*zip(*pairs, strict=True)))
        except (StatisticsError, TypeError):
            continue  # one completion, or a score that never moves: no correlation to speak of
    return fmean(found) if found else None
