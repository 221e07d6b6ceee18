"""(Prompt, completion) pairs to unit scores, for all that judges once the pool is scored."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

from equipoise.errors import RewardError
from equipoise.types import Prompt, RewardModel, UnitScale

Pair = tuple[Prompt, str]


def unit_scores_of(
    pairs: Iterable[Pair], reward_models: Mapping[str, RewardModel], calibration: UnitScale
) -> dict[tuple[str, str], dict[str, float]]:
    """Score each distinct pair once and calibrate.

    Args:
        pairs: Prompts with completion texts; repeats are allowed and cost nothing.
        reward_models: One per attribute, in attribute order.
        calibration: Raw score to unit score.

    Returns:
        (prompt id, completion text) to attribute to unit score in [0, 1].

    Raises:
        RewardError: A reward model returned the wrong number of scores, or one that is not finite.
    """
    distinct = {(prompt.id, text): (prompt, text) for prompt, text in pairs}
    units: dict[tuple[str, str], dict[str, float]] = {key: {} for key in distinct}
    for attribute, model in reward_models.items():
        raw = model.score(list(distinct.values()))
        if len(raw) != len(distinct):
            raise RewardError(
                f"reward model {model.name} returned {len(raw)} scores for {len(distinct)} rows",
                why="a score without a row, or a row without a score, cannot be used",
                fix="check the reward model of attribute " + attribute,
            )
        for key, score in zip(distinct, raw, strict=True):
            if not math.isfinite(score):
                raise RewardError(
                    f"reward model {model.name} returned {score} for prompt {key[0]}",
                    why="only finite scores can be compared",
                    fix="check the reward model of attribute " + attribute,
                )
            units[key][attribute] = calibration.unit(attribute, score)
    return units
