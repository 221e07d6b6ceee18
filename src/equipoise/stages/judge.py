"""What the judges say of the start model's pool: the unit scale of the evaluation."""

from __future__ import annotations

from equipoise.pipeline.job import Job
from equipoise.pipeline.plan import Speed, pass_size
from equipoise.pipeline.readers import (
    CALIBRATION,
    JUDGED_POOL,
    load_reward_models,
    read_calibration,
    read_prompts,
    read_scored,
)
from equipoise.pool.calibrate import calibrate, calibration_report, own_pool
from equipoise.pool.score import score
from equipoise.store.shards import to_plain
from equipoise.store.stagedir import Stage
from equipoise.types import ScoredCompletion


def judge(job: Job, stage: Stage) -> None:
    """Let the judges read the pool, which gives them their scale; resumes by shard."""
    judges = load_reward_models(job.recipe.judges, job)
    source, by_id = job.run.done("score"), {p.id: p for p in read_prompts(job.run)}

    def make(name: str, shard: str) -> None:
        rows = source.read_shard(shard, ScoredCompletion)
        chunks = score([row.completion for row in rows], by_id, judges)
        stage.publish_rows(name, [row for chunk in chunks for row in chunk], ScoredCompletion)

    shards = {name: name for name in source.shards if name.startswith("shard-")}
    job.make_missing(stage, "judge the pool", shards, make)
    pool = own_pool([row for rows in stage.read_rows(ScoredCompletion) for row in rows])
    stage.publish_bytes(CALIBRATION, calibrate(pool, mode="pooled").to_json().encode())
    scored = own_pool(read_scored(job.run))
    facts = calibration_report(scored, read_calibration(job.run), judged=pool)
    stage.publish_json(JUDGED_POOL, to_plain(facts))
    stage.finish(judged=len(pool))


def cost(job: Job, speed: Speed) -> float:
    """Return estimated seconds."""
    return speed.reading_pool(job) * pass_size(job.recipe.judges, job) / speed.flops
