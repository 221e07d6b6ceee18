"""The judges of an evaluation, both kinds on the unit scale of the start model's own pool."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from equipoise.stages.inputs import (
    Job,
    load_reward_models,
    read_calibration,
    read_prompts,
    read_scored,
)
from equipoise.store.stagedir import Stage
from equipoise.types import JudgeKind, RewardModel, ScoredCompletion

if TYPE_CHECKING:
    from equipoise.pool.calibrate import Calibration

JUDGE_CALIBRATION = "judge-calibration.json"


@dataclass(frozen=True)
class Bench:
    """The two kinds of judges, calibrated on the same pool: the start model's own."""

    judges: Mapping[JudgeKind, Mapping[str, RewardModel]]
    calibrations: Mapping[JudgeKind, Calibration]


def judged_bench(job: Job, stage: Stage) -> Bench:
    """Load both kinds of judges and calibrate them on the start model's pool; by shard."""
    from equipoise.evaluate.report import plain
    from equipoise.pool.calibrate import calibrate, calibration_report, own_pool
    from equipoise.pool.score import score

    recipe = job.recipe
    judges: dict[JudgeKind, Mapping[str, RewardModel]] = {
        "optimization": load_reward_models(recipe.reward_models, job),
        "generalization": load_reward_models(recipe.judges, job),
    }
    source, by_id = job.run.done("score"), {p.id: p for p in read_prompts(job.run)}
    shards = [name for name in source.shards if name.startswith("shard-")]
    with job.progress.task("judge the pool", len(shards)) as advance:
        for name in shards:
            if not stage.has(f"pool/{name}"):
                rows = source.read_shard(name, ScoredCompletion)
                chunks = score([row.completion for row in rows], by_id, judges["generalization"])
                judged = [row for chunk in chunks for row in chunk]
                stage.publish_rows(f"pool/{name}", judged, ScoredCompletion)
            advance(1)
    pool = [row for rows in stage.read_rows(ScoredCompletion, prefix="pool/") for row in rows]
    calibration = calibrate(own_pool(pool), mode="pooled")
    stage.publish_bytes(JUDGE_CALIBRATION, calibration.to_json().encode())
    trained = read_calibration(job.run)
    facts = calibration_report(own_pool(read_scored(job.run)), trained, judged=own_pool(pool))
    stage.publish_json("pool.json", plain(facts))
    return Bench(judges, {"optimization": trained, "generalization": calibration})
