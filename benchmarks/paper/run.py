"""The study of the paper's claims: every method over seeds at equal tokens, ablations, the rewind.

    python -m benchmarks.paper.run                   # all of it; resumes where it was stopped
    python -m benchmarks.paper.run --quick           # two seeds, fewer prompts, methods only
    python -m benchmarks.paper.run --only ablations  # or: methods, rewind, collect

A seed re-draws prompts, pool and tuning, and trains the shipped reward models on with fresh pairs.
What was chosen was chosen on dev prompts; test prompts are read here. Run directories lie in
``runs/paper``; the result of each finished seed is written to ``benchmarks/paper/results`` at once,
and a seed that lies there is not run again (delete its file to do so). ``--only collect`` trains
nothing: it makes ``results.json`` and the tables of ``docs/paper-study.md`` anew from the seeds
that are there. ``--quick`` writes below ``runs/paper-quick`` and leaves all of that alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from benchmarks.paper.points import (
    ABLATION_SEEDS,
    FULL,
    QUICK,
    REWIND_SEEDS,
    Scale,
)
from benchmarks.paper.rewinding import run_rewind
from benchmarks.paper.runs import run_ablations, run_methods
from benchmarks.paper.study import build
from benchmarks.paper.tables import TABLES
from benchmarks.results import DOCS, agreed, here, read, shaped, write
from benchmarks.tables import filled

from equipoise.store.shards import to_plain

HERE = Path(__file__).parent
PAGE = DOCS / "paper-study.md"
PARTS = ("methods", "ablations", "rewind")


def place_of(scale: Scale) -> Path:
    """Return where a scale's result goes: only that of the whole study is committed."""
    return HERE if scale is FULL else scale.runs


def run_part(scale: Scale, part: str, seed: int) -> None:
    """Run one part of one seed, unless its result is there."""
    file = place_of(scale) / "results" / f"{part}-seed{seed}.json"
    if not file.exists():
        run = {"methods": run_methods, "ablations": run_ablations, "rewind": run_rewind}[part]
        write(file, to_plain({**here(), **run(scale, seed)}), indent=None)


def collect(scale: Scale) -> dict[str, Any]:
    """Write ``results.json`` and the tables of the docs from the seeds that are there."""
    folder = place_of(scale) / "results"
    found = {
        part: [read(file) for file in sorted(folder.glob(f"{part}-seed*.json"))] for part in PARTS
    }
    if not found["methods"]:
        raise SystemExit(f"no finished seed in {folder}; run without --only collect first")
    study: dict[str, Any] = to_plain(gathered(found))
    write(place_of(scale) / "results.json", study)
    if scale is FULL:
        PAGE.write_text(filled(PAGE.read_text("utf-8"), study, TABLES), "utf-8")
    return study


def gathered(found: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Return the study of the seeds' results."""
    study = build(*(found[part] for part in PARTS))
    made_at = agreed([one for part in PARTS for one in found[part]])
    return shaped("python -m benchmarks.paper.run", made_at=made_at, **study)


def main() -> None:
    """Run what is missing, then collect."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="two seeds, the methods only")
    which.add_argument("--only", choices=(*PARTS, "collect"))
    parser.add_argument("--seeds", type=int, nargs="*")
    arguments = parser.parse_args()
    scale = QUICK if arguments.quick else FULL
    usual = {"methods": scale.seeds, "ablations": ABLATION_SEEDS, "rewind": REWIND_SEEDS}
    only = "methods" if arguments.quick else arguments.only
    for part, seeds in usual.items():
        for seed in (arguments.seeds or seeds) if only in (None, part) else ():
            run_part(scale, part, seed)
    collect(scale)


if __name__ == "__main__":
    main()
