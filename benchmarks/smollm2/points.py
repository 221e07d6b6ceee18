"""What the study of a real model runs: each a set of overrides of the recipe ``smollm2``.

The paper's methods learn from the model's own pool, the winner also from the steered one.
"""

from __future__ import annotations

from collections.abc import Mapping
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
    # At chance after 500 examples is at chance: 600, and the 40 test prompts of XSTest.
    "tune.steps": "75",
    "evaluate.max_prompts": "40",
    "tune.steered_start": "null",
    "evaluate.auto_sweep": "false",
    "evaluate.responders": "[tuned]",
}


POINTS: Mapping[str, Overrides] = {
    # The recipe itself. The untouched model is here, as perplexity and drift compare with it.
    REFERENCE: {"evaluate.responders": "[start, tuned]"},
    "training-free": {
        "tune.steps": "1",
        "tune.steered_start": "null",
        "evaluate.responders": f"[{', '.join(TRAINING_FREE)}]",
    },
    "exmate": {**OWN_POOL, **PLAIN, "tune.objective": "exmate", "tune.weight": "1.0"},
    "clm": {**OWN_POOL, **PLAIN, "tune.objective": "clm"},
    "raw-clm": {**OWN_POOL, **PLAIN, "tune.objective": "clm", "distil.data": "raw"},
}


def make_recipe(overrides: Overrides, data: str | None) -> Recipe:
    """Return the shipped recipe with a point's overrides."""
    changes = [f"{key}={value}" for key, value in overrides.items()]
    return load_recipe(RECIPE, overrides=changes, data=data)
