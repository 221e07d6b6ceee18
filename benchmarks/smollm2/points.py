"""What the study of a real model runs: each a set of overrides of the recipe ``smollm2``.

The paper's methods learn from the model's own pool, the winner also from the steered one. All four
see as many tokens in tuning.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from equipoise.config import Recipe
from equipoise.recipe_io import load_recipe

Overrides = Mapping[str, str]

RECIPE = "smollm2"
RUNS = Path("runs/smollm2")
POOL = ("prompts", "fit-reward", "generate", "score", "judge", "steer", "regenerate")
REFERENCE = "best"
TRAINING_FREE = ("prompting", "rerank8", "rerank16", "steering")
ATTRIBUTES = ("helpfulness", "safety")

OWN_POOL: Overrides = {"regenerate": "null", "distil.max_fluency_drop": "null"}
PLAIN: Overrides = {
    "tune.weight_relative": "false",
    "tune.weight_warm_up": "0",
    "evaluate.auto_sweep": "false",
    "evaluate.responders": "[tuned]",
}


@dataclass(frozen=True)
class Point:
    """One run: overrides of the recipe, and how many branches of an example pass the model."""

    overrides: Overrides
    branches: int = 1


POINTS: Mapping[str, Point] = {
    # The recipe itself. The untouched model is here, as perplexity and drift compare with it.
    REFERENCE: Point({"evaluate.responders": "[start, tuned]"}, branches=2),
    "training-free": Point(
        {"tune.steps": "1", "evaluate.responders": f"[{', '.join(TRAINING_FREE)}]"}
    ),
    "exmate": Point(
        {**OWN_POOL, **PLAIN, "tune.objective": "exmate", "tune.weight": "1.0"}, branches=2
    ),
    "clm": Point({**OWN_POOL, **PLAIN, "tune.objective": "clm"}),
    "raw-clm": Point({**OWN_POOL, **PLAIN, "tune.objective": "clm", "distil.data": "raw"}),
}


def make_recipe(overrides: Overrides, data: str | None) -> Recipe:
    """Return the shipped recipe with a point's overrides."""
    changes = [f"{key}={value}" for key, value in overrides.items()]
    return load_recipe(RECIPE, overrides=changes, data=data)
