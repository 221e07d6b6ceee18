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

from benchmarks.rundirs import execute, read_report
from benchmarks.smollm2.points import ATTRIBUTES, POOL, REFERENCE, RUNS, make_recipe
from benchmarks.smollm2.run import JUDGES, listening

from equipoise.evaluate.report import plain

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
    parser.add_argument("name")
    parser.add_argument("changes", nargs="*", metavar="KEY=VALUE")
    arguments = parser.parse_args()
    changes = dict(change.split("=", 1) for change in arguments.changes)
    folder = execute(
        make_recipe({**DEV, **changes}, arguments.data),
        RUNS / f"dev-{arguments.name}",
        source=RUNS / REFERENCE,
        shares=POOL,
        text=False,
    )
    report = read_report(folder)
    tuned = report["methods"]["tuned"]
    row = {
        "name": arguments.name,
        "overrides": changes,
        "n_prompts": tuned["generalization"]["n_prompts"],
        "examples": report["recipe"]["tune"]["steps"] * report["recipe"]["tune"]["batch_size"],
        "kept": report["moec"]["n_kept"],
        "listening": list(listening(report["losses"]["tuned"], report["recipe"]["tune"])),
        "fluency": tuned["quality"]["fluency"],
        "fluency_mean": tuned["quality"]["fluency_mean"],
        "degenerate": tuned["quality"]["degenerate"],
        **{
            judge: {metric: tuned[judge][metric] for metric in ("mp", "bt", "leakage", "range")}
            for judge in JUDGES
        },
        "minutes": report["stages"],
    }
    stored = json.loads(ROWS.read_text()) if ROWS.exists() else []
    ROWS.write_text(json.dumps(plain([*stored, row]), indent=1) + "\n")
    print("listening", [round(window["preferred"], 2) for window in row["listening"]])
    for judge in JUDGES:
        for metric, values in row[judge].items():
            print(judge, metric, {name: _written(values[name]) for name in ATTRIBUTES})
    print("degenerate", row["degenerate"]["value"], "fluency", row["fluency_mean"]["value"])


def _written(estimate: dict[str, float]) -> str:
    return f"{estimate['value']:.2f} ({estimate['low']:.2f} to {estimate['high']:.2f})"


if __name__ == "__main__":
    main()
