"""The pool's raw scores, and what they mean: the unit scale."""

from __future__ import annotations

from equipoise.errors import DataError
from equipoise.pipeline.job import Job
from equipoise.pipeline.plan import Speed, pass_size
from equipoise.pipeline.readers import CALIBRATION, load_reward_models, read_prompts
from equipoise.pool.calibrate import calibrate, own_pool
from equipoise.pool.score import score as score_rows
from equipoise.pool.score import shortened
from equipoise.store.stagedir import Stage
from equipoise.types import Completion, ScoredCompletion


def score(job: Job, stage: Stage) -> None:
    """Score every completion once with every reward model, then calibrate on the pool.

    Raises:
        DataError: No completion holds a finished sentence.
    """
    recipe = job.recipe
    by_id = {prompt.id: prompt for prompt in read_prompts(job.run)}
    source = job.run.done("generate")
    models = load_reward_models(recipe.reward_models, job)

    def make(name: str, _: int) -> None:
        # What is scored is what is learnt from: an answer that the token limit cut ends with its
        # last finished sentence.
        kept = shortened(source.read_shard(name, Completion))
        rows = [row for chunk in score_rows(kept, by_id, models) for row in chunk]
        stage.publish_rows(name, rows, ScoredCompletion)

    parts = {name: int(source.shard_facts(name)["rows"]) for name in source.shards}
    job.make_missing(stage, "score", parts, make, size=int)
    pool = [row for rows in stage.read_rows(ScoredCompletion) for row in rows]
    if not pool:
        raise DataError(
            "the pool is empty",
            why="no completion holds a finished sentence",
            fix="raise generate.sampling.max_tokens",
        )
    calibration = calibrate(own_pool(pool), mode=recipe.score.calibration)
    stage.publish_bytes(CALIBRATION, calibration.to_json().encode())
    stage.finish(scored=len(pool), no_finished_sentence=sum(parts.values()) - len(pool))


def cost(job: Job, speed: Speed) -> float:
    """Return estimated seconds."""
    return speed.reading_pool(job) * pass_size(job.recipe.reward_models, job) / speed.flops
