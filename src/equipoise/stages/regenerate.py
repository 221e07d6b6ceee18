"""A second pool, sampled under steering: for cells that the model hardly fills by itself."""

from __future__ import annotations

from dataclasses import replace

from equipoise.models.likelihood import Answer, read_answers
from equipoise.pipeline.job import Job, shard_name
from equipoise.pipeline.plan import Speed
from equipoise.pipeline.readers import (
    FLUENCY,
    load_reward_models,
    prompts_of,
    read_directions,
    steered_engine,
)
from equipoise.pool.score import score
from equipoise.steer.regeneration import batches_of, regenerate_batch, wishes
from equipoise.store.stagedir import Stage
from equipoise.types import Prompt, SteeredCompletion


def regenerate(job: Job, stage: Stage) -> None:
    """Sample, score and read the steered pool; resumes by batch."""
    recipe, config = job.recipe, job.recipe.regenerate
    assert config is not None
    steer = job.run.done("steer")
    # Prompts without own completions have no usual fluency.
    usual = steer.read_json(FLUENCY)
    prompts = [prompt for prompt in prompts_of(job.run, "train") if prompt.id in usual]
    by_id = {prompt.id: prompt for prompt in prompts}
    policy = job.policy()
    models = load_reward_models(recipe.reward_models, job)
    batch_size = recipe.generate.batch_size
    engine = steered_engine(policy, read_directions(steer), batch_size=batch_size)

    def make(name: str, batch: list[Prompt]) -> None:
        wanted = [wishes(one, config, dials=job.dials, seed=recipe.seed) for one in batch]
        rows = regenerate_batch(
            batch, wanted, engine, policy.encoder, recipe.generate.sampling, seed=recipe.seed
        )
        kept = [
            (replace(one, text=text), strengths)
            for one, strengths in rows
            if (text := one.sentences)
        ]
        answers = [Answer(one.prompt_id, one.text, one.finish == "stop") for one, _ in kept]
        read = read_answers(policy.model, policy.encoder, answers, by_id)
        fluency = [reading.mean for reading in read]
        scored = [row for part in score([one for one, _ in kept], by_id, models) for row in part]
        steered = [
            SteeredCompletion(row, strengths, mean)
            for row, (_, strengths), mean in zip(scored, kept, fluency, strict=True)
        ]
        cut = len(rows) - len(kept)
        stage.publish_rows(name, steered, SteeredCompletion, unfinished=cut)

    batches = batches_of(prompts, policy.encoder, config, recipe.generate)
    parts = {shard_name(number): batch for number, batch in enumerate(batches)}
    job.make_missing(stage, "regenerate", parts, make, size=len)
    facts = [stage.shard_facts(name) for name in stage.shards]
    stage.finish(
        scored=sum(int(fact["rows"]) for fact in facts),
        no_finished_sentence=sum(int(fact["unfinished"]) for fact in facts),
    )


def cost(job: Job, speed: Speed) -> float:
    """Return estimated seconds."""
    config = job.recipe.regenerate
    if config is None:
        return 0.0
    return speed.counts["train"] * config.steered_per_prompt * speed.steered_row(job)
