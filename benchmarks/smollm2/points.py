"""What the study of a real model runs: each a set of overrides of the recipe ``smollm2``.

All tunings read the same pool, at the winner's budget (``run.budget``).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from equipoise.config import Recipe
from equipoise.recipes.load import load_recipe

Overrides = Mapping[str, str]

RECIPE = "smollm2"
RUNS = Path("runs/smollm2")
POOL = ("prompts", "fit-reward", "generate", "score", "judge", "steer")
REFERENCE = "best"
TRAINING_FREE = {
    "prompting": ("prompting",),
    "reranking": ("rerank8", "rerank16"),
    "steering": ("steering",),
}
"""Point to its methods."""
ATTRIBUTES = ("helpfulness", "safety")

CHANCE: Overrides = {
    # XSTest: enough to tell chance from control.
    "evaluate.max_prompts": "40",
    # Reading all cells of a prompt takes half as long as sampling them.
    "evaluate.fluency_prompts": "16",
    "evaluate.references": "[]",
}
PLAIN: Overrides = {
    **CHANCE,
    "steer": "null",
    "tune.steered_start": "null",
    "evaluate.auto_sweep": "false",
    # Fluency compares with the untouched model's on the same prompts.
    "evaluate.responders": "[start, tuned]",
}
UNTUNED: Overrides = {
    # A run has to tune something.
    "tune.steps": "1",
    "tune.steered_start": "null",
    "evaluate.auto_sweep": "false",
}
BRANCHES: Mapping[str, int] = {"exmate": 2, "clm": 1, "raw-clm": 1}
"""Of an example, asked setting included; these points get the reference's budget."""


POINTS: Mapping[str, Overrides] = {
    # The recipe itself. The untouched model is here, as perplexity and drift compare with it.
    REFERENCE: {"evaluate.responders": "[start, tuned]"},
    "prompting": {
        **UNTUNED,
        **CHANCE,
        "steer": "null",
        "evaluate.responders": "[start, prompting]",
    },
    "reranking": {**UNTUNED, "steer": "null", "evaluate.responders": "[rerank8, rerank16]"},
    "steering": {**UNTUNED, "evaluate.responders": "[steering]"},
    "exmate": {**PLAIN, "tune.objective": "exmate", "tune.weight": "1.0"},
    "clm": {**PLAIN, "tune.objective": "clm"},
    "raw-clm": {**PLAIN, "tune.objective": "clm", "distil.data": "raw"},
}


def make_recipe(overrides: Overrides, data: str | None) -> Recipe:
    """Return the shipped recipe with a point's overrides."""
    changes = [f"{key}={value}" for key, value in overrides.items()]
    return load_recipe(RECIPE, overrides=changes, data=data)
