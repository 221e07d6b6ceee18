"""Run a recipe in a bench's own run directory, and share what another run has already made."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from equipoise.config import Recipe
from equipoise.pipeline.runner import run_all, run_stage
from equipoise.store.fingerprint import STAGES, with_new_defaults
from equipoise.store.rundir import RunDir


def execute(
    made: Recipe,
    folder: Path,
    *,
    source: Path | None = None,
    shares: Sequence[str] = (),
    text: bool = True,
    until: str | None = None,
) -> Path:
    """Run all stages of a recipe, resuming where it was stopped; return the directory.

    Args:
        made: The recipe.
        folder: Its run directory.
        source: A run directory whose stages are copied before the first start.
        shares: Which of them.
        text: Whether the report shows prompts and completions.
        until: The last stage to run, if not all.
    """
    if source is not None and shares and not folder.exists():
        _copy(source, folder, shares)
    print(f"== {folder.name}", file=sys.stderr, flush=True)
    stored = folder / "recipe.json"
    # As the run directory compares: a stored recipe lacks options that came later.
    same = not stored.exists() or (
        with_new_defaults(json.loads(stored.read_text()), made) == made.model_dump(mode="json")
    )
    with RunDir.open(folder, made, fresh=not same) as opened:
        if until is None:
            run_all(opened, text=text)
        for name in STAGES[: STAGES.index(until) + 1] if until else ():
            run_stage(name, opened)
    return folder


def read_report(folder: Path) -> dict[str, Any]:
    """Return ``report.json`` of a run."""
    found: dict[str, Any] = json.loads((folder / "report" / "report.json").read_text())
    return found


def _copy(source: Path, folder: Path, shares: Sequence[str]) -> None:
    partial = folder.with_name(f".{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for stage in shares:
        if (source / stage).is_dir():
            shutil.copytree(source / stage, partial / stage)
    # No recipe.json: each stage's own fingerprint says whether the copy may be used.
    partial.rename(folder)
