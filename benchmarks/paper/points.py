"""What the study runs: methods and ablations, each a set of overrides of the bench's recipe.

Every point is one run directory. Points that differ late share what comes before: their upstream
stages are copied, never made twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

Overrides = Mapping[str, str]

TRAINING_FREE = ("start", "prompting", "rerank8", "rerank16")
TUNED = ("exmate", "clm", "rlhf")
"""On MOEC; exmate comes first, as its tokens are the budget of the others."""
REFERENCE = "exmate"
BEST = "exmate"
"""The paper's best method: numbers to reach are asked of it, and not of whichever turns out best on
the test prompts."""

CLM: Overrides = {"tune.objective": "clm", "tune.learning_rate": "1.0e-3"}
"""Each objective at the rate that was best on dev prompts; ExMATE's is the recipe's."""
RLHF_WARM_SHARE = 0.8
"""Share of RLHF's budget that goes into its warm start by CLM."""
RLHF: Overrides = {
    **CLM,
    "tune.objective": "rlhf",
    "tune.rlhf.batch_size": "64",
    "tune.rlhf.group": "8",
    "tune.rlhf.beta": "0.1",
    "tune.rlhf.learning_rate": "5.0e-5",
    "tune.rlhf.sampling": "{temperature: 1.0, max_tokens: 80}",
    "tune.rlhf.probe_every": "6",
}
"""The warm start has CLM's own rate and batch."""
OBJECTIVES: Mapping[str, Overrides] = {
    "exmate": {},
    "clm": CLM,
    "rlhf": RLHF,
    "raw-exmate": {"distil.data": "raw"},
    "raw-clm": {"distil.data": "raw", **CLM},
}


@dataclass(frozen=True)
class Scale:
    """How large a study is."""

    name: str
    seeds: tuple[int, ...]
    steps: int
    """ExMATE steps of 32 examples; all other methods get as many tokens."""
    overrides: Overrides = field(default_factory=dict)

    @property
    def runs(self) -> Path:
        """Run directories; not committed."""
        return Path("runs") / self.name


FULL = Scale("paper", seeds=(0, 1, 2, 3, 4, 5, 6, 7), steps=400)
QUICK = Scale(
    "paper-quick",
    seeds=(0, 1),
    steps=150,
    overrides={
        "prompts.n_dev": "8",
        "prompts.train.0.limit": "168",
        "prompts.test.0.limit": "12",
        "generate.completions_per_prompt": "16",
        # Fitting reward models per seed takes longer than all the rest.
        "fit_reward": "{}",
        "reward_models.helpfulness.model": "workshop://rm_helpfulness",
        "reward_models.safety.model": "workshop://rm_safety",
        "tune.rlhf.probe_every": "0",
    },
)
ABLATION_SEEDS = (0, 1)
ABLATION_STEPS = 200
"""Half of the study's: at the full budget the raw pool has caught up and little is left to tell."""
REWIND_SEEDS = (0, 1)


@dataclass(frozen=True)
class Point:
    """One run: overrides on top of the scale's, and the run that it shares its beginning with."""

    name: str
    overrides: Overrides
    shares: tuple[str, ...]
    """Stages that are copied from the reference run of the same seed."""


POOL = ("prompts", "fit-reward", "generate", "score", "distil")
DEFAULT = Point("default", {}, POOL)
"""What an ablation changes one thing of."""


def ablations() -> dict[str, list[Point]]:
    """Return group to points; :data:`DEFAULT` belongs to every group and is run once."""

    def tuned(name: str, **overrides: str) -> Point:
        return Point(name, _dotted(overrides), POOL)

    def distilled(name: str, **overrides: str) -> Point:
        return Point(name, _dotted(overrides), POOL[:-1])

    return {
        "pool": [
            distilled("pool raw", distil__data="raw"),
            distilled("pool denoised", distil__data="denoised"),
            # Rare cells weigh more in every pool; here they do not.
            distilled("pool raw, unweighted", distil__data="raw", distil__balance_cap="1"),
        ],
        "balance_cap": [distilled("balance_cap 1", distil__balance_cap="1")],
        "min_cells": [distilled(f"min_cells {n}", distil__min_cells=str(n)) for n in (1, 10, 13)],
        "K": [
            Point(f"K {k}", {"generate.completions_per_prompt": str(k)}, ("prompts", "fit-reward"))
            for k in (6, 12, 32)
        ],
        "w": [tuned(f"w {w}", tune__weight=str(w)) for w in (0.05, 0.2, 1, 3)],
        "counterfactual": [
            tuned("uniform", tune__counterfactual="uniform"),
            tuned("observed", tune__counterfactual="observed"),
            tuned("batch mean", tune__exp_of="batch"),
        ],
        "prompts": [
            Point(f"prompts {n}", {"prompts.train.0.limit": str(n)}, ("fit-reward",))
            for n in (60, 120, 240)
        ],
    }


def _dotted(overrides: Mapping[str, str]) -> dict[str, str]:
    return {name.replace("__", "."): value for name, value in overrides.items()}


def slug(name: str) -> str:
    """Return a point's name as the name of a folder."""
    return name.replace(" ", "-").replace(".", "_")
