"""The study of the paper's claims: every method over seeds at equal tokens, ablations, the rewind.

    python -m benchmarks.paper.run                   # all of it; resumes where it was stopped
    python -m benchmarks.paper.run --quick           # two seeds, fewer prompts, methods only
    python -m benchmarks.paper.run --only ablations  # or: methods, rewind, collect
    python -m benchmarks.paper.run --again rlhf --seeds 0 1  # one tuned method of finished seeds

A seed re-draws prompts, pool and tuning, and trains the shipped reward models on with fresh pairs.
What was chosen was chosen on dev prompts; test prompts are read here. Run directories lie in
``runs/paper``; the result of each finished seed is written to ``benchmarks/paper/results`` at once,
and a seed, or a point of the ablations, that lies there is not run again (delete its file to do
so). ``--only collect`` trains nothing: it makes ``results.json``, ``page.html`` and the tables of
``docs/paper-study.md`` anew from the seeds that are there. ``--quick`` writes below
``runs/paper-quick`` and leaves all of that alone.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.paper.page import render
from benchmarks.paper.points import (
    ABLATION_SEEDS,
    FULL,
    OBJECTIVES,
    QUICK,
    REFERENCE,
    REWIND_SEEDS,
    Scale,
    ablations,
)
from benchmarks.paper.study import build
from benchmarks.paper.tables import filled

from equipoise.report.render import plain

HERE = Path(__file__).parent
DOCS = HERE.parent.parent / "docs" / "paper-study.md"
PARTS = ("methods", "ablations", "rewind")
AGAIN = tuple(name for name in OBJECTIVES if name != REFERENCE)


def results_of(scale: Scale) -> Path:
    """Return the folder of a scale's results: only those of the whole study are committed."""
    return HERE / "results" if scale is FULL else scale.runs / "results"


def once(file: Path, make: Callable[[], dict[str, Any]]) -> None:
    """Make a result that is not there yet."""
    if not file.exists():
        write(file, make())


def write(file: Path, result: dict[str, Any]) -> None:
    """Write a result; it appears whole or not at all."""
    text = json.dumps(plain(result), separators=(",", ":")) + "\n"
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(file)


def run_part(scale: Scale, part: str, seed: int) -> None:
    """Run one part of one seed, unless its result is there."""
    from benchmarks.paper.rewinding import run_rewind
    from benchmarks.paper.runs import run_ablations, run_methods

    file = results_of(scale) / f"{part}-seed{seed}.json"
    if part == "methods":
        once(file, lambda: run_methods(scale, seed))
    elif part == "rewind":
        once(file, lambda: run_rewind(scale, seed))
    else:
        # Each point is a run of its own: a point that came later is added.
        held = json.loads(file.read_text()) if file.exists() else {}
        write(file, run_ablations(scale, seed, ablations(), held))


def run_method_again(scale: Scale, seed: int, name: str) -> None:
    """Put a tuned method's new result in the place of its old one."""
    from benchmarks.paper.runs import run_again

    file = results_of(scale) / f"methods-seed{seed}.json"
    write(file, run_again(scale, seed, name, json.loads(file.read_text())))


def collect(scale: Scale) -> dict[str, Any]:
    """Write ``results.json``, ``page.html`` and the tables of the docs from the seeds there are."""
    folder = results_of(scale)
    found = {
        part: [json.loads(file.read_text()) for file in sorted(folder.glob(f"{part}-seed*.json"))]
        for part in PARTS
    }
    if not found["methods"]:
        raise SystemExit(f"no finished seed in {folder}; run without --only collect first")
    study: dict[str, Any] = plain(build(found["methods"], found["ablations"], found["rewind"]))
    place = HERE if scale is FULL else scale.runs
    (place / "results.json").write_text(json.dumps(study, indent=1) + "\n")
    (place / "page.html").write_text(render(study))
    if scale is FULL:
        DOCS.write_text(filled(DOCS.read_text("utf-8"), study), "utf-8")
    print(f"wrote {place / 'results.json'} and {place / 'page.html'}")
    return study


def main() -> None:
    """Run what is missing, then collect."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two seeds, fewer prompts")
    parser.add_argument("--only", choices=(*PARTS, "collect"))
    parser.add_argument("--again", choices=AGAIN, help="run this method of finished seeds again")
    parser.add_argument("--seeds", type=int, nargs="*")
    arguments = parser.parse_args()
    scale = QUICK if arguments.quick else FULL
    wanted: Sequence[str] = PARTS
    if arguments.only or arguments.quick:
        wanted = [arguments.only or "methods"]
    usual = {
        "methods": scale.seeds,
        "ablations": tuple(s for s in ABLATION_SEEDS if s in scale.seeds),
        "rewind": REWIND_SEEDS,
    }
    if arguments.again:
        for seed in arguments.seeds or scale.seeds:
            run_method_again(scale, seed, arguments.again)
        wanted = ()
    for part in wanted:
        for seed in (arguments.seeds or usual[part]) if part in usual else ():
            run_part(scale, part, seed)
    collect(scale)


if __name__ == "__main__":
    main()
