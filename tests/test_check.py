"""`equipoise check`: what a newcomer is told of a model, and the exit status for scripts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from benchmarks.architectures import config_of, tokenizer
from benchmarks.lora import Cell, make_base, tune_cell
from safetensors.torch import load_file, save_file

from equipoise import save_dial_model
from equipoise.check.model import check_model
from equipoise.check.trial import PARTS
from equipoise.cli.main import main
from equipoise.tune.rehearsal import small_base


def run(*arguments: str) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["check", *arguments])
    return int(ended.value.code or 0)


@pytest.fixture(scope="module")
def untied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_base(Cell(False, 64, "clm"), tmp_path_factory.mktemp("check") / "untied")


def test_a_model_that_works_is_told_so_with_what_it_is(
    untied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(str(untied)) == 0
    lines = filter(None, capsys.readouterr().out.splitlines())
    told = {line[:15].strip(): line[16:] for line in lines}
    assert told["architecture"].startswith("llama, 2 layers")
    assert told["head"] == "apart from the embedding; 1,088 rows for 1,024 tokens"
    assert told["context"] == "256 positions"
    assert told["ends"] == "<|end|> (1)"
    assert told["lora targets"].split(", ")[0] == "down_proj" and "lm_head" not in told.values()
    assert all(told[part] == "works" for part in PARTS)


def test_a_tied_head_a_window_and_memory_are_said(tmp_path: Path) -> None:
    base = small_base(config_of("gemma3_text"), tokenizer(), tmp_path / "base")
    found = check_model(str(base))
    assert found.facts.head.startswith("tied to") and "windows of" in found.facts.context
    assert "full tuning" in found.facts.memory and found.works


def test_an_architecture_that_is_not_supported_fails_with_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of("bloom")
    config.hidden_size, config.n_layer, config.n_head = 32, 2, 2
    config.save_pretrained(tmp_path / "bloom")
    tokenizer().save_pretrained(tmp_path / "bloom")
    assert run(str(tmp_path / "bloom"), "--json") == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["works"]
    assert all("ALiBi" in found["parts"][part] for part in PARTS)
    assert found["parts"]["weights"]  # there are none


def test_weights_that_are_not_those_of_the_config_fail_unread(untied: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for file in untied.iterdir():
        (broken / file.name).write_bytes(file.read_bytes())
    weights = load_file(broken / "model.safetensors")
    save_file(
        {name: value for name, value in weights.items() if "layers.1" not in name},
        broken / "model.safetensors",
    )
    found = check_model(str(broken))
    assert not found.works and found.trials[0].problem is not None
    assert [t.part for t in found.trials if t.problem is not None] == ["weights"]


def test_a_lora_directory_is_checked_over_its_base(tmp_path: Path) -> None:
    cell = Cell(False, 0, "clm")
    tuned = tune_cell(cell, make_base(cell, tmp_path / "base"), tmp_path / "checkpoints")
    save_dial_model(tuned.model, tuned.tokenizer, tuned.manifest, tmp_path / "adapter")
    assert check_model(str(tmp_path / "adapter")).works


def test_a_wrong_name_is_a_clear_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("./nowhere") == 1
    assert "No model directory" in capsys.readouterr().err


@pytest.mark.parametrize("module", ["equipoise", "equipoise.cli.main"])
def test_the_command_is_a_module_too(module: str) -> None:
    done: Any = subprocess.run(
        [sys.executable, "-m", module, "check", "./nowhere"], capture_output=True, text=True
    )
    assert done.returncode == 1 and "No model directory" in done.stderr
