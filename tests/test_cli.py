"""The command line: fast help, one message per error, exit codes."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from equipoise.cli.main import app, main
from equipoise.pipeline.rundir import RunDir
from equipoise.pipeline.table import STAGES

HEAVY = ("torch", "transformers", "pyarrow", "datasets", "matplotlib", "sklearn", "trl", "peft")


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    out, err = capsys.readouterr()
    return int(caught.value.code or 0), out, err


@pytest.mark.parametrize(
    "command", [["--help"], ["stage", "--help"], ["stage", "tune", "--help"], ["recipes"]]
)
def test_nothing_heavy_is_imported_for_help(command: list[str]) -> None:
    program = (
        "import sys\n"
        "from equipoise.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as stop: assert not stop.code, stop.code\n"
        f"print('HEAVY', [name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *command], capture_output=True, text=True, timeout=60
    )
    assert done.stdout.rstrip().endswith("HEAVY []"), done.stdout + done.stderr


def test_help_names_every_stage(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(["stage", "--help"], capsys)
    assert code == 0
    for name, row in STAGES.items():
        assert f" {name} " in out
        assert row.help.split()[0] in out


TOP = 16
"""Commands at the top level: later work adds options, not commands."""


def test_the_top_level_stays_small() -> None:
    commands = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    assert {"run", "stage", "check", "report", "chat", "serve", "recipes", "doctor"} <= commands
    assert len(commands) <= TOP


@pytest.mark.parametrize("name", [name for name in STAGES if name != "report"])
def test_an_old_command_is_told_the_new_one(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run([name, "workshop", "--dir", "somewhere"], capsys)
    assert (code, out) == (2, "")
    assert err == f"error: `equipoise {name}` is now `equipoise stage {name}`\n"


def test_recipes_are_listed_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(["recipes"], capsys)
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == [
        "hub-8b",
        "smollm2-small",
        "smollm2",
        "workshop-fit",
        "workshop-rlhf",
        "workshop-start",
        "workshop",
    ]
    code, out, _ = run(["recipes", "workshop"], capsys)
    assert "name: workshop\n" in out


@pytest.mark.parametrize(
    "arguments",
    [["nonsense"], ["run"], ["run", "workshop", "--no-such-flag"], ["stage", "tune", "--dir"]],
)
def test_wrong_usage_exits_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = run(arguments, capsys)
    assert code == 2
    assert "error: " in err
    assert "Traceback" not in err


def test_a_user_error_is_one_message_and_exit_code_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, err = run(["run", "workshp", "--dir", str(tmp_path / "run")], capsys)
    assert (code, out) == (1, "")
    assert err.startswith("error: no recipe 'workshp'\n  why: ")
    assert "\n  fix: did you mean `workshop`?" in err
    assert not (tmp_path / "run").exists()


def test_a_fault_of_the_program_points_to_debug(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("by hand")

    monkeypatch.setattr(RunDir, "open", broken)
    arguments = ["run", "workshop", "--dir", str(tmp_path / "run")]
    code, _, err = run(arguments, capsys)
    assert code == 1
    assert "ZeroDivisionError: by hand" in err
    assert "run again with --debug" in err
    with pytest.raises(ZeroDivisionError):
        main([*arguments, "--debug"])


def test_an_interrupt_says_that_the_work_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(RunDir, "open", interrupted)
    code, _, err = run(["run", "workshop", "--dir", str(tmp_path / "run")], capsys)
    assert code == 130
    assert "interrupted" in err


def test_a_folder_that_is_no_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, err = run(["stage", "generate", str(tmp_path)], capsys)
    assert code == 1
    assert "cannot read the recipe of" in err


def test_doctor_passes_here(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(["doctor"], capsys)
    assert code == 0
    assert "torch" in out


@pytest.mark.parametrize("module", ["equipoise", "equipoise.cli.main"])
def test_the_package_runs_as_a_module(module: str) -> None:
    command = [sys.executable, "-m", module, "recipes"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "workshop" in done.stdout


def test_what_the_outputs_encoding_lacks_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("# caf\u00e9 \u2603 \ufffd\n", "utf-8")
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="cp1252", write_through=True))
    with pytest.raises(SystemExit) as ended:
        main(["recipes", str(recipe)])
    assert not ended.value.code
    assert raw.getvalue() == "# caf\u00e9 ? ?\n".encode("cp1252")


def test_a_run_directory_in_place_of_a_model_is_pointed_to_its_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run/recipe.json").write_text("{}")
    for command in (["chat"], ["serve", "--policy", "example"]):
        code, _, err = run([*command, str(tmp_path / "run")], capsys)
        assert code == 1
        assert "is a run directory, not a model" in err
        assert str(tmp_path / "run/tune/model") in err


NOISE = """
import logging, sys, warnings
from equipoise.cli.main import main
from equipoise.pipeline.runner import quieten
try: main(["recipes"])
except SystemExit: pass
quieten()
import huggingface_hub
logging.getLogger("huggingface_hub.utils").warning("Retrying in 1s")
code = 'import warnings; warnings.warn("will be renamed", FutureWarning)'
for name in ("transformers.x", "mine"):
    exec(code, {"__name__": name, "__builtins__": __builtins__})
"""


def test_libraries_say_things_once_or_not_at_all() -> None:
    command = [sys.executable, "-c", NOISE]
    err = subprocess.run(command, capture_output=True, text=True, timeout=60).stderr
    assert err.count("Retrying in 1s") == 1
    assert err.count("will be renamed") == 1  # ours would stay
