"""Dials on a real model: every method on SmolLM2-135M-Instruct, with plan, cost and curves.

    equipoise fetch smollm2
    python -m benchmarks.smollm2.run --data DIR              # all of it; resumes where it stopped
    python -m benchmarks.smollm2.run --data DIR --only clm   # one point of points.py, or: collect
    python -m benchmarks.smollm2.run --only add              # points that the result lacks
    python -m benchmarks.smollm2.run --only references       # puts references.json into the result

DIR is the folder of ``docs/real-models.md``. One seed, one pool for all points; what was chosen was
chosen on dev prompts (``dev.py``), the test prompts are read here. Run directories lie in
``runs/smollm2``; ``results.json`` and ``report/`` hold no text of any prompt or completion. ``add``
is for points that ran elsewhere, on a pool made anew by the same recipe: its facts are kept beside.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.budget import row_lengths, steps_within
from benchmarks.machine import processor
from benchmarks.rundirs import execute, read_report
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
from transformers import AutoConfig

from equipoise.models.load import resolve_model
from equipoise.report.render import plain, render
from equipoise.stages.tune import START_CURVE

HERE = Path(__file__).parent
RESULT = HERE / "results.json"
REFERENCES = HERE / "references.json"
RATIO = "best.perplexity_ratio"
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


def finished() -> dict[str, Json]:
    """Return the reports of the points that are there."""
    return {
        name: read_report(RUNS / name)
        for name in POINTS
        if (RUNS / name / "report" / "report.json").exists()
    }


def merged(reports: Mapping[str, Json]) -> dict[str, Any]:
    """Return one report of all methods, the reference's dials as ``tuned``."""
    methods = {"tuned" if name == REFERENCE else name: method for name, method in _methods(reports)}
    losses = dict(_curves(reports))
    return {**reports[REFERENCE], "methods": methods, "losses": losses}


def collect(reports: Mapping[str, Json]) -> dict[str, Any]:
    """Gather the finished points into one result; a point that is not there is left out."""
    best = reports[REFERENCE]
    quality = best["methods"]
    own = quality["start"]["quality"]["fluency_mean"]["value"]
    found = sections(reports, own)
    ratio = _flat(RATIO, quality["tuned"]["quality"]["perplexity_ratio"])
    found["headline"] |= {key: _rounded(value) for key, value in ratio.items()}
    if not best["recipe"]["evaluate"].get("references"):
        # Such a run read the untouched model's own answers.
        found["headline"] = with_references(found["headline"], json.loads(REFERENCES.read_text()))
    for attribute in ATTRIBUTES:
        bound = best["pool"][attribute]["within_prompt_judge_correlation"]
        found["headline"][f"bound.{attribute}"] = _rounded(bound)
    return plain(
        {
            "made_by": "python -m benchmarks.smollm2.run --data DIR",
            "machine": {"processor": processor(), "system": platform.system()},
            "interval": "95 %, bootstrap over prompts; one seed",
            "n": best["n"],
            "intersections": best["intersections"],
            "headline": found.pop("headline"),
            "bound": "mean over prompts of the correlation between training reward and judge on "
            "the untouched model's own completions: what generalization can show",
            "pool": best["pool"],
            "reward_models": {
                name: card.get("held_out") for name, card in best["reward_models"].items()
            },
            "steering": _steering(),
            **found,
            "drift": quality["tuned"]["quality"].get("drift"),
            "auto_mp": {j: quality["tuned"][j]["auto_mp"] for j in JUDGES},
            "steered_start": best["losses"].get("steered start"),
        }
    )


def with_references(headline: Json, references: Json) -> dict[str, Any]:
    """Return a headline whose perplexity ratio is the one on reference answers.

    The ratio on the untouched model's own answers, which the headline held, stays under another
    key. Doing it twice changes nothing more.

    Args:
        headline: Of a run whose recipe named no references.
        references: Content of ``references.json``.
    """
    own = {key: value for key, value in headline.items() if key.startswith(f"{RATIO}_own")} or {
        f"{RATIO}_own{key.removeprefix(RATIO)}": value
        for key, value in headline.items()
        if key.startswith(RATIO)
    }
    ratio = _flat(RATIO, references["tuned"]["perplexity_ratio"])
    return {**headline, **{key: _rounded(value) for key, value in ratio.items()}, **own}


def added(result: Json, reports: Mapping[str, Json]) -> dict[str, Any]:
    """Return a result with the points that it lacks, and with the facts of their own pool."""
    missing = {name: report for name, report in reports.items() if name not in result["moec"]}
    new = plain(sections(missing, result["own"]["start"]))
    pools = {name: plain(report["pool"]) for name, report in missing.items()}
    return {
        **result,
        **{key: {**result[key], **section} for key, section in new.items()},
        "added": {**result.get("added", {}), **pools},
    }


def sections(reports: Mapping[str, Json], own: float) -> dict[str, dict[str, Any]]:
    """Return what a result holds per point or method.

    Args:
        reports: By point.
        own: Mean log-likelihood per token of the untouched model's own outputs, for points that
            did not evaluate it on their prompts themselves.
    """
    found = dict(_methods(reports))
    headline: dict[str, float] = {}
    for key, estimate in _estimates(found):
        headline |= _flat(key, estimate)
    levels = make_recipe({}, None).levels
    owns = dict(_owns(reports, own))
    for name, method in found.items():
        headline |= _fluency(name, method["quality"], owns[name], levels)
    return {
        "headline": {key: _rounded(value) for key, value in headline.items()},
        "own": {name: _rounded(value) for name, value in owns.items()},
        "moec": {name: report["moec"] for name, report in reports.items()},
        "backdoor": {name: report["backdoor"] for name, report in reports.items()},
        "minutes": {
            name: {"planned": report.get("planned"), "spent": report["stages"]}
            for name, report in reports.items()
        },
        "tuning": {
            name: {"recipe": report["recipe"]["tune"], "cost": _cost(report, "tuned")}
            for name, report in reports.items()
            if "tuned" in report["methods"]
        },
        "refusals": {name: method.get("refusals") for name, method in found.items()},
        "fluency": {name: method["quality"]["fluency"] for name, method in found.items()},
        "listening": {
            name: list(listening(curve, reports[name]["recipe"]["tune"]))
            for name, curve in _curves(reports)
            if "preferred" in curve
        },
        "differences": {name: report["differences"] for name, report in reports.items()},
    }


def _curves(reports: Mapping[str, Json]) -> Iterator[tuple[str, Json]]:
    """Yield the tuning curves: of the steered start under its own name, else by point."""
    for point, report in reports.items():
        for name, curve in report["losses"].items():
            if "tuned" in report["methods"]:
                yield point if name == "tuned" else name, curve


def _methods(reports: Mapping[str, Json]) -> Iterator[tuple[str, Json]]:
    """Yield every method of the bench; the tuned ones under their point's name."""
    if REFERENCE in reports:
        yield "start", reports[REFERENCE]["methods"]["start"]
    for point, names in TRAINING_FREE.items():
        for name in names if point in reports else ():
            yield name, reports[point]["methods"][name]
    for name, report in reports.items():
        if "tuned" in report["methods"]:
            yield name, report["methods"]["tuned"]


def _owns(reports: Mapping[str, Json], own: float) -> Iterator[tuple[str, float]]:
    """Yield per method of the bench what its fluency compares with: its prompts' own answers."""
    for point, report in reports.items():
        start = report["methods"].get("start")
        here = start["quality"]["fluency_mean"]["value"] if start else own
        for name, _ in _methods({point: report}):
            yield name, here


def _estimates(found: Mapping[str, Json]) -> Iterator[tuple[str, Json]]:
    for name, method in found.items():
        for judge in JUDGES:
            for metric in METRICS:
                for attribute in ATTRIBUTES:
                    yield f"{name}.{judge}.{metric}.{attribute}", method[judge][metric][attribute]
            yield f"{name}.{judge}.coverage", method[judge]["coverage"]
        yield f"{name}.degenerate", method["quality"]["degenerate"]


def _fluency(name: str, quality: Json, own: float, levels: int) -> dict[str, float]:
    """Return how far outputs fall below the untouched model's own, in nats per token.

    The intervals are those of the outputs; the untouched model's own mean is held fixed.
    """
    cells = quality["fluency"]
    corners = [cells[a * levels + b] for a in (0, levels - 1) for b in (0, levels - 1)]
    worst = min(corners, key=lambda cell: float(cell["value"]))
    headline: dict[str, float] = {}
    for place, found in (("mean", quality["fluency_mean"]), ("worst_corner", worst)):
        drop = {"value": own - found["value"], "low": own - found["high"]}
        headline |= _flat(f"{name}.fluency_drop.{place}", {**drop, "high": own - found["low"]})
    return headline


def listening(losses: Json, tune: Json) -> Iterator[dict[str, float]]:
    """Yield, per window of fresh examples, how often the asked cell was preferred; ½ is deaf."""
    batch = int(tune["batch_size"])
    rows = [
        (step * batch, right)
        for step, right, epoch in zip(
            losses["step"], losses["preferred"], losses["epoch"], strict=True
        )
        if right is not None and right == right and epoch <= 1
    ]
    last = int(rows[-1][0]) if rows else 0
    for start in range(0, last, WINDOW):
        window = [right for seen, right in rows if start < seen <= start + WINDOW]
        if window:
            yield {
                "examples": start + WINDOW,
                "preferred": sum(window) / len(window),
                "looked_at": len(window) * batch,
            }


def _steering() -> dict[str, Any]:
    stage = RUNS / REFERENCE / "steer"
    facts = json.loads((stage / "directions" / "directions.json").read_text())
    return {**facts, **json.loads((stage / "strengths.json").read_text())}


def _cost(report: Json, method: str) -> Json:
    cost: Json = report["methods"][method]["cost"]
    return cost


def _flat(key: str, estimate: Json) -> dict[str, float]:
    return {key: estimate["value"], f"{key}.low": estimate["low"], f"{key}.high": estimate["high"]}


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def main() -> None:
    """Run what is missing, then write ``results.json``."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="folder of the sources")
    parser.add_argument("--only", choices=(*POINTS, "collect", "add", "references"))
    arguments = parser.parse_args()
    for name in POINTS:
        if arguments.only in (None, name):
            run_point(name, arguments.data)
    if arguments.only in (None, "collect"):
        reports = finished()
        RESULT.write_text(json.dumps(collect(reports), indent=1) + "\n")
        page = render(merged(reports), HERE / "report", text=False)
        print(f"wrote {RESULT} and {page}")
    if arguments.only == "add":
        result = added(json.loads(RESULT.read_text()), finished())
        RESULT.write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {RESULT}: {', '.join(result['moec'])}")
    if arguments.only == "references":
        result = json.loads(RESULT.read_text())
        headline = with_references(result["headline"], json.loads(REFERENCES.read_text()))
        RESULT.write_text(json.dumps({**result, "headline": headline}, indent=1) + "\n")
        print(f"wrote {RESULT}: {RATIO} {headline[RATIO]}")


if __name__ == "__main__":
    main()
