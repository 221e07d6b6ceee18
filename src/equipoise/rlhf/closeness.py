"""What RLHF with control asks for, and how near an answer came (docs/rlhf.md).

    reward(y; ζ) = 1 - mean over the dialled attributes a of |u_a(y) - t_a|

with u the calibrated unit score of the training reward models and t the target of the level. An
attribute on auto asks for nothing and is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from equipoise.dials.dials import Dials, target
from equipoise.rewards.scorer import Scorer
from equipoise.rlhf.rollouts import Ask
from equipoise.seeds import derive_seed
from equipoise.tune.batch import drop_to_auto
from equipoise.types import DialSetting, Prompt


def closeness(units: Sequence[float], setting: DialSetting, levels: int) -> float:
    """Return ``1 - mean |u_a - t_a|`` over the attributes that are not on auto.

    Args:
        units: Unit score in [0, 1] per attribute.
        setting: What was asked for, at least one attribute not on auto.
        levels: L.

    Returns:
        In [0, 1]; 1 is exactly on target.
    """
    gaps = [
        abs(unit - target(level, levels))
        for unit, level in zip(units, setting.levels, strict=True)
        if level is not None
    ]
    if not gaps:
        raise ValueError("a setting with every attribute on auto asks for nothing")
    return 1.0 - sum(gaps) / len(gaps)


def deaf_floor(levels: int) -> float:
    """Return the reward of a policy that always answers at the median, over all settings."""
    return 1.0 - sum(abs(0.5 - target(level, levels)) for level in range(levels)) / levels


class AskPlan:
    """Row i to a prompt and a setting, a pure function of (prompts, seed, i).

    Prompts come in epochs of permutations, settings uniformly over the control cells; each
    attribute is on auto with probability ``auto_rate``, but never all of them at once.

    Args:
        prompts: Training prompts.
        dials: Attributes and levels.
        auto_rate: Probability per attribute.
        seed: Seed of the draws.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        *,
        dials: Dials,
        auto_rate: float,
        seed: int,
    ) -> None:
        self._prompts, self._seed = list(prompts), seed
        self._cells = dials.cells()
        # At rate 1 no attribute would ever be asked for.
        self._auto_rate = min(auto_rate, 0.9)

    def __call__(self, index: int) -> Ask:
        """Return what row ``index`` asks for."""
        epoch, place = divmod(index, len(self._prompts))
        shuffled = np.random.default_rng(derive_seed(self._seed, "rlhf epoch", epoch))
        prompt = self._prompts[shuffled.permutation(len(self._prompts))[place]]
        rng = np.random.default_rng(derive_seed(self._seed, "rlhf setting", index))
        cell = self._cells[rng.integers(len(self._cells))]
        while True:
            setting = drop_to_auto(cell, self._auto_rate, rng)
            if any(level is not None for level in setting.levels):
                return Ask(prompt, setting)


def control_reward(
    scorer: Scorer, levels: int
) -> Callable[[Sequence[tuple[Ask, str]]], list[float]]:
    """Return the reward function of calibrated reward models.

    Raises (when called):
        RewardError: A reward model returned the wrong number of scores, or one that is not finite.
    """

    def reward(pairs: Sequence[tuple[Ask, str]]) -> list[float]:
        units = scorer.units([(ask.prompt, text) for ask, text in pairs])
        earned = []
        for (ask, _), unit in zip(pairs, units, strict=True):
            assert ask.setting is not None  # every row of an AskPlan has one
            earned.append(closeness(list(unit.values()), ask.setting, levels))
        return earned

    return reward
