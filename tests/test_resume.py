"""Killed at any flush or rename and run again, a stage ends in the same hashes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from equipoise.pipeline import run_stage
from equipoise.progress import Progress
from equipoise.recipe_io import load_recipe
from equipoise.store.fingerprint import STAGES
from equipoise.store.rundir import RunDir
from pipeline_kit import save_assets, tiny_recipe, write_recipe

DRIVER = Path(__file__).with_name("crash_driver.py")
BEFORE = ("prompts", "generate", "score", "distil")
POINTS = 10


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with every stage before ``tune`` complete."""
    root = tmp_path_factory.mktemp("resume")
    recipe = write_recipe(root / "tiny.yaml", tiny_recipe(save_assets(root / "assets")))
    with RunDir.open(root / "run", load_recipe(str(recipe))) as run:
        for stage in BEFORE:
            run_stage(stage, run, progress=Progress(quiet=True))
    return root / "run"


@pytest.mark.parametrize("stage", ["generate", "score", "tune"])
def test_killed_and_run_again_ends_in_the_same_hashes(
    distilled: Path, tmp_path: Path, stage: str
) -> None:
    base = tmp_path / "base"
    shutil.copytree(distilled, base)
    for later in STAGES[STAGES.index(stage) :]:
        shutil.rmtree(base / later, ignore_errors=True)
    (tmp_path / "work").mkdir()
    done = subprocess.run(
        [sys.executable, str(DRIVER), str(base), str(tmp_path / "work"), stage, str(POINTS)],
        capture_output=True,
        text=True,
        timeout=280,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["wrong"] == [], done.stderr
    assert found["killed"] == POINTS
    assert found["outputs"] >= 4
