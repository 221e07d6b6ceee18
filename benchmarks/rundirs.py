"""Run a recipe in a study's own run directory, share what another run has made, count tokens."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from equipoise.config import Recipe
from equipoise.encoding.encode import Encoder
from equipoise.models.hub import resolve_model
from equipoise.models.load import load_tokenizer
from equipoise.pipeline.rundir import RunDir
from equipoise.pipeline.runner import run_all
from equipoise.pipeline.stored import stored_recipe, with_new_defaults
from equipoise.store.stagefiles import StageFiles
from equipoise.types import ControlledExample


def execute(
    made: Recipe,
    folder: Path,
    *,
    source: Path | None = None,
    shares: Sequence[str] = (),
    text: bool = True,
) -> Path:
    """Run all stages of a recipe, resuming where it was stopped; return the directory.

    Args:
        made: The recipe.
        folder: Its run directory.
        source: A run directory whose stages are copied before the first start.
        shares: Which of them.
        text: Whether the report shows prompts and completions.
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
        run_all(opened, text=text)
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


@dataclass(frozen=True)
class RowLengths:
    """Mean tokens of what an example consists of: budgets are equal in tokens through the model."""

    prompt: float
    controls: float
    completion: float

    def read(self, branches: int = 1) -> float:
        """Return the tokens of one example with so many branches behind one prompt."""
        return self.prompt + branches * (self.controls + self.completion)


def row_lengths(folder: Path) -> RowLengths:
    """Return the lengths of the distilled set of a run."""
    recipe = stored_recipe(folder)
    encoder = Encoder(load_tokenizer(resolve_model(recipe.model)))
    # Read without the run's lock: the reference may still be at work on a later stage.
    examples = StageFiles(folder / "distil").read_shard("examples.parquet", ControlledExample)
    prompts = sum(len(encoder.prompt_ids(e.prompt.messages)) for e in examples)
    completions = sum(len(encoder.completion_ids(e.text, finished=e.finished)) for e in examples)
    return RowLengths(
        prompts / len(examples), float(len(recipe.attributes)), completions / len(examples)
    )


def steps_within(tokens: float, batch_size: int, row: float) -> int:
    """Return how many steps of a method take as many tokens, one row of it having ``row``."""
    return max(1, round(tokens / (batch_size * row)))
