"""The steered pool on disk: wishes, resume to the byte, the fluency filter, one scale for all."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from equipoise.config import (
    DistilConfig,
    GenerateConfig,
    Recipe,
    RegenerateConfig,
    SamplingConfig,
)
from equipoise.dials.dials import Dials
from equipoise.errors import ConfigError
from equipoise.pipeline.job import Job
from equipoise.pipeline.readers import (
    FLUENCY,
    START_CURVE,
    STRENGTHS,
    read_calibration,
    read_directions,
    read_scored,
    read_steered,
)
from equipoise.pipeline.rundir import RunDir
from equipoise.pipeline.runner import run_stage
from equipoise.pipeline.stored import stored_recipe
from equipoise.pool.moec import distil
from equipoise.progress import Progress
from equipoise.recipes.load import build_recipe, load_recipe
from equipoise.stages.tune import steering_of
from equipoise.steer.regeneration import batches_of, regenerate_batch, wishes
from equipoise.types import Completion, DialSetting, Prompt, ScoredCompletion, SteeredCompletion
from pipeline_kit import save_assets, tiny_recipe, write_recipe
from steering_kit import steered_engine
from tuning_kit import ATTRIBUTES, prompt

BEFORE = ("prompts", "generate", "score")


def config(**changes: Any) -> RegenerateConfig:
    return RegenerateConfig(**{"steered_per_prompt": 6, "factors": [1.0, 2.0], **changes})


def test_wishes_cover_cells_evenly_and_lean_by_level() -> None:
    drawn = [
        wish
        for i in range(50)
        for wish in wishes(prompt(i), config(), dials=Dials(ATTRIBUTES, 3), seed=1)
    ]
    counts = Counter(cell.levels for cell, _ in drawn)
    assert len(drawn) == 300 and set(counts) == {
        (a, b) for a in range(3) for b in range(3) if (a, b) != (1, 1)
    }
    assert max(counts.values()) < 2 * min(counts.values())
    for cell, strengths in drawn:
        leans = [level - 1 for level in cell.levels]
        assert strengths in (tuple(map(float, leans)), tuple(2.0 * lean for lean in leans))
    assert {max(map(abs, strengths)) for _, strengths in drawn} == {1.0, 2.0}


def test_corners_only() -> None:
    drawn = wishes(prompt(1), config(over="corners"), dials=Dials(ATTRIBUTES, 5), seed=1)
    assert {cell.levels for cell, _ in drawn} == {(0, 0), (0, 4), (4, 0), (4, 4)}
    assert [cell.levels for cell, _ in drawn[:4]] != [cell.levels for cell, _ in drawn[4:]]


def test_a_resumed_pool_repeats_the_same_rows() -> None:
    engine = steered_engine()
    prompts = [prompt(i) for i in range(7)]
    own = GenerateConfig(sampling=SamplingConfig(max_tokens=6), batch_size=12)
    batches = batches_of(prompts, engine.encoder, config(), own)
    assert sum(map(len, batches)) == 7

    def sampled(batch: list[Prompt]) -> list[tuple[Completion, tuple[float, ...]]]:
        wanted = [wishes(one, config(), dials=Dials(ATTRIBUTES, 5), seed=3) for one in batch]
        return regenerate_batch(batch, wanted, engine, engine.encoder, own.sampling, seed=3)

    whole = list(map(sampled, batches))
    assert [sampled(batches[number]) for number in (3, 1)] == [whole[3], whole[1]]
    rows = [one for batch in whole for one, _ in batch]
    assert all(one.round == 1 and one.setting is not None for one in rows)
    assert len({(one.prompt_id, one.sample_index) for one in rows}) == len(rows) == 42


def scored(index: int, unit: float, setting: DialSetting | None) -> ScoredCompletion:
    one = Completion("p0", index, f"answer number {index} .", "stop", 4, "h", 0, setting)
    return ScoredCompletion(one, {"helpfulness": unit, "safety": unit}, {})


@pytest.mark.parametrize(("data", "kept"), [("denoised", 3), ("raw", 5)])
def test_what_babbles_is_dropped_with_its_reason(data: str, kept: int) -> None:
    wish = DialSetting((1, 1))
    pool = [scored(0, 0.1, None), scored(1, 0.9, None)]
    pool += [scored(i, 0.5, wish) for i in (2, 3, 4)]
    examples, facts = distil(
        pool,
        [one.raw for one in pool],
        {"p0": prompt(0)},
        DistilConfig(data=data, max_fluency_drop=0.4),
        dials=Dials(ATTRIBUTES, 5),
        fluency_drops=[0.0, 0.0, 0.4, 0.41, float("nan")],
    )
    assert len(examples) == kept
    assert facts.dropped.get("less fluent than the model itself", 0) == 5 - kept


def steered_recipe(root: Path, **changes: Any) -> dict[str, Any]:
    plain = tiny_recipe(save_assets(root / "assets"), **changes)
    plain["prompts"]["n_dev"] = 2
    plain["steer"] = {
        "directions": "difference_of_means", "strengths": [-2, 2], "max_fluency_drop": None,
    }  # fmt: skip
    plain["regenerate"] = {"steered_per_prompt": 4}
    return plain


@pytest.fixture(scope="module")
def steered(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with a steered pool."""
    root = tmp_path_factory.mktemp("steered")
    recipe = load_recipe(str(write_recipe(root / "tiny.yaml", steered_recipe(root))))
    with RunDir.open(root / "run", recipe) as run:
        for stage in (*BEFORE, "steer", "regenerate", "distil"):
            run_stage(stage, run, progress=Progress(quiet=True))
    return root / "run"


def test_the_stages_leave_directions_strengths_and_a_scored_pool(steered: Path) -> None:
    with RunDir.open(steered, stored_recipe(steered)) as run:
        stage = run.done("steer")
        directions = read_directions(stage)
        assert directions.vectors.shape == (2, 32) and directions.layer == 0
        strengths = stage.read_json(STRENGTHS)
        assert [row["strength"] for row in strengths["tried"]["safety"]] == [-2.0, 0.0, 2.0]
        assert all(len(levels) == 3 for levels in strengths["by_level"].values())
        own, rows = read_scored(run), read_steered(run)
        assert set(stage.read_json(FLUENCY)) == {one.completion.prompt_id for one in own}
        assert 0 < len(rows) <= 6 * 4
        assert all(row.fluency < 0 and any(row.strengths) for row in rows)
        # The scale is the model's own pool's, as if there were no other.
        assert len(read_calibration(run).scores["safety"]) == len(own)
        moec = run.done("distil").read_json("moec.json")
        assert moec["n_pool"] == len(own) + len(rows)


def test_a_start_reads_the_directions_of_its_run(steered: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(steered, copy)
    start = {"steps": 2, "batch_size": 2}
    changed = stored_recipe(copy).model_dump(mode="json")
    changed["tune"] |= {"steps": 0, "lora_rank": 2, "steered_start": start}
    with RunDir.open(copy, Recipe.model_validate(changed), fresh=True) as run:
        run_stage("tune", run, progress=Progress(quiet=True))
        assert len(run.done("tune").read_json(START_CURVE)) == 2
        steering = steering_of(Job.of(run, Progress(quiet=True)))
        directions = read_directions(run.done("steer"))
    assert steering is not None and steering.layer == directions.layer
    assert torch.equal(steering.vectors, directions.vectors)


def test_natural_gradients_take_the_place_of_mean_differences(
    steered: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(steered, copy)
    with RunDir.open(steered, stored_recipe(steered)) as run:
        before, usual = read_directions(run.done("steer")), run.done("steer").read_json(FLUENCY)
    changed = stored_recipe(copy).model_dump(mode="json")
    changed["steer"] |= {"directions": "natural_gradient", "layer": 0}
    with RunDir.open(copy, Recipe.model_validate(changed), fresh=True) as run:
        run_stage("steer", run, progress=Progress(quiet=True))
        stage = run.done("steer")
        found, again = read_directions(stage), stage.read_json(FLUENCY)
        tried = stage.read_json(STRENGTHS)["tried"]
        assert {name: len(tries) for name, tries in tried.items()} == {
            "helpfulness": 3,
            "safety": 3,
        }
    assert found.attributes == before.attributes and found.layer == 0
    assert found.vectors.shape == before.vectors.shape
    assert again == pytest.approx(usual, abs=1e-4)


def test_a_damaged_shard_is_made_again_with_the_same_bytes(steered: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(steered, copy)
    with RunDir.open(copy, stored_recipe(copy)) as run:
        before = run.done("regenerate").outputs
        for name in ("regenerate/shard-00001.parquet", "steer/tried/safety/+2.json"):
            (copy / name).unlink()
        run_stage("steer", run, progress=Progress(quiet=True))
        run_stage("regenerate", run, progress=Progress(quiet=True))
        assert run.done("regenerate").outputs == before
        assert len(before) == 2
        assert run.done("regenerate").read_shard("shard-00001.parquet", SteeredCompletion)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steer": None}, "needs the directions"),
        ({"evaluate": {"responders": ["steering"]}, "steer": None}, "needs `steer`"),
        ({"regenerate": None, "distil": {"max_fluency_drop": 0.3}}, "needs `regenerate`"),
    ],
)
def test_recipes_that_cannot_steer_are_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    plain = {**steered_recipe(tmp_path), **change}
    with pytest.raises(ConfigError, match=message):
        build_recipe(plain, lines={}, file="tiny.yaml")


def test_the_responder_needs_dev_prompts(tmp_path: Path) -> None:
    plain = steered_recipe(tmp_path, evaluate={"responders": ["steering"]})
    plain["prompts"]["n_dev"] = 0
    with pytest.raises(ConfigError, match="n_dev"):
        build_recipe(plain, lines={}, file="tiny.yaml")
