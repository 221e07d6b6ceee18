"""The Workshop bench: every method over seeds, and how fast each objective learns to listen.

    python -m benchmarks.workshop.run                 # all of it; resumes where it was stopped
    python -m benchmarks.workshop.run --only seeds    # or: curves, collect

A seed re-draws prompts, pool and tuning, and trains the shipped reward models on with fresh pairs
(training them from the start for every seed would take longer than all the rest). Everything that
was chosen (steps, rate, temperature, w) was chosen on dev prompts; the test prompts are read here.
The runs are those of ``benchmarks.paper``, which adds RLHF and more seeds; the committed result is
``benchmarks/workshop/results.json``.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.budget import row_lengths
from benchmarks.machine import processor
from benchmarks.paper.points import FULL, OBJECTIVES, POOL, REFERENCE, TRAINING_FREE, slug
from benchmarks.paper.runs import execute, steps_for, summary
from benchmarks.rundirs import read_report

from equipoise.config import Recipe
from equipoise.stats import over_seeds
from equipoise.store.rundir import RunDir
from equipoise.types import Completion

HERE = Path(__file__).parent
SEEDS = (0, 1, 2)
ATTRIBUTES = ("helpfulness", "safety")
METRICS = ("mp", "bt", "bt_neighbours", "leakage", "rmse", "range")
CURVE_STEPS = (50, 150, FULL.steps)
"""Tuning budgets in ExMATE steps of 32 examples; CLM gets as many tokens."""


def run_seed(seed: int, names: Sequence[str] = ("clm",)) -> None:
    """ExMATE with all training-free methods, then the named objectives on the same pool."""
    responders = f"[{', '.join(TRAINING_FREE)}, tuned]"
    reference = execute(FULL, seed, REFERENCE, {"evaluate.responders": responders}, ())
    for name in names:
        shares = POOL[:-1] if name.startswith("raw") else POOL
        execute(FULL, seed, name, {**OBJECTIVES[name], **_budget(reference, name)}, shares)


def run_curves() -> None:
    """CLM and ExMATE on the raw pool and on MOEC over the tuning budget, one seed."""
    run_seed(0, ("clm", "raw-exmate", "raw-clm"))
    reference = _folder(0, REFERENCE)
    for name, steps, objective, data in curve_points():
        if steps < FULL.steps:
            method = objective if data == "moec" else f"raw-{objective}"
            changes = {
                **OBJECTIVES[method],
                **_budget(reference, method, share=steps / FULL.steps),
                "evaluate.auto_sweep": "false",
            }
            execute(FULL, 0, name, changes, POOL if data == "moec" else POOL[:-1])


def _budget(reference: Path, name: str, *, share: float = 1.0) -> dict[str, str]:
    """Steps for a share of the reference run's tokens."""
    if name.endswith(REFERENCE):
        return {"tune.steps": str(round(share * FULL.steps))}
    tokens = summary(read_report(reference), "tuned")["cost"]["tuning_tokens"]
    return steps_for(name, share * tokens, row_lengths(reference), FULL)


def curve_points() -> Iterator[tuple[str, int, str, str]]:
    """Yield (run name, steps, objective, data); the largest budget is the method's own run."""
    for data in ("moec", "raw"):
        for objective in ("clm", "exmate"):
            for steps in CURVE_STEPS:
                method = objective if data == "moec" else f"raw-{objective}"
                whole = steps == FULL.steps
                yield method if whole else f"curve {method} {steps}", steps, objective, data


def report_of(seed: int, name: str) -> dict[str, Any]:
    """Return ``report.json`` of a run."""
    return read_report(_folder(seed, name))


def _folder(seed: int, name: str) -> Path:
    return FULL.runs / f"seed{seed}-{slug(name)}"


def collect(demo: Path | None) -> dict[str, Any]:
    """Gather all finished runs into one result."""
    headline: dict[str, float] = {}

    def put(name: str, values: Sequence[float]) -> None:
        estimate = over_seeds(values)
        headline[name] = round(estimate.value, 4)
        headline[f"{name}.low"] = round(estimate.low, 4)
        headline[f"{name}.high"] = round(estimate.high, 4)

    exmate = [report_of(seed, "exmate") for seed in SEEDS]
    clm = [report_of(seed, "clm") for seed in SEEDS]
    methods: dict[str, list[Mapping[str, Any]]] = {
        name: [report["methods"][name] for report in exmate] for name in TRAINING_FREE
    }
    methods["exmate"] = [report["methods"]["tuned"] for report in exmate]
    methods["clm"] = [report["methods"]["tuned"] for report in clm]
    for name, found in methods.items():
        for judge in ("generalization", "optimization"):
            for metric in METRICS:
                for attribute in ATTRIBUTES:
                    values = [one[judge][metric][attribute]["value"] for one in found]
                    put(f"{name}.{judge}.{metric}.{attribute}", values)
            put(f"{name}.{judge}.coverage", [one[judge]["coverage"]["value"] for one in found])
        put(f"{name}.degenerate", [one["quality"]["degenerate"]["value"] for one in found])
    for metric in METRICS:
        for attribute in ATTRIBUTES:
            values = [r["ceiling"]["generalization"][metric][attribute]["value"] for r in exmate]
            put(f"ceiling.{metric}.{attribute}", values)
    best = max(("exmate", "clm"), key=lambda name: _overall(methods[name]))
    for name in ("exmate", "clm"):
        for attribute in ATTRIBUTES:
            values = [one["generalization"]["auto_mp"][attribute]["value"] for one in methods[name]]
            put(f"{name}.auto.mp.{attribute}", values)
            if name == best:
                put(f"auto.mp.{attribute}", values)
    for other in ("exmate", "clm"):
        for attribute in ATTRIBUTES:
            put(
                f"{other}_minus_rerank16.mp.{attribute}",
                [
                    one["generalization"]["mp"][attribute]["value"]
                    - two["generalization"]["mp"][attribute]["value"]
                    for one, two in zip(methods[other], methods["rerank16"], strict=True)
                ],
            )
    for attribute, values in _nearest_copies().items():
        put(f"nearest_copy.mp.{attribute}", values)
    if demo is not None:
        found = read_report(demo)
        headline["seconds.demo"] = round(60 * sum(found["stages"].values()), 1)
        for attribute, mp in found["methods"]["tuned"]["generalization"]["mp"].items():
            headline[f"demo.generalization.mp.{attribute}"] = round(mp["value"], 4)
    return {
        "made_by": "python -m benchmarks.workshop.run",
        "machine": {"processor": processor(), "system": platform.system()},
        "seeds": list(SEEDS),
        "n_test_prompts": exmate[0]["methods"]["start"]["generalization"]["n_prompts"],
        "interval": "95 %, t over seeds; per seed: bootstrap over prompts",
        "best": best,
        "headline": headline,
        "paired_within_seed": [report["differences"] for report in exmate],
        "per_seed": [
            {
                "seed": seed,
                "reward_models": _fits(seed),
                "pool": one.get("pool"),
                "moec": one.get("moec"),
                "backdoor": one.get("backdoor"),
                "cost": {
                    **{name: one["methods"][name]["cost"] for name in (*TRAINING_FREE, "tuned")},
                    "clm": other["methods"]["tuned"]["cost"],
                },
                "minutes": one.get("stages"),
            }
            for seed, one, other in zip(SEEDS, exmate, clm, strict=True)
        ],
        "curves": list(_curves()),
    }


def _overall(found: Sequence[Mapping[str, Any]]) -> float:
    return float(np.mean([one["generalization"]["overall"]["value"] for one in found]))


def _fits(seed: int) -> dict[str, Any]:
    folder = _folder(seed, "exmate") / "fit-reward" / "fitted"
    cards = {path.parent.name: json.loads(path.read_text()) for path in folder.rglob("reward.json")}
    return {name: card["held_out"] for name, card in sorted(cards.items())}


def _curves() -> Iterator[dict[str, Any]]:
    for name, _, objective, data in curve_points():
        if (_folder(0, name) / "report" / "report.json").exists():
            tuned = report_of(0, name)["methods"]["tuned"]
            yield {
                "data": data,
                "objective": objective,
                "steps": tuned["cost"]["steps"],
                "n_prompts": tuned["generalization"]["n_prompts"],
                "tuning_tokens": tuned["cost"]["tuning_tokens"],
                "mp": {
                    judge: {a: tuned[judge]["mp"][a] for a in ATTRIBUTES}
                    for judge in ("generalization", "optimization")
                },
            }


def _nearest_copies() -> dict[str, list[float]]:
    """MP of the policy that copies, on each seed's own prompts and pool."""
    from equipoise.pipeline.job import read_prompts
    from equipoise.worlds.workshop.stats import nearest_copy_mp

    found: dict[str, list[float]] = {name: [] for name in ATTRIBUTES}
    for seed in SEEDS:
        folder = _folder(seed, "exmate")
        stored = Recipe.model_validate_json((folder / "recipe.json").read_text())
        with RunDir.open(folder, stored) as opened:
            prompts = read_prompts(opened)
            shards = opened.done("generate").read_rows(Completion, prefix="shard-")
            pool = [completion for shard in shards for completion in shard]
        train = [prompt for prompt in prompts if prompt.split == "train"]
        test = [prompt for prompt in prompts if prompt.split == "test"]
        copied = nearest_copy_mp(pool, train, test)
        for attribute in ATTRIBUTES:
            found[attribute].append(copied[attribute].value)
    return found


def main() -> None:
    """Run what is missing, then write ``results.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("seeds", "curves", "collect"))
    parser.add_argument("--seeds", type=int, nargs="*", default=list(SEEDS))
    parser.add_argument("--demo", type=Path, help="run directory that ./demo made after set-up")
    arguments = parser.parse_args()
    if arguments.only in (None, "seeds"):
        for seed in arguments.seeds:
            run_seed(seed)
    if arguments.only in (None, "curves"):
        run_curves()
    if arguments.only in (None, "collect"):
        result = collect(arguments.demo)
        (HERE / "results.json").write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {HERE / 'results.json'}")


if __name__ == "__main__":
    main()
