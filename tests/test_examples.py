"""The examples: they load, and run with tiny numbers on the packaged models."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from equipoise.config import TuneConfig
from equipoise.dials.manifest import read_manifest
from equipoise.pool.score import shortened
from equipoise.types import Completion, ScoredCompletion
from equipoise.worlds.workshop.shipped import ASSETS, asset

EXAMPLES = Path(__file__).parent.parent / "examples"
needs_models = pytest.mark.skipif(
    not all((asset(name) / "model.safetensors").is_file() for name in ASSETS),
    reason="the packaged Workshop models are not here: run `python -m benchmarks.workshop.bake`",
)


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("name", sorted(file.stem for file in EXAMPLES.glob("*.py")))
def test_an_example_loads_and_says_how_to_run_it(name: str) -> None:
    module = load(name)
    assert callable(module.main)
    assert f"python examples/{name}.py" in (module.__doc__ or "")


@needs_models
def test_the_paper_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    paper = load("paper")
    small = {
        "N_TRAIN": 10,
        "N_TEST": 2,
        "COMPLETIONS_PER_PROMPT": 8,
        "TUNING": TuneConfig(steps=3, batch_size=4, dtype="float32"),
    }
    for name, value in small.items():
        monkeypatch.setattr(paper, name, value)
    score, pools = paper.score, []

    def noted(completions: list[Completion], *rest: Any) -> Iterator[list[ScoredCompletion]]:
        pools.append(completions)
        return score(completions, *rest)

    monkeypatch.setattr(paper, "score", noted)
    paper.main()
    by_reward_models, by_judges = pools
    assert by_reward_models == by_judges
    assert by_judges == shortened(by_judges), "cut texts, which a sweep never scores"
    out = capsys.readouterr().out
    assert "pool: 80 completions of 10 prompts" in out
    assert "start: MP helpfulness" in out
    assert "tuned: MP helpfulness" in out
    assert out.count("(4, 0): ") == 2


@needs_models
def test_any_model_is_dialled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = (
        "--helpfulness workshop://rm_helpfulness --safety workshop://rm_safety "
        "--prompts workshop://train --limit 8 --completions 8 --max-tokens 48 --steps 2 "
        "--batch-size 4 --out"
    )
    out = tmp_path / "dialled"
    load("dial_any_model").main(["workshop://start", *options.split(), str(out)])
    manifest = read_manifest(out)
    assert manifest is not None
    assert manifest.attributes == ("helpfulness", "safety")
    assert "saved in" in capsys.readouterr().out
