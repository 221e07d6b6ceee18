"""The pool: the model's own completions of the training prompts."""

from __future__ import annotations

from equipoise.engine.sample import TransformersEngine
from equipoise.pipeline.job import Job, shard_name
from equipoise.pipeline.plan import Speed
from equipoise.pipeline.readers import prompts_of
from equipoise.pool.generate import batches_of, generate_batch
from equipoise.steer.prompting import Wording
from equipoise.store.stagedir import Stage
from equipoise.types import Completion, Prompt


def generate(job: Job, stage: Stage) -> None:
    """Sample K completions per training prompt from the untouched model; resumes by batch."""
    recipe, config = job.recipe, job.recipe.generate
    train = prompts_of(job.run, "train")
    policy = job.policy()
    engine = TransformersEngine.of(policy, batch_size=config.batch_size)
    in_words = Wording(job.dials, phrases=config.phrases)

    def make(name: str, batch: list[Prompt]) -> None:
        rows = generate_batch(
            batch,
            engine,
            policy.encoder,
            config,
            seed=recipe.seed,
            cells=job.dials.cells(),
            ask=in_words.messages if config.prompted_per_prompt else None,
        )
        stage.publish_rows(name, [row for group in rows for row in group], Completion)

    # One shard per batch of the sampler: a batch is sampled whole.
    batches = batches_of(train, policy.encoder, config)
    parts = {shard_name(index): batch for index, batch in enumerate(batches)}
    job.make_missing(stage, "generate", parts, make, size=len)
    per_prompt = config.completions_per_prompt + config.prompted_per_prompt
    stage.finish(completions=len(train) * per_prompt)


def cost(job: Job, speed: Speed) -> float:
    """Return estimated seconds."""
    return speed.pool(job) * job.recipe.generate.sampling.max_tokens / speed.sampled
