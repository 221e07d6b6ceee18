"""Run a point, at the budget of its seed's reference run, and keep what the study reads."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks import rundirs
from benchmarks.paper.points import (
    ABLATION_STEPS,
    ABLATIONS,
    OBJECTIVES,
    REFERENCE,
    RLHF_WARM_SHARE,
    TRAINING_FREE,
    Overrides,
    Scale,
    shared,
    slug,
)
from benchmarks.rundirs import RowLengths, read_report, row_lengths, steps_within

from equipoise.config import Recipe
from equipoise.recipes.load import load_recipe

RECIPE = Path(__file__).with_name("recipe.yaml")
BATCH = 32
"""Of the recipe."""
JUDGES = ("generalization", "optimization")
ALL_RESPONDERS: Overrides = {"evaluate.responders": f"[{', '.join(TRAINING_FREE)}, tuned]"}
KEPT = (
    "mp", "overall", "bt", "bt_neighbours", "rmse", "leakage", "range", "coverage", "never_moves",
    "response", "joint",
)  # fmt: skip
"""Of a method's measures; the rest can be read in its run directory."""


def make_recipe(scale: Scale, seed: int, overrides: Overrides) -> Recipe:
    """Return the bench's recipe with a seed, the scale's overrides and a point's."""
    merged = {
        "seed": str(seed),
        "evaluate.responders": "[tuned]",
        "tune.steps": str(scale.steps),
        **scale.overrides,
        **overrides,
    }
    return load_recipe(str(RECIPE), overrides=[f"{key}={value}" for key, value in merged.items()])


def execute(scale: Scale, seed: int, name: str, overrides: Overrides) -> Path:
    """Run a point in its own directory, resuming there; return the directory."""
    return rundirs.execute(
        make_recipe(scale, seed, overrides),
        scale.runs / f"seed{seed}-{slug(name)}",
        source=scale.runs / f"seed{seed}-{REFERENCE}",
        shares=() if name == REFERENCE else shared(overrides),
    )


def run_methods(scale: Scale, seed: int) -> dict[str, Any]:
    """Run all methods of a seed at equal budget; return what the study reads of them."""
    reference = execute(scale, seed, REFERENCE, ALL_RESPONDERS)
    found: dict[str, Any] = {"seed": seed, "upstream": upstream(reference), "methods": {}}
    report = read_report(reference)
    for name in TRAINING_FREE:
        found["methods"][name] = summary(report, name)
    found["methods"][REFERENCE] = summary(report, "tuned")
    found["ceiling"] = {key: report["ceiling"]["generalization"][key] for key in KEPT[:-1]}
    for name in OBJECTIVES:
        if name != REFERENCE:
            _run_tuned(scale, seed, name, reference, found)
    return found


def _run_tuned(scale: Scale, seed: int, name: str, reference: Path, found: dict[str, Any]) -> None:
    """Run one tuned method at the reference's tokens, and add it to what was found."""
    tokens = found["methods"][REFERENCE]["cost"]["tuning_tokens"]
    budget = steps_for(name, tokens, row_lengths(reference), scale)
    folder = execute(scale, seed, name, {**OBJECTIVES[name], **budget})
    found["methods"][name] = summary(read_report(folder), "tuned")
    if name == "rlhf":
        curve = json.loads((folder / "tune/curve.json").read_text())
        online = [row for row in curve if not row["warm_start"]]
        # Few steps are online, and all looks at the judges are there.
        found["rlhf_curve"] = thinned(curve[: -len(online)]) + thinned(online)


def run_ablations(scale: Scale, seed: int) -> dict[str, Any]:
    """Run the ablations of a seed with ExMATE."""
    execute(scale, seed, REFERENCE, ALL_RESPONDERS)

    def run(name: str, changes: Overrides) -> dict[str, Any]:
        overrides = {"tune.steps": str(ABLATION_STEPS), **changes}
        folder = execute(scale, seed, f"ablation-{name}", overrides)
        return {**summary(read_report(folder), "tuned"), "upstream": upstream(folder)}

    return {
        "seed": seed,
        "steps": ABLATION_STEPS,
        "reference": run("default", {}),
        "groups": {
            group: {name: run(name, changes) for name, changes in points.items()}
            for group, points in ABLATIONS.items()
        },
    }


def steps_for(name: str, tokens: float, lengths: RowLengths, scale: Scale) -> dict[str, str]:
    """Return the steps that bring a method's tokens to the reference's; see ``points.py``.

    A completion of RLHF is sampled (its prompt once per group), read by the reference without
    controls, and trained on.
    """
    row = lengths.read()
    if name == "rlhf":
        batch, group = (
            int(OBJECTIVES[name][key]) for key in ("tune.rlhf.batch_size", "tune.rlhf.group")
        )
        sampled = lengths.prompt / group + lengths.controls + lengths.completion
        warm = steps_within(RLHF_WARM_SHARE * tokens, BATCH, row)
        left = tokens - warm * BATCH * row
        steps = steps_within(left, batch, sampled + row + row - lengths.controls)
        return {"tune.rlhf.warm_start": str(warm), "tune.steps": str(steps)}
    if OBJECTIVES[name].get("tune.objective") == "clm":
        return {"tune.steps": str(steps_within(tokens, BATCH, row))}
    return {"tune.steps": str(scale.steps)}


def upstream(folder: Path) -> dict[str, Any]:
    """Return what is known of the pool, the distilled set and the reward models of a run."""
    report = read_report(folder)
    cards = report.get("reward_models") or {}
    return {
        "n": report["n"],
        "pool": report["pool"],
        "moec": report["moec"],
        "backdoor": report["backdoor"],
        "reward_models": {
            name: card["held_out"]["model"] for name, card in cards.items() if card.get("held_out")
        },
        "minutes": report["stages"],
    }


def summary(report: Mapping[str, Any], method: str) -> dict[str, Any]:
    """Return what the study keeps of one method."""
    found = report["methods"][method]
    quality, own = found["quality"], found["generalization"]
    cells = own["levels"] ** len(own["attributes"])
    return {
        **{judge: {key: found[judge][key] for key in KEPT} for judge in JUDGES},
        "auto_mp": own["auto_mp"],
        "cost": found["cost"],
        "degenerate": quality["degenerate"],
        "fluency": quality.get("fluency_mean"),
        # Completions that the method's cost was paid for: those of the grid.
        "answers": int(own["n_prompts"] * own["n_repeats"] * cells),
    }


def thinned(curve: list[dict[str, float]], points: int = 60) -> list[dict[str, float]]:
    """Return every so many rows of a curve, the last one included."""
    step = max(1, len(curve) // points)
    kept = curve[::step]
    return kept if kept[-1] is curve[-1] else [*kept, curve[-1]]
