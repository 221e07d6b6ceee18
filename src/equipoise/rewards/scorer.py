"""(Prompt, completion) pairs to unit scores, for all that judges once the pool is scored."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from equipoise.errors import RewardError
from equipoise.rewards.load import not_finite
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
        scores = checked_scores(model, attribute, list(distinct.values()))
        for key, score in zip(distinct, scores, strict=True):
            units[key][attribute] = calibration.unit(attribute, score)
    return units


def checked_scores(model: RewardModel, attribute: str, pairs: Sequence[Pair]) -> list[float]:
    """Return one finite score per pair.

    Raises:
        RewardError: The reward model returned the wrong number of scores, or one that is not
            finite; the message names attribute and prompt.
    """
    if not pairs:
        return []
    scores, name = model.score(pairs), f"{model.name} of {attribute}"
    if len(scores) != len(pairs):
        raise RewardError(
            f"Reward model {name} returned {len(scores)} scores for {len(pairs)} rows",
            why=f"The first row is a completion of prompt {pairs[0][0].id}.",
            fix="Correct the reward model; nothing of this chunk was written.",
        )
    for value, (prompt, _) in zip(scores, pairs, strict=True):
        if not math.isfinite(value):
            raise not_finite(name, value, prompt.id)
    return [float(value) for value in scores]
