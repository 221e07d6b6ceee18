"""Reward models and scales that need no training, and one RLHF run in miniature."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from equipoise.config import RlhfConfig, SamplingConfig, TuneConfig
from equipoise.dials.dials import Dials
from equipoise.rewards import scorer
from equipoise.rlhf.tune import Material, tune_by_rlhf
from equipoise.training.checkpoints import OnStep
from equipoise.training.loop import Training
from equipoise.tune.trainer import TunedPolicy
from equipoise.types import Prompt
from tuning_kit import ATTRIBUTES, examples, prompt, tiny_policy


class Scorer:
    """A reward model that looks at the text only."""

    def __init__(self, name: str, letters: str) -> None:
        self.name = self.hash = name
        self._letters = set(letters)

    def score(self, pairs: Sequence[tuple[Prompt, str]]) -> list[float]:
        return [sum(c in self._letters for c in text) / max(len(text), 1) for _, text in pairs]


class Constant(Scorer):
    """Scores everything alike."""

    def score(self, pairs: Sequence[tuple[Prompt, str]]) -> list[float]:
        return [0.3] * len(pairs)


class Identity:
    """A unit scale for scores that lie in [0, 1] already."""

    def unit(self, attribute: str, raw: float) -> float:
        return raw


def models(kind: type[Scorer] = Scorer) -> dict[str, Any]:
    return {
        "helpfulness": kind("hp", "abcdefghijklm"),
        "safety": kind("sf", "aeiou0123456789"),
    }


def config(**changes: Any) -> TuneConfig:
    rlhf = {
        "group": 4,
        "learning_rate": 3e-3,
        "sampling": SamplingConfig(max_tokens=6, top_k=0),
        "probe_every": 0,
        "kl_limit": 50.0,
        "checkpoint_every": changes.get("checkpoint_every", 2),
        **changes.pop("rlhf", {}),
    }
    plain = {
        "objective": "rlhf",
        "steps": 4,
        "batch_size": 8,
        "dtype": "float32",
        "checkpoint_every": 2,
        "rlhf": RlhfConfig(**rlhf),
        **changes,
    }
    return TuneConfig(**plain)


def run(folder: Path, tune: TuneConfig, on_step: OnStep | None = None, **given: Any) -> TunedPolicy:
    scale = scorer.Scorer(given.pop("reward_models", models()), Identity())
    return tune_by_rlhf(
        given.pop("policy", None) or tiny_policy(),
        Material(tiny_policy(), [prompt(i) for i in range(5)], examples(), scale),
        tune,
        dials=Dials(ATTRIBUTES, 5),
        training=Training(folder, seed=3, on_step=on_step),
        **given,
    )
