"""Choices on dev prompts: each candidate tuned on seed 0's pool, measured on its dev prompts only.

    python -m benchmarks.workshop.dev NAME [KEY=VALUE ...]     # e.g. rlhf tune.rlhf.beta=0.05

NAME is an objective of ``benchmarks.paper.points``. Seed 0's reference run must have been made
(``python -m benchmarks.workshop.run --only seeds``). Dev prompts are of the training split, so the
reward models are trained anew, once, without the pairs that share a prompt with them. A row is
added to ``dev.json``; test prompts are never read.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks.budget import row_lengths
from benchmarks.paper.points import FULL, OBJECTIVES, POOL, REFERENCE, slug
from benchmarks.paper.runs import make_recipe, steps_for, summary
from benchmarks.rundirs import execute, read_report

from equipoise.report.render import plain

ROWS = Path(__file__).parent / "dev.json"
METRICS = ("mp", "bt", "leakage", "range", "rmse")


UNSEEN = {
    "evaluate.split": "dev",
    **{f"fit_reward.{name}.leave_out_test": "true" for name in ("helpfulness", "safety")},
}


def main() -> None:
    """Tune one candidate and add its row."""
    name, *changes = sys.argv[1:]
    reference = FULL.runs / f"seed0-{REFERENCE}"
    tokens = summary(read_report(reference), "tuned")["cost"]["tuning_tokens"]
    begun = execute(
        make_recipe(FULL, 0, UNSEEN),
        FULL.runs / "seed0-dev",
        source=reference,
        shares=("prompts", "generate"),
        until="distil",
    )
    overrides = {
        **OBJECTIVES[name],
        **steps_for(name, tokens, row_lengths(begun), FULL),
        **dict(change.split("=", 1) for change in changes),
    }
    label = slug(" ".join(["seed0 dev", name, *(change.replace("=", "-") for change in changes)]))
    made = make_recipe(FULL, 0, {**UNSEEN, **overrides})
    # Directions are an input of the distilled set.
    shares = POOL if made.steer is None else POOL[:-1]
    folder = execute(made, FULL.runs / label, source=begun, shares=shares)
    report = read_report(folder)
    found = summary(report, "tuned")
    row = {
        "world": "care and help untied",
        "name": name,
        "overrides": overrides,
        "n_prompts": report["recipe"]["prompts"]["n_dev"],
        "tuning_tokens": found["cost"]["tuning_tokens"],
        **{
            judge: {metric: found[judge][metric] for metric in METRICS}
            for judge in ("optimization", "generalization")
        },
    }
    if name == "rlhf":
        row["probes"] = probes(json.loads((folder / "tune" / "curve.json").read_text()))
    stored = json.loads(ROWS.read_text())
    stored["rows"].append(plain(row))
    ROWS.write_text(json.dumps(stored, indent=1) + "\n")
    for judge in ("optimization", "generalization"):
        print(
            judge, {m: {a: round(v["value"], 3) for a, v in row[judge][m].items()} for m in METRICS}
        )


def probes(curve: list[dict[str, float]]) -> list[dict[str, float]]:
    """Return every look at both judges, the first before the first online step."""
    looks: dict[float, dict[str, float]] = {}
    for row in curve:
        if not row["warm_start"]:
            found = {k.removeprefix("probe_"): v for k, v in row.items() if k.startswith("probe_")}
            looks[found["step"]] = {k: round(v, 4) for k, v in found.items()}
    return [looks[step] for step in sorted(looks)]


if __name__ == "__main__":
    main()
