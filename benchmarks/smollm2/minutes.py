"""How long the evaluation of one method takes, alone on the machine.

    python -m benchmarks.smollm2.minutes --data DIR

Time depends on prompts, cells, lengths and the sizes of models and judges, not on how well these
were trained: what comes before is made short, and the evaluation is that of the recipe in full.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import fmean

from benchmarks.machine import processor
from benchmarks.rundirs import execute
from benchmarks.smollm2.points import POINTS, RUNS, make_recipe

from equipoise.store.rundir import RunDir
from equipoise.types import Delivery

RESULT = Path(__file__).with_name("minutes.json")
METHOD = "steering"
ROWS_PER_SOURCE = 150
SHORT = {
    **{f"prompts.train.{i}.limit": "16" for i in range(4)},
    "prompts.n_dev": "8",
    "generate.completions_per_prompt": "6",
}


def main() -> None:
    """Make what comes before, evaluate, and write how long that took."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="folder of the sources")
    data = parser.parse_args().data
    changes = {**POINTS[METHOD], **SHORT}
    for name, fitted in make_recipe({}, data).fit_reward.items():
        changes[f"fit_reward.{name}.held_out"] = "60"
        for i in range(len(fitted.sources)):
            changes[f"fit_reward.{name}.sources.{i}.limit"] = str(ROWS_PER_SOURCE)
    recipe = make_recipe(changes, data)
    folder = execute(recipe, RUNS / "minutes", text=False, until="evaluate")
    with RunDir.open(folder, recipe) as run:
        minutes = run.minutes()["evaluate"]
        shards = run.done("evaluate").read_rows(Delivery, prefix=f"deliveries/{METHOD}/")
        rows = [row for shard in shards for row in shard]
    result = {
        "made_by": "python -m benchmarks.smollm2.minutes --data DIR",
        "method": METHOD,
        "minutes": round(minutes, 2),
        "prompts": len({row.prompt_id for row in rows}),
        "cells": len({row.setting for row in rows}),
        "completions": len(rows),
        "tokens_per_completion": round(fmean(row.n_tokens for row in rows), 1),
        "fluency_prompts": recipe.evaluate.fluency_prompts,
        "threads": json.loads((folder / "machine.json").read_text())["threads"],
        "processor": processor(),
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
