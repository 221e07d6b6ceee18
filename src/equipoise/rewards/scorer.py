"""(Prompt, completion) pairs to unit scores, for all that judges once the pool is scored."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from equipoise.errors import RewardError
from equipoise.rewards.load import not_finite
from equipoise.types import Prompt, RewardModel, UnitScale

Pair = tuple[Prompt, str]


@dataclass(frozen=True)
class Scorer:
    """Reward models with the unit scale of their scores: how much of each attribute a text has."""

    reward_models: Mapping[str, RewardModel]
    """One per attribute, in attribute order."""
    calibration: UnitScale
    """Raw score to unit score, over the start model's own pool."""

    def only(self, attribute: str) -> Scorer:
        """Return the scorer of one attribute alone."""
        return replace(self, reward_models={attribute: self.reward_models[attribute]})

    def units(self, pairs: Sequence[Pair]) -> list[dict[str, float]]:
        """Return per pair, in order, attribute to unit score in [0, 1].

        Args:
            pairs: Prompts with completion texts; repeats are allowed and cost nothing.

        Raises:
            RewardError: A reward model returned the wrong number of scores, or one that is not
                finite.
        """
        distinct = {(prompt.id, text): (prompt, text) for prompt, text in pairs}
        units: dict[tuple[str, str], dict[str, float]] = {key: {} for key in distinct}
        for attribute, model in self.reward_models.items():
            scores = checked_scores(model, attribute, list(distinct.values()))
            for key, score in zip(distinct, scores, strict=True):
                units[key][attribute] = self.calibration.unit(attribute, score)
        return [units[prompt.id, text] for prompt, text in pairs]


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
