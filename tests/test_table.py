"""The table of stages: the one list, what a stage may read, and who may import whom."""

from __future__ import annotations

import ast
import importlib
from pathlib import Path

import pytest

from equipoise.config import Recipe
from equipoise.pipeline.job import Job
from equipoise.pipeline.rundir import RunDir
from equipoise.pipeline.runner import run_stage
from equipoise.pipeline.spec import Also, Phase, StageSpec, UnlistedFieldError, view_of
from equipoise.pipeline.table import (
    MADE,
    ORDER,
    STAGES,
    inputs_of,
    read_fields,
    reads_of,
    with_later,
)
from equipoise.progress import Progress
from equipoise.store.stagedir import Stage
from test_store import recipe

SOURCE = Path(__file__).parent.parent / "src/equipoise"
BY_RLHF = recipe(tune={"objective": "rlhf"})


def test_inputs_stand_earlier_and_fields_exist() -> None:
    places = {name: place for place, name in enumerate(STAGES)}
    for name, row in STAGES.items():
        assert all(places[one] < places[name] for one in (*row.inputs, *row.also.inputs)), name
        for path in (*row.reads, *row.also.reads, *row.checks):
            field, _, part = path.partition(".")
            assert field in Recipe.model_fields, path
            assert not part or hasattr(getattr(recipe(), field), part), path
        assert row.optional is None or row.optional in Recipe.model_fields


@pytest.mark.parametrize("row", STAGES.values(), ids=lambda row: row.name)
def test_every_row_names_a_function_and_what_it_costs(row: StageSpec) -> None:
    module, _, function = row.where.partition(":")
    found = importlib.import_module(module)
    assert callable(getattr(found, function))
    assert hasattr(found, "cost") == row.planned


def test_a_stage_imports_no_other_stage_and_no_hidden_recipe() -> None:
    modules = {row.where.partition(":")[0] for row in STAGES.values()}
    for file in (SOURCE / "stages").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.ImportFrom):
                assert node.module not in modules, f"{file.name} imports {node.module}"
            # The run holds the whole recipe; a stage has the part that its row names.
            if isinstance(node, ast.Attribute) and node.attr == "recipe":
                assert ast.unparse(node.value) in ("job", "self"), f"{file.name}: {node.lineno}"


def test_no_stage_is_told_by_its_name_but_in_the_table() -> None:
    names = {*STAGES} - {"report"}  # also a package, and a folder
    for file in [*SOURCE.glob("pipeline/*.py"), *SOURCE.glob("cli/*.py"), *SOURCE.glob("store/*")]:
        if file.suffix != ".py" or file.name == "table.py":
            continue
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.Compare):
                told = {one.value for one in ast.walk(node) if isinstance(one, ast.Constant)}
                # To make every other stage possible, the prompts are loaded by `run`.
                assert not told & names - {"prompts"}, f"{file.name}: {node.lineno}"


def test_what_a_row_does_not_name_cannot_be_read() -> None:
    reads = ("seed", "score.batch_size", "evaluate.sampling", "evaluate.split")
    seen = view_of(recipe(), reads, stage="toy")
    assert (seen.seed, seen.score.batch_size, seen.evaluate.split) == (0, 64, "test")
    assert seen.evaluate.sampling == recipe().evaluate.sampling
    for read in ("seen.levels", "seen.score.calibration", "seen.evaluate", "seen.evaluate.repeats"):
        if read == "seen.evaluate":
            continue
        with pytest.raises(UnlistedFieldError, match=r"stage toy: recipe\..* pipeline/table\.py"):
            eval(read, {"seen": seen})
    assert view_of(recipe(), ("steer.layer",), stage="toy").steer is None


def toy(job: Job, stage: Stage) -> None:
    """Reads the seed, which its row names, and the levels, which it does not."""
    assert job.recipe.seed == 0
    stage.finish(levels=job.recipe.levels)


@pytest.mark.parametrize("reads", [("seed",), ("seed", "levels")])
def test_a_stage_that_reads_an_unlisted_field_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: tuple[str, ...]
) -> None:
    row = StageSpec(
        "prompts", "", f"{__name__}:toy", reads=reads, prompts_first=lambda _: False, computes=False
    )
    monkeypatch.setitem(STAGES, "prompts", row)
    with RunDir.open(tmp_path / "run", recipe()) as run:
        if "levels" in reads:
            run_stage("prompts", run, progress=Progress(quiet=True))
            assert run.done("prompts").facts()["levels"] == 5
        else:
            with pytest.raises(UnlistedFieldError, match=r"stage prompts: recipe\.levels"):
                run_stage("prompts", run, progress=Progress(quiet=True))
            assert not run.is_done("prompts")


def test_what_a_stage_reads_depends_on_the_recipe() -> None:
    tune = STAGES["tune"]
    assert "judges" in reads_of(tune, BY_RLHF) and "judges" not in reads_of(tune, recipe())
    assert inputs_of(tune, BY_RLHF) == ["distil", "judge"]
    assert inputs_of(tune, recipe(steer={})) == ["steer", "distil"]
    plain = recipe().model_dump(mode="json")
    found = read_fields(plain, ("evaluate.split", "evaluate.repeats", "score"))
    assert found == {"evaluate": {"split": "test", "repeats": 1}, "score": plain["score"]}


def test_what_depends_on_a_dropped_stage_is_dropped_and_nothing_else() -> None:
    last = ["evaluate", "report"]
    assert with_later({"judge"}, recipe()) == ["judge", *last]
    assert with_later({"judge"}, BY_RLHF) == ["judge", "tune", *last]
    # The pool is not made from the reward models, only scored by them.
    assert "generate" not in with_later({"fit-reward"}, recipe())
    # A run that left steering out now may have had it before.
    assert with_later({"steer"}, recipe())[:3] == ["steer", "regenerate", "distil"]
    assert with_later({"align"}, recipe()) == ["align"]
    made = recipe(model=f"{MADE}align")
    assert with_later({"sft"}, made) == [
        name for name in ORDER if name not in ("base", "fit-reward")
    ]


def test_rows_outside_the_run_have_no_folder() -> None:
    beside = {name for name, row in STAGES.items() if row.phase is Phase.BESIDE}
    assert beside == {"scenarios", "forge"} == {*STAGES} - {*ORDER}
    assert Also(lambda _: True).inputs == ()
