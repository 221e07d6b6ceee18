"""The recipe's responders: names to methods, each with the models it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from equipoise.config import Sampling
from equipoise.encoding.encode import Encoder
from equipoise.engine.sample import TransformersEngine
from equipoise.models.load import LoadedPolicy
from equipoise.pipeline.job import Job
from equipoise.pipeline.readers import (
    STRENGTHS,
    read_directions,
    read_examples,
    steered_engine,
)
from equipoise.recipes.check import rerank_size
from equipoise.rewards.scorer import Scorer
from equipoise.steer.prompting import Prompting, Wording
from equipoise.steer.reranking import Candidates, Reranking
from equipoise.steer.responders import Tuned, Untouched
from equipoise.steer.strengths import Steering, Strengths


def responders(job: Job, scorer: Scorer, untouched: Callable[[], LoadedPolicy]) -> Iterator[Any]:
    """Yield the recipe's responders, one after the other; a model is loaded when its turn comes.

    Args:
        job: The run.
        scorer: What reranking ranks by.
        untouched: Returns the untouched model, loaded once for all that need it.
    """
    recipe, config = job.recipe, job.recipe.evaluate
    sampling = config.sampling
    wanted = config.responders
    counts = [size for name in wanted if (size := rerank_size(name))]

    def engine_of(policy: LoadedPolicy) -> tuple[TransformersEngine, Encoder]:
        engine = TransformersEngine.of(policy, batch_size=config.batch_size)
        return engine, policy.encoder

    if set(wanted) - {"tuned", "steering"}:
        engine, encoder = engine_of(untouched())
        if "start" in wanted:
            yield Untouched(engine, encoder, sampling=sampling)
        if "prompting" in wanted:
            yield Prompting(
                engine,
                encoder,
                sampling=sampling,
                wording=Wording(
                    job.dials,
                    phrases=config.phrases,
                    in_context=config.in_context,
                    examples=read_examples(job.run) if config.in_context else (),
                ),
            )
        if counts:
            candidates = Candidates(
                engine,
                encoder,
                scorer,
                sampling,
                max(counts),
                config.rerank_stock,
            )
            for n in sorted(set(counts)):
                yield Reranking(candidates, n=n, levels=recipe.levels)
    if "steering" in wanted:
        yield _steering(job, untouched(), sampling)
    if "tuned" in wanted:
        engine, encoder = engine_of(job.tuned_policy())
        yield Tuned(engine, encoder, sampling=sampling)


def _steering(job: Job, policy: LoadedPolicy, sampling: Sampling) -> Any:
    stage = job.run.done("steer")
    by_level = stage.read_json(STRENGTHS)["by_level"]
    return Steering(
        steered_engine(policy, read_directions(stage), batch_size=job.recipe.evaluate.batch_size),
        policy.encoder,
        sampling=sampling,
        strengths=Strengths({name: tuple(by_level[name]) for name in job.recipe.attributes}),
    )
