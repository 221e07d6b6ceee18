"""The perplexity of the dials, all on auto, on the recipe's reference answers.

    python -m benchmarks.smollm2.references --data DIR   # after stage `tune` of the point `best`

The stage ``evaluate`` measures the same; this is for a run of which the rest is known already.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from benchmarks.machine import processor
from benchmarks.smollm2.points import POINTS, REFERENCE, RUNS, make_recipe

from equipoise.models.load import load_causal
from equipoise.pipeline.job import Job
from equipoise.progress import Progress
from equipoise.stages.quality_of import perplexity_of
from equipoise.store.rundir import RunDir

RESULT = Path(__file__).with_name("references.json")


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", help="folder of the sources")
    recipe = make_recipe(POINTS[REFERENCE], parser.parse_args().data)
    with RunDir.open(RUNS / REFERENCE, recipe) as run:
        job = Job(run=run, progress=Progress(), fresh=False, text=False)
        found = perplexity_of(job, [], {}, load_causal(recipe.model))
    result = {
        "made_by": "python -m benchmarks.smollm2.references --data DIR",
        "processor": processor(),
        "sources": [source.source for source in recipe.evaluate.references],
        "n": sum(source.limit or 0 for source in recipe.evaluate.references),
        "interval": "95 %, bootstrap over references; the ratio paired",
        **found,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
