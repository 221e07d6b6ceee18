"""Dials on a real model: every method on SmolLM2-135M-Instruct, with plan, cost and curves.

    equipoise fetch smollm2
    python -m benchmarks.smollm2.run --data DIR              # all of it; resumes where it stopped
    python -m benchmarks.smollm2.run --data DIR --only clm   # one point of points.py
    python -m benchmarks.smollm2.run --only collect          # results.json from the finished points
    python -m benchmarks.smollm2.run --only page             # the page's tables and figures anew

DIR is the folder of ``docs/real-models.md``. One seed, one pool for all points; what was chosen was
chosen on dev prompts, the test prompts are read here. Run directories lie in ``runs/smollm2``;
``results.json`` holds no text of any prompt or completion.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.results import DOCS, read, shaped, write
from benchmarks.rundirs import execute, read_report, row_lengths, steps_within
from benchmarks.smollm2.figures import draw
from benchmarks.smollm2.points import (
    ATTRIBUTES,
    BRANCHES,
    POINTS,
    POOL,
    REFERENCE,
    RUNS,
    TRAINING_FREE,
    make_recipe,
)
from benchmarks.smollm2.tables import TABLES
from benchmarks.tables import filled
from transformers import AutoConfig

from equipoise.models.hub import resolve_model
from equipoise.pipeline.readers import START_CURVE
from equipoise.store.shards import to_plain

RESULT = Path(__file__).with_name("results.json")
PAGE = DOCS / "smollm2.md"
JUDGES = ("optimization", "generalization")
METRICS = ("mp", "bt", "bt_neighbours", "leakage", "rmse", "range")
WINDOW = 200
"""Fresh examples per point of the curve."""

Json = Mapping[str, Any]


def run_point(name: str, data: str | None) -> Path:
    """Run one point, on the reference's pool and at its budget; the reference comes first."""
    reference = RUNS / REFERENCE
    overrides = {**POINTS[name], **(budget(name) if name in BRANCHES else {})}
    return execute(
        make_recipe(overrides, data),
        RUNS / name,
        source=reference if name != REFERENCE else None,
        shares=[stage for stage in POOL if overrides.get(stage) != "null"],
        text=False,
    )


def budget(name: str) -> dict[str, str]:
    """Return the steps in which a point reads as many tokens as the reference's tuning did.

    A token of the steered start goes through the layers up to that of the directions only, and
    counts as their share of all.
    """
    reference = RUNS / REFERENCE
    recipe = make_recipe({}, None)
    tokens = json.loads((reference / "tune" / START_CURVE).read_text())[-1]["tokens"]
    layers = AutoConfig.from_pretrained(resolve_model(recipe.model)).num_hidden_layers
    share = (_steering()["layer"] + 1) / layers
    row = row_lengths(reference).read(BRANCHES[name])
    return {"tune.steps": str(steps_within(share * tokens, recipe.tune.batch_size, row))}


def collect() -> dict[str, Any]:
    """Gather the finished points into one result; a point that is not there is left out."""
    reports = {
        name: read_report(RUNS / name)
        for name in POINTS
        if (RUNS / name / "report" / "report.json").exists()
    }
    best = reports[REFERENCE]
    methods = {name: method for point in reports for name, method in _methods(reports, point)}
    own = {name: _own(reports, point) for point in reports for name, _ in _methods(reports, point)}
    dials = methods[REFERENCE]
    tunings = {name: report for name, report in reports.items() if "tuned" in report["methods"]}
    curves = {n: r["losses"]["tuned"] for n, r in tunings.items() if "tuned" in r["losses"]}
    headline: dict[str, float | None] = {}
    for name, method in methods.items():
        headline |= _headline(name, method, own[name], best["recipe"]["levels"])
    headline |= _flat("best.perplexity_ratio", dials["quality"]["perplexity_ratio"])
    for name in ATTRIBUTES:
        headline[f"bound.{name}"] = best["pool"][name]["within_prompt_judge_correlation"]
    result: dict[str, Any] = to_plain(
        shaped(
            "python -m benchmarks.smollm2.run --data DIR",
            {key: None if value is None else round(value, 4) for key, value in headline.items()},
            seeds=[best["recipe"]["seed"]],
            interval="95 %, bootstrap over prompts; one seed",
            n=best["n"],
            intersections=best["intersections"],
            own={name: round(value, 4) for name, value in own.items()},
            bound="mean over prompts of the correlation between training reward and judge on the "
            "untouched model's own completions: what generalization can show",
            pool=best["pool"],
            reward_models={n: card.get("held_out") for n, card in best["reward_models"].items()},
            steering=_steering(),
            **{
                key: {name: report[key] for name, report in reports.items()}
                for key in ("moec", "backdoor", "differences")
            },
            minutes={
                name: {"planned": report.get("planned"), "spent": report["stages"]}
                for name, report in reports.items()
            },
            tuning={
                name: {"recipe": report["recipe"]["tune"], "cost": methods[name]["cost"]}
                for name, report in tunings.items()
            },
            refusals={name: method.get("refusals") for name, method in methods.items()},
            fluency={name: method["quality"]["fluency"] for name, method in methods.items()},
            drift=dials["quality"].get("drift"),
            auto_mp={judge: dials[judge]["auto_mp"] for judge in JUDGES},
            response={judge: dials[judge]["response"] for judge in JUDGES},
            steered_start=best["losses"].get("steered start"),
            listening={
                name: list(listening(curve, reports[name]["recipe"]["tune"]))
                for name, curve in curves.items()
                if "preferred" in curve
            },
            likelihood={
                name: {key: curve[key] for key in ("asked", "counterfactual")}
                for name, curve in curves.items()
                if "counterfactual" in curve
            },
        )
    )
    return result


def _methods(reports: Mapping[str, Json], point: str) -> Iterator[tuple[str, Json]]:
    """Yield a point's methods; the tuned one under the point's name."""
    methods = reports[point]["methods"]
    names = ["start"] if point == REFERENCE else TRAINING_FREE.get(point, ())
    for name in names:
        yield name, methods[name]
    if "tuned" in methods:
        yield point, methods["tuned"]


def _own(reports: Mapping[str, Json], point: str) -> float:
    """Return what a point's fluency compares with: the untouched model's on its prompts, or all."""
    start = reports[point]["methods"].get("start") or reports[REFERENCE]["methods"]["start"]
    return float(start["quality"]["fluency_mean"]["value"])


def _headline(name: str, method: Json, own: float, levels: int) -> dict[str, float | None]:
    """Return the headline of one method.

    ``fluency_drop`` is how far outputs fall below the untouched model's own, in nats per token;
    its intervals are those of the outputs, and the untouched model's own mean is held fixed.
    """
    found: dict[str, float | None] = {}
    for judge in JUDGES:
        for metric in METRICS:
            for attribute, estimate in method[judge][metric].items():
                found |= _flat(f"{name}.{judge}.{metric}.{attribute}", estimate)
        found |= _flat(f"{name}.{judge}.coverage", method[judge]["coverage"])
    quality = method["quality"]
    found |= _flat(f"{name}.degenerate", quality["degenerate"])
    corners = [a * levels + b for a in (0, levels - 1) for b in (0, levels - 1)]
    worst = min((quality["fluency"][cell] for cell in corners), key=lambda one: float(one["value"]))
    for place, one in (("mean", quality["fluency_mean"]), ("worst_corner", worst)):
        drop = {"value": own - one["value"], "low": own - one["high"], "high": own - one["low"]}
        found |= _flat(f"{name}.fluency_drop.{place}", drop)
    return found


def listening(losses: Json, tune: Json) -> Iterator[dict[str, float]]:
    """Yield, per window of fresh examples, how often the asked cell was preferred; ½ = chance."""
    batch = int(tune["batch_size"])
    rows = [
        (step * batch, right)
        for step, right, epoch in zip(
            losses["step"], losses["preferred"], losses["epoch"], strict=True
        )
        if right is not None and right == right and epoch <= 1
    ]
    for start in range(0, int(rows[-1][0]) if rows else 0, WINDOW):
        window = [right for seen, right in rows if start < seen <= start + WINDOW]
        if window:
            yield {
                "examples": start + WINDOW,
                "preferred": sum(window) / len(window),
                "looked_at": len(window) * batch,
            }


def _steering() -> dict[str, Any]:
    stage = RUNS / REFERENCE / "steer"
    return {**read(stage / "directions" / "directions.json"), **read(stage / "strengths.json")}


def _flat(key: str, estimate: Json) -> dict[str, float | None]:
    return {key: estimate["value"], f"{key}.low": estimate["low"], f"{key}.high": estimate["high"]}


def main() -> None:
    """Run what is missing, then write ``results.json`` and what the page shows of it."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="folder of the sources")
    parser.add_argument("--only", choices=(*POINTS, "collect", "page"))
    arguments = parser.parse_args()
    for name in POINTS:
        if arguments.only in (None, name):
            run_point(name, arguments.data)
    if arguments.only in (None, "collect"):
        write(RESULT, collect())
    if arguments.only in (None, "collect", "page"):
        result = read(RESULT)
        PAGE.write_text(filled(PAGE.read_text("utf-8"), result, TABLES), "utf-8")
        draw(result, DOCS / "images")


if __name__ == "__main__":
    main()
