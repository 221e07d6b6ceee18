"""Relative paths of a recipe: from its own folder, then from the working directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from equipoise.config import Recipe
from equipoise.errors import RunError
from equipoise.pipeline.rundir import RunDir
from equipoise.pipeline.stored import stored_recipe
from equipoise.recipes.load import load_recipe
from equipoise.recipes.source import shown_model


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe's folder with a model and data; the working directory is another one."""
    for name in ("conf/models/llama", "conf/rm", "conf/data", "cwd/only-here"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "conf/a.jsonl").write_text("{}")
    monkeypatch.chdir(tmp_path / "cwd")
    return tmp_path / "conf"


def plain(**changes: Any) -> dict[str, Any]:
    models = {name: {"model": "rm"} for name in ("helpfulness", "safety")}
    return {
        "name": "x",
        "model": "models/llama",
        "prompts": {"train": [{"source": "a.jsonl"}], "test": [{"source": "a.jsonl"}]},
        "reward_models": models,
        "judges": models,
        **changes,
    }


def written(folder: Path, **changes: Any) -> str:
    file = folder / "recipe.yaml"
    file.write_text(yaml.safe_dump(plain(**changes)))
    return str(file)


def test_paths_are_relative_to_the_recipe(folder: Path) -> None:
    recipe = load_recipe(written(folder))
    assert recipe.model == str(folder / "models/llama")
    assert recipe.judges["safety"].model == str(folder / "rm")
    assert recipe.data == str(folder)
    # Names of sources stay: draws and reports depend on them.
    assert recipe.prompts.train[0].source == "a.jsonl"
    assert load_recipe(written(folder, data="data")).data == str(folder / "data")


def test_what_is_not_beside_the_recipe_is_looked_up_in_the_working_directory(folder: Path) -> None:
    cwd = Path.cwd()
    assert load_recipe(written(folder, model="only-here")).model == str(cwd / "only-here")
    (cwd / "b.jsonl").write_text("{}")
    prompts = {name: [{"source": "b.jsonl"}] for name in ("train", "test")}
    assert load_recipe(written(folder, prompts=prompts)).data == str(cwd)


def test_names_that_are_no_paths_stay(folder: Path) -> None:
    (folder / "helpfulness").mkdir()
    where = [{"source": "owner/set", "where": {"model": "rm"}}]
    kept = {"model": "owner/name", "prompts": {"train": where, "test": where}}
    recipe = load_recipe(written(folder, **kept))
    assert recipe.model == "owner/name"
    assert recipe.data is None
    assert recipe.prompts.train[0].where == {"model": "rm"}
    assert load_recipe("workshop").model == "workshop://start"


@pytest.mark.parametrize("name", ["../gone", "./gone", "models/gone"])
def test_a_path_to_nothing_is_one_beside_the_recipe(folder: Path, name: str) -> None:
    assert load_recipe(written(folder, model=name)).model == str((folder / name).resolve())


def test_what_is_typed_is_relative_to_the_working_directory(folder: Path) -> None:
    cwd = Path.cwd()
    (cwd / "rm").mkdir()
    overrides = ["model=rm", "data=data"]
    recipe = load_recipe(written(folder), overrides=overrides)
    assert recipe.model == str(cwd / "rm")
    assert recipe.data == str(cwd / "data")
    assert load_recipe(written(folder), data="data").data == str(cwd / "data")


def test_home_is_expanded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(folder))
    recipe = load_recipe(written(folder, data="~/data", model="~/models/llama"))
    assert recipe.data == str(folder / "data")
    assert recipe.model == str(folder / "models/llama")
    assert load_recipe(written(folder), data="~/data").data == str(folder / "data")
    nobody = load_recipe(written(folder, data="~nobody-here/x"))
    assert nobody.data == str(folder / "~nobody-here/x")


def test_a_run_means_the_same_from_everywhere(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RunDir.open(tmp_path / "run", load_recipe(written(folder))) as run:
        run.begin("prompts").finish()
    monkeypatch.chdir(tmp_path)
    assert stored_recipe(tmp_path / "run").model == str(folder / "models/llama")
    with RunDir.open(tmp_path / "run", load_recipe("conf/recipe.yaml")) as run:
        assert run.is_done("prompts")


def test_an_old_run_with_relative_paths_goes_on(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)
    file = written(folder)
    with RunDir.open(tmp_path / "run", load_recipe(file)) as run:
        run.begin("prompts").finish()
    old = Recipe.model_validate(plain()).model_dump(mode="json")
    for name in ("recipe.json", "prompts/stage.json", "prompts/started.json"):
        stored = json.loads((tmp_path / "run" / name).read_text())
        if "fingerprint" in stored:
            config = stored["fingerprint"]["config"]
            stored["fingerprint"]["config"] = {key: old[key] for key in config}
        else:
            stored = old
        (tmp_path / "run" / name).write_text(json.dumps(stored))
    for recipe in (load_recipe(file), Recipe.model_validate(plain())):
        with RunDir.open(tmp_path / "run", recipe) as run:
            assert run.begin("prompts").complete
    # From elsewhere the same words meant another model.
    (tmp_path / "cwd/models/llama").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "cwd")
    (tmp_path / "run/recipe.json").write_text(json.dumps(old))
    with (
        pytest.raises(RunError, match=r"changed:\n +model: "),
        RunDir.open(tmp_path / "run", load_recipe(file)),
    ):
        pass


def test_a_report_does_not_say_where_a_model_lies() -> None:
    assert shown_model("/home/someone/models/llama") == "llama"
    for name in ("workshop://start", "owner/name"):
        assert shown_model(name) == name
