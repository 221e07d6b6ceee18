"""Bad input: one clear message, a non-zero exit code, no traceback, nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from equipoise.cli.main import main
from equipoise.pipeline.rundir import RunDir
from equipoise.recipes.load import load_recipe
from equipoise.types import Prompt, RewardModel
from pipeline_kit import (
    prompt_texts,
    save_assets,
    save_nan_reward_model,
    save_policy,
    save_reward_model,
    tiny_recipe,
    write_prompts,
    write_recipe,
)

Fail = Callable[..., str]


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_assets(tmp_path_factory.mktemp("bad") / "assets")


@pytest.fixture(scope="module")
def generated(assets: Path) -> Path:
    """A run directory with its pool generated."""
    recipe = write_recipe(assets / "good.yaml", tiny_recipe(assets))
    assert run(["stage", "generate", str(recipe), "--dir", str(assets / "run")]) == 0
    return assets / "run"


def run(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return int(caught.value.code or 0)


@pytest.fixture
def fails(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Fail:
    """Runs a stage that must fail cleanly; returns what it printed."""

    def check(stage: str, recipe: Path | str, run_dir: Path | None = None) -> str:
        run_dir = run_dir or tmp_path / "run"
        capsys.readouterr()
        code = run(["stage", stage, str(recipe), "--dir", str(run_dir)])
        out, err = capsys.readouterr()
        assert code == 1, err
        assert out == ""
        assert err.count("error: ") == 1, err
        assert "\n  why: " in err
        assert "\n  fix: " in err
        assert "Traceback" not in err
        assert "fault of the program" not in err
        assert not (run_dir / stage / "stage.json").exists()
        assert not [path for path in run_dir.rglob("*") if path.name.startswith(".tmp-")]
        return err

    return check


def recipe_file(folder: Path, assets: Path, **changes: Any) -> Path:
    return write_recipe(folder / "recipe.yaml", tiny_recipe(assets, **changes))


def prompts_from(file: Path, assets: Path, **more: Any) -> dict[str, Any]:
    test = [{"source": str(assets / "test.jsonl")}]
    return {"train": [{"source": str(file)}], "test": test, **more}


def test_missing_model_directory(assets: Path, tmp_path: Path, fails: Fail) -> None:
    recipe = recipe_file(tmp_path, assets, model=str(tmp_path / "nowhere"))
    assert str(tmp_path / "nowhere") in fails("generate", recipe)


def test_tokenizer_without_a_chat_template(assets: Path, tmp_path: Path, fails: Fail) -> None:
    model = save_policy(tmp_path / "bare", template=False)
    message = fails("generate", recipe_file(tmp_path, assets, model=str(model)))
    assert "chat template" in message


def test_empty_prompt_file(assets: Path, tmp_path: Path, fails: Fail) -> None:
    empty = write_prompts(tmp_path / "empty.jsonl", [])
    recipe = recipe_file(tmp_path, assets, prompts=prompts_from(empty, assets))
    assert "empty.jsonl" in fails("generate", recipe)


def test_a_corrected_recipe_goes_on_in_the_same_directory(
    assets: Path, tmp_path: Path, fails: Fail
) -> None:
    fails("generate", recipe_file(tmp_path, assets, model=str(tmp_path / "nowhere")))
    empty = write_prompts(tmp_path / "empty.jsonl", [])
    fails("generate", recipe_file(tmp_path, assets, prompts=prompts_from(empty, assets)))
    assert (
        run(
            [
                "stage",
                "generate",
                str(recipe_file(tmp_path, assets)),
                "--dir",
                str(tmp_path / "run"),
            ]
        )
        == 0
    )


def test_prompt_with_no_user_turn(assets: Path, tmp_path: Path, fails: Fail) -> None:
    file = tmp_path / "mute.jsonl"
    file.write_text(json.dumps({"messages": [{"role": "system", "content": "be kind"}]}) + "\n")
    recipe = recipe_file(tmp_path, assets, prompts=prompts_from(file, assets))
    message = fails("generate", recipe)
    assert "user" in message
    assert "mute.jsonl" in message


def test_over_long_prompt(assets: Path, tmp_path: Path, fails: Fail) -> None:
    file = write_prompts(tmp_path / "long.jsonl", [*prompt_texts(3), "mend the kettle " * 60])
    prompts = prompts_from(file, assets, max_prompt_tokens=64)
    message = fails("generate", recipe_file(tmp_path, assets, prompts=prompts))
    assert "longer than 64 tokens" in message
    dropped = recipe_file(tmp_path, assets, prompts={**prompts, "on_long_prompt": "drop"})
    assert run(["stage", "generate", str(dropped), "--dir", str(tmp_path / "other")]) == 0
    kept = (tmp_path / "other/prompts/prompts.jsonl").read_text().splitlines()
    assert sum('"split": "train"' in line for line in kept) == 3


def test_skipped_rows_are_counted_in_the_run(
    assets: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = write_prompts(tmp_path / "some.jsonl", prompt_texts(3))
    file.write_text(file.read_text() + "nonsense\n")
    prompts = prompts_from(file, assets)
    prompts["train"][0]["on_bad_row"] = "skip"
    recipe = recipe_file(tmp_path, assets, prompts=prompts)
    assert run(["stage", "generate", str(recipe), "--dir", str(tmp_path / "run")]) == 0
    assert "3 train, 0 dev" in (said := capsys.readouterr().err)
    assert "1 bad rows skipped" in said
    kept = json.loads((tmp_path / "run/prompts/skipped/rows.json").read_text())
    assert kept["count"] == 1
    assert "some.jsonl, row 4: cannot be read" in kept["first"][0]


@pytest.mark.parametrize("kind", ["nan", "equal"])
def test_reward_model_with_useless_scores(
    generated: Path, assets: Path, tmp_path: Path, fails: Fail, kind: str
) -> None:
    model = tmp_path / kind
    if kind == "nan":
        save_nan_reward_model(model)
    else:
        save_reward_model(model, seed=1, constant=True)
    shutil.copytree(generated, tmp_path / "run")
    rewards = tiny_recipe(assets)["reward_models"]
    recipe = recipe_file(
        tmp_path, assets, reward_models={**rewards, "safety": {"model": str(model)}}
    )
    main_arguments = ["stage", "generate", str(recipe), "--dir", str(tmp_path / "run"), "--fresh"]
    assert run(main_arguments) == 0  # only the reward models changed: the pool is kept
    message = fails("score", recipe)
    assert ("safety" if kind == "equal" else str(model)) in message
    if kind == "nan":
        assert not list((tmp_path / "run/score").glob("*.parquet"))
        assert "nan" in message.lower()


class ShortChanged:
    """A reward model that loses a row."""

    name, hash = "short", "0"

    def score(self, pairs: list[tuple[Prompt, str]]) -> list[float]:
        return [float(len(text)) for _, text in pairs][1:]


def test_reward_model_of_the_wrong_length(
    generated: Path,
    assets: Path,
    tmp_path: Path,
    fails: Fail,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import equipoise.stages.score as stage

    def load(*_: object) -> dict[str, RewardModel]:
        return {"helpfulness": ShortChanged(), "safety": ShortChanged()}  # type: ignore[dict-item]

    monkeypatch.setattr(stage, "load_reward_models", load)
    shutil.copytree(generated, tmp_path / "run")
    assert "scores" in fails("score", assets / "good.yaml")
    assert not list((tmp_path / "run/score").glob("*.parquet"))


def test_a_pool_in_which_no_prompt_has_three_cells(
    assets: Path, tmp_path: Path, fails: Fail
) -> None:
    generate = {**tiny_recipe(assets)["generate"], "completions_per_prompt": 2}
    recipe = recipe_file(tmp_path, assets, generate=generate, distil={"data": "moec"})
    for stage in ("generate", "score"):
        assert run(["stage", stage, str(recipe), "--dir", str(tmp_path / "run")]) == 0
    message = fails("distil", recipe)
    assert "3 cells" in message
    assert "completions_per_prompt" in message


def test_two_runs_in_one_directory(assets: Path, tmp_path: Path, fails: Fail) -> None:
    recipe = recipe_file(tmp_path, assets)
    with RunDir.open(tmp_path / "run", load_recipe(str(recipe))):
        message = fails("generate", recipe)
    assert "another process is at work" in message
    assert f"pid {os.getpid()}" in message


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_full_disk_during_generate(
    generated: Path,
    assets: Path,
    tmp_path: Path,
    fails: Fail,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
) -> None:
    """The second shard finds the disk full; with space again the run ends in the same hashes."""
    target, whole = tmp_path / "run", getattr(os, call)
    shards = target / "generate"

    def full(*arguments: Any, **keywords: Any) -> Any:
        if (shards / "shard-00001.parquet").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return whole(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        message = fails("generate", assets / "good.yaml")
    assert "no space left" in message
    assert f"equipoise run {target}" in message
    assert (shards / "shard-00000.parquet").exists()
    assert not (shards / "shard-00002.parquet").exists()
    assert run(["stage", "generate", str(target)]) == 0
    found = [json.loads((path / "generate/stage.json").read_text()) for path in (target, generated)]
    assert found[0]["outputs"] == found[1]["outputs"]


def test_evaluated_prompts_that_training_saw_are_refused(
    generated: Path, assets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from equipoise.errors import DataError
    from equipoise.pipeline import unseen
    from equipoise.pipeline.job import Job
    from equipoise.pipeline.readers import read_prompts
    from equipoise.pipeline.stored import stored_recipe
    from equipoise.progress import Progress

    shutil.copytree(generated, tmp_path / "run")
    with RunDir.open(tmp_path / "run", stored_recipe(generated)) as opened:
        job = Job.of(opened, Progress(quiet=True))
        prompts = read_prompts(opened)
        test = [prompt for prompt in prompts if prompt.split == "test"]
        sizes = unseen.check_unseen(job, test)
        assert sizes["train prompts"] == 0
        assert sizes["judge safety rows"] is None  # trained elsewhere, without a record
        with pytest.raises(DataError, match="1 in train prompts"):
            unseen.check_unseen(job, [*test, prompts[0]])
