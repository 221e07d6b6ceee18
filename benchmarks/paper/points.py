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


ABLATIONS: Mapping[str, Mapping[str, Overrides]] = {
    "pool": {
        "pool raw": {"distil.data": "raw"},
        "pool denoised": {"distil.data": "denoised"},
        # Rare cells weigh more in every pool; here they do not.
        "pool raw, unweighted": {"distil.data": "raw", "distil.balance_cap": "1"},
    },
    "balance_cap": {"balance_cap 1": {"distil.balance_cap": "1"}},
    "min_cells": {f"min_cells {n}": {"distil.min_cells": str(n)} for n in (1, 10, 13)},
    "K": {f"K {k}": {"generate.completions_per_prompt": str(k)} for k in (6, 12, 32)},
    "w": {f"w {w}": {"tune.weight": str(w)} for w in (0.05, 0.2, 1, 3)},
    "counterfactual": {
        "uniform": {"tune.counterfactual": "uniform"},
        "observed": {"tune.counterfactual": "observed"},
        "batch mean": {"tune.exp_of": "batch"},
    },
    "prompts": {f"prompts {n}": {"prompts.train.0.limit": str(n)} for n in (60, 120, 240)},
}
"""Group to points, each a change of the default, which belongs to every group and is run once."""
POOL = ("prompts", "fit-reward", "generate", "score", "distil")
BEFORE = {"prompts": ("fit-reward",), "generate": POOL[:2], "distil": POOL[:-1]}
"""Stages that do not depend on the options of a stage."""


def shared(overrides: Overrides) -> tuple[str, ...]:
    """Return the stages that a point can copy from the reference run of the same seed."""
    changed = (key.split(".")[0] for key in overrides)
    return next((BEFORE[stage] for stage in changed if stage in BEFORE), POOL)


def slug(name: str) -> str:
    """Return a point's name as the name of a folder."""
    return name.replace(" ", "-").replace(".", "_")
