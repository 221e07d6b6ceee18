"""All stages on models of two layers: files, report, reuse, and a report without text."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from equipoise.pipeline.plan import read_plan
from equipoise.pipeline.readers import read_prompts, read_scored
from equipoise.pipeline.rundir import RunDir
from equipoise.pipeline.runner import run_all, run_stage
from equipoise.pipeline.spec import Phase
from equipoise.pipeline.stored import stored_recipe
from equipoise.pipeline.table import STAGES as TABLE
from equipoise.pipeline.table import of_phase
from equipoise.pipeline.unseen import judges_by_hash, judges_by_name, judges_in_training
from equipoise.pool.calibrate import Calibration
from equipoise.progress import Progress
from equipoise.recipes.load import load_recipe
from equipoise.types import Delivery, ScoredCompletion
from leaks import shared_runs
from pipeline_kit import blank_pictures, prompt_texts, save_assets, tiny_recipe, write_recipe

PAIRS = 40


def pairs_file(file: Path) -> Path:
    rows = [
        {
            "prompt": f"{text} case {index}",
            "chosen": "mend the kettle . clean the piano .",
            "rejected": "paint the wheel .",
        }
        for index, text in enumerate(prompt_texts(20) * (PAIRS // 20))
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows) + "nonsense\n", "utf-8")
    return file


STAGES = [row.name for row in of_phase(Phase.RUN)]
METHODS = ["start", "prompting", "rerank2", "rerank4", "steering", "tuned"]


def recipe_of(root: Path) -> dict[str, Any]:
    assets = save_assets(root / "assets")
    plain = tiny_recipe(assets)
    plain["fit_reward"] = {
        "helpfulness": {
            "backbone": str(assets / "policy"),
            "kind": "pairs",
            "sources": [{"source": str(pairs_file(root / "pairs.jsonl")), "on_bad_row": "skip"}],
            "held_out": 8,
            "max_length": 64,
        }
    }
    plain["reward_models"]["helpfulness"] = {"model": "fitted://helpfulness"}
    plain["prompts"]["n_dev"] = 2
    plain["steer"] = {"strengths": [-2, 2], "max_fluency_drop": None}
    plain["regenerate"] = {"steered_per_prompt": 2}
    plain["evaluate"]["responders"] = METHODS
    plain["evaluate"]["auto_sweep"] = True
    return plain


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("pipeline")
    recipe = load_recipe(str(write_recipe(root / "tiny.yaml", recipe_of(root))))
    # The last test draws the pictures.
    said, began = (root / "said.txt").open("w"), time.monotonic()
    with said, RunDir.open(root / "run", recipe) as run, blank_pictures():
        page = run_all(run, progress=Progress(said))
    (root / "minutes.json").write_text(json.dumps((time.monotonic() - began) / 60))
    assert page == root / "run/report/report.html"
    return root / "run"


def test_every_stage_is_complete_and_listed_with_hashes(finished: Path) -> None:
    for stage in STAGES:
        record = json.loads((finished / stage / "stage.json").read_text())
        assert record["outputs"], stage
        assert record["minutes"] > 0, stage
        assert not (finished / stage / "work").exists()


def test_the_minutes_of_the_stages_are_those_of_the_run(finished: Path) -> None:
    spent = [json.loads((finished / name / "stage.json").read_text())["minutes"] for name in STAGES]
    whole = json.loads((finished.parent / "minutes.json").read_text())
    assert 0.5 * whole < sum(spent) <= whole


def test_the_report_holds_every_method_by_both_judges(finished: Path) -> None:
    report = json.loads((finished / "report/report.json").read_text())
    assert list(report["methods"]) == METHODS
    for name, parts in report["methods"].items():
        for judge in ("optimization", "generalization"):
            assert set(parts[judge]["mp"]) == {"helpfulness", "safety"}, name
            # Only a model with dials knows auto; the others are not swept on it.
            expected = {"helpfulness", "safety"} if name == "tuned" else set()
            assert set(parts[judge]["auto_mp"]) == expected, name
        assert parts["cost"]["tokens"] > 0, name
        assert parts["quality"]["degenerate"]["n"] == 4, name
        assert len(parts["quality"]["fluency"]) == 9, name
        assert parts["quality"]["fluency_mean"]["n"] == 4, name
    drift = report["methods"]["tuned"]["quality"]["drift"]
    assert drift["generalization"]["safety"]["n"] == 4
    cost = {name: parts["cost"]["tokens"] for name, parts in report["methods"].items()}
    assert cost["start"] < cost["rerank2"] < cost["rerank4"]
    assert report["methods"]["tuned"]["cost"]["steps"] == 6
    assert report["intersections"]["train prompts"] == 0
    assert report["intersections"]["reward model helpfulness rows"] == 0
    assert report["reward_models"]["reward helpfulness"]["held_out"]["metric"] == "accuracy"
    assert set(report["stages"]) == {*STAGES} - {"report"}
    assert set(report["planned"]) == {row.name for row in TABLE.values() if row.planned}
    assert min(report["planned"].values()) > 0
    assert report["ceiling"]["generalization"]["mp"]["helpfulness"]["value"] > 0
    assert len(report["losses"]["tuned"]["loss"]) == 6
    assert "tuned − rerank4" in report["differences"]


def test_the_report_counts_the_rows_that_were_skipped(finished: Path) -> None:
    report = json.loads((finished / "report/report.json").read_text("utf-8"))
    skipped = report["skipped"]["fit-reward helpfulness"]
    assert skipped["count"] == 1
    place = f"pairs.jsonl, row {PAIRS + 1}: cannot be read"
    assert place in skipped["first"][0]
    assert place in (finished / "report/report.html").read_text("utf-8")


def test_judges_of_the_training_are_found_by_name_and_by_hash(
    finished: Path, tmp_path: Path
) -> None:
    report = json.loads((finished / "report/report.json").read_text("utf-8"))
    assert report["judges_in_training"] == {}
    assert report["recipe"]["reward_models"]["safety"]["model"] == "rm_sf"
    recipe = stored_recipe(finished)
    same = recipe.model_copy(update={"judges": dict(recipe.reward_models)})
    assert judges_by_name(same)["safety"] == "reward model safety"
    assert judges_by_name(recipe) == {}
    found = judges_in_training({"reward model a": "1", "reward model b": "1"}, {"b": "1", "c": "1"})
    assert found == {"b": "reward model b", "c": "reward model a"}
    shutil.copytree(finished, tmp_path / "run")
    file = tmp_path / "run/evaluate/stage.json"
    record = json.loads(file.read_text())
    models = record["fingerprint"]["models"]
    models["judge/safety"] = models["reward/safety"]
    file.write_text(json.dumps(record))
    run = RunDir(tmp_path / "run", recipe)
    assert judges_by_hash(run) == {"safety": "reward model safety"}


def test_the_judges_scale_is_that_of_the_whole_pool(finished: Path) -> None:
    with RunDir.open(finished, stored_recipe(finished)) as run:
        pool = {(row.completion.prompt_id, row.completion.text) for row in read_scored(run)}
        shards = run.done("judge").read_rows(ScoredCompletion)
        judged = [row for shard in shards for row in shard]
        scale = Calibration.from_json(run.done("judge").read_bytes("calibration.json").decode())
    assert {(row.completion.prompt_id, row.completion.text) for row in judged} == pool
    assert scale.scores["safety"] == tuple(sorted(row.raw["safety"] for row in judged))


def test_deliveries_cover_the_grid_once(finished: Path) -> None:
    with RunDir.open(finished, stored_recipe(finished)) as run:
        evaluated = run.done("evaluate")
        for folder, settings in (("deliveries", 9), ("one-dial", 6)):
            shards = evaluated.read_rows(Delivery, prefix=f"{folder}/tuned/")
            rows = [row for shard in shards for row in shard]
            cells = {(row.prompt_id, row.setting) for row in rows}
            assert len(cells) == len(rows) == 4 * settings


def test_after_every_planned_stage_it_is_said_what_is_left(finished: Path) -> None:
    said = (finished.parent / "said.txt").read_text().splitlines()
    left = [line for line in said if line.startswith("left: about ")]
    assert len(left) == len(read_plan(finished)) - 1
    planned = [float(line.split("planned ")[1].rstrip(")")) for line in left]
    assert planned == sorted(planned, reverse=True)


def test_the_same_command_again_has_nothing_to_do(
    finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    with RunDir.open(finished, stored_recipe(finished)) as run:
        run_all(run)
    assert capsys.readouterr().err.count("nothing to do") == len(STAGES)
    after = {path: path.stat().st_mtime_ns for path in finished.rglob("*") if path.is_file()}
    assert {p: t for p, t in after.items() if p.name != ".lock"} == {
        p: t for p, t in before.items() if p.name != ".lock"
    }


def test_a_report_without_text_holds_no_run_of_eight_words(finished: Path) -> None:
    with RunDir.open(finished, stored_recipe(finished)) as run:
        run_all(run, progress=Progress(quiet=True), text=False)
        run_stage("report", run, progress=Progress(quiet=True))  # --no-text is remembered
        shards = run.done("evaluate").read_rows(Delivery, prefix="deliveries/")
        texts = {row.text for shard in shards for row in shard}
        texts |= {message.content for prompt in read_prompts(run) for message in prompt.messages}
    outputs = [
        path.read_text("utf-8")
        for path in (finished / "report").rglob("*")
        if path.suffix in (".html", ".json", ".svg")
    ]
    assert all(path.stat().st_size > 2000 for path in (finished / "report/figures").iterdir())
    assert any(len(text.split()) >= 8 for text in texts)
    assert shared_runs(outputs, texts) == set()
