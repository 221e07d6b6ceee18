"""The judges of an evaluation, both kinds on the unit scale of the start model's own pool."""

from __future__ import annotations

from typing import TYPE_CHECKING

from equipoise.pipeline.job import (
    Job,
    load_reward_models,
    load_scorer,
    read_calibration,
    read_prompts,
    read_scored,
    reward_hashes,
)
from equipoise.store.shards import to_plain
from equipoise.types import JudgeKind, ScoredCompletion

if TYPE_CHECKING:
    from equipoise.rewards.scorer import Scorer

SCALE = "calibration.json"
FACTS = "pool.json"


def judge(job: Job) -> None:
    """Let the judges read the start model's pool, which gives them their scale; by shard."""
    recipe = job.recipe
    stage = job.begin("judge", reward_hashes(recipe.judges, job))
    if stage is None:
        return
    from equipoise.pool.calibrate import calibrate, calibration_report, own_pool
    from equipoise.pool.score import score

    judges = load_reward_models(recipe.judges, job)
    source, by_id = job.run.done("score"), {p.id: p for p in read_prompts(job.run)}
    shards = [name for name in source.shards if name.startswith("shard-")]
    with job.progress.task("judge the pool", len(shards)) as advance:
        for name in shards:
            if not stage.has(name):
                rows = source.read_shard(name, ScoredCompletion)
                chunks = score([row.completion for row in rows], by_id, judges)
                judged = [row for chunk in chunks for row in chunk]
                stage.publish_rows(name, judged, ScoredCompletion)
            advance(1)
    pool = own_pool([row for rows in stage.read_rows(ScoredCompletion) for row in rows])
    stage.publish_bytes(SCALE, calibrate(pool, mode="pooled").to_json().encode())
    scored = own_pool(read_scored(job.run))
    facts = calibration_report(scored, read_calibration(job.run), judged=pool)
    stage.publish_json(FACTS, to_plain(facts))
    stage.finish(judged=len(pool))


def read_judges(job: Job) -> dict[JudgeKind, Scorer]:
    """Load both kinds of judges, each with its scale over the start model's own pool."""
    from equipoise.pool.calibrate import Calibration
    from equipoise.rewards.scorer import Scorer

    scale = job.run.done("judge").read_bytes(SCALE).decode()
    return {
        "optimization": load_scorer(job),
        "generalization": Scorer(
            load_reward_models(job.recipe.judges, job), Calibration.from_json(scale)
        ),
    }
