"""Killed at any flush or rename and run again, a stage ends in the same hashes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from equipoise.pipeline.rundir import RunDir
from equipoise.pipeline.runner import run_stage
from equipoise.progress import Progress
from equipoise.recipes.load import load_recipe
from pipeline_kit import save_assets, tiny_recipe, write_recipe

DRIVER = Path(__file__).with_name("crash_driver.py")
BEFORE = ("prompts", "generate", "score", "steer", "regenerate", "distil")
POINTS = {"generate": 10, "score": 10, "steer": 5, "regenerate": 5, "tune": 10}
LIMIT_S = 900
"""Of all stages together: one process tries them all."""


@pytest.fixture(scope="module")
def distilled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with every stage before ``tune`` complete."""
    root = tmp_path_factory.mktemp("resume")
    plain = tiny_recipe(save_assets(root / "assets"))
    plain["prompts"]["n_dev"] = 1
    plain["steer"] = {"strengths": [2], "max_fluency_drop": None}
    plain["regenerate"] = {"steered_per_prompt": 6}
    recipe = load_recipe(str(write_recipe(root / "tiny.yaml", plain)))
    with RunDir.open(root / "run", recipe) as run:
        for stage in BEFORE:
            run_stage(stage, run, progress=Progress(quiet=True))
    return root / "run"


@pytest.fixture(scope="module")
def found(distilled: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What the driver found, by stage."""
    points = [f"{stage}={count}" for stage, count in POINTS.items()]
    work = tmp_path_factory.mktemp("killed")
    done = subprocess.run(
        [sys.executable, str(DRIVER), str(distilled), str(work), *points],
        capture_output=True,
        text=True,
        timeout=LIMIT_S - 20,
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
    )
    print(done.stderr, file=sys.stderr)
    assert done.returncode == 0
    by_stage: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return by_stage


@pytest.mark.timeout(LIMIT_S)
@pytest.mark.parametrize("stage", list(POINTS))
def test_killed_and_run_again_ends_in_the_same_hashes(found: dict[str, Any], stage: str) -> None:
    assert found[stage]["wrong"] == []
    assert found[stage]["killed"] == POINTS[stage]
    assert found[stage]["outputs"] >= 4
