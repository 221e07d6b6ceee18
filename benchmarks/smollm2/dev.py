"""Choices on dev prompts: a candidate tuned on the study's pool, measured on its dev prompts only.

    python -m benchmarks.smollm2.dev --data DIR NAME [KEY=VALUE ...]   # e.g. far tune.steps=60

The pool of ``benchmarks.smollm2.run`` is used; NAME is only a label. The first figure to look at is
printed first: on examples that tuning has not shown before, how often is the asked cell preferred?
A row is added to ``dev.json``; test prompts are never read.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.rundirs import execute, read_report
from benchmarks.smollm2.points import ATTRIBUTES, POOL, REFERENCE, RUNS, make_recipe
from benchmarks.smollm2.run import JUDGES, listening

from equipoise.report.render import plain

TAIL = 20
"""Steps whose likelihood given the asked setting is averaged."""
ROWS = Path(__file__).parent / "dev.json"
DEV = {
    "evaluate.split": "dev",
    "evaluate.max_prompts": "16",
    "evaluate.auto_sweep": "false",
    "evaluate.fluency_prompts": "8",
    "evaluate.responders": "[tuned]",
}


def main() -> None:
    """Tune one candidate and add its row."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="folder of the sources")
    parser.add_argument("--look", action="store_true", help="tune only, and look at the curve")
    parser.add_argument("name")
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    changes = dict(change.split("=", 1) for change in arguments.changes)
    recipe = make_recipe({**DEV, **changes}, arguments.data)
    folder = execute(
        recipe,
        RUNS / f"dev-{arguments.name}",
        source=RUNS / REFERENCE,
        shares=POOL,
        text=False,
        until="tune" if arguments.look else None,
    )
    row: dict[str, Any] = {
        "name": arguments.name,
        "overrides": changes,
        "tune": recipe.tune.model_dump(mode="json"),
    }
    rows = json.loads((folder / "tune" / "curve.json").read_text())
    if rows:
        curve = {key: [row[key] for row in rows] for key in rows[0]}
        row["examples"] = recipe.tune.steps * recipe.tune.batch_size
        row["listening"] = list(listening(curve, recipe.tune.model_dump()))
        row["asked"] = float(np.mean(curve["asked"][-TAIL:]))
        print("listening", [round(window["preferred"], 2) for window in row["listening"]])
    if not arguments.look:
        row |= measured(read_report(folder))
    stored = json.loads(ROWS.read_text()) if ROWS.exists() else []
    ROWS.write_text(json.dumps(plain([*stored, row]), indent=1) + "\n")


def measured(report: dict[str, Any]) -> dict[str, Any]:
    """Print and return what a candidate does on dev prompts."""
    tuned = report["methods"]["tuned"]
    found = {
        "n_prompts": tuned["generalization"]["n_prompts"],
        "kept": report["moec"]["n_kept"],
        "fluency": tuned["quality"]["fluency"],
        "fluency_mean": tuned["quality"]["fluency_mean"],
        "degenerate": tuned["quality"]["degenerate"],
        **{
            judge: {metric: tuned[judge][metric] for metric in ("mp", "bt", "leakage", "range")}
            for judge in JUDGES
        },
        "minutes": report["stages"],
    }
    for judge in JUDGES:
        for metric, values in found[judge].items():
            print(judge, metric, {name: _written(values[name]) for name in ATTRIBUTES})
    print("degenerate", found["degenerate"]["value"], "fluency", found["fluency_mean"]["value"])
    return found


def _written(estimate: dict[str, float]) -> str:
    return f"{estimate['value']:.2f} ({estimate['low']:.2f} to {estimate['high']:.2f})"


if __name__ == "__main__":
    main()
