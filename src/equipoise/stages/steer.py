"""Steering on disk: directions from the scored pool, and strengths on dev prompts."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import asdict

from equipoise.config import SteerConfig
from equipoise.models.load import LoadedPolicy
from equipoise.pipeline.job import Job
from equipoise.pipeline.plan import Speed, size_of
from equipoise.pipeline.readers import (
    DIRECTIONS,
    FLUENCY,
    STRENGTHS,
    load_scorer,
    prompts_of,
    read_directions,
    read_prompts,
    read_scored,
    steered_engine,
)
from equipoise.pool.calibrate import own_pool
from equipoise.seeds import derive_seed
from equipoise.steer.directions import Directions, find_directions, read_pool
from equipoise.steer.natural_gradient import natural_directions, read_gradients
from equipoise.steer.strengths import Tried, strengths_for_levels, try_strength
from equipoise.store.stagedir import Stage
from equipoise.types import Prompt


def steer(job: Job, stage: Stage) -> None:
    """Find the directions, and how strongly each level needs them; resumes by strength."""
    config = job.recipe.steer
    assert config is not None
    policy = job.policy()
    if not (stage.has(DIRECTIONS) and stage.has(FLUENCY)):
        _find(job, stage, policy, config)
    directions = read_directions(stage)
    agreement = {name: round(share, 3) for name, share in directions.agreement.items()}
    dev = prompts_of(job.run, "dev")[: config.max_prompts]
    if dev:
        _fit_strengths(job, stage, policy, config, directions, dev)
    stage.finish(layer=directions.layer, agreement=agreement, dev_prompts=len(dev))
    job.progress.say(f"steer: layer {directions.layer}, prompts that agree: {agreement}")


def _find(job: Job, stage: Stage, policy: LoadedPolicy, config: SteerConfig) -> None:
    """Let the model read its own pool: directions, and its usual log-likelihood per prompt."""
    scored = own_pool(read_scored(job.run))
    by_id = {prompt.id: prompt for prompt in read_prompts(job.run)}
    n_prompts = len({row.completion.prompt_id for row in scored})
    with job.progress.task("steer: read the pool", n_prompts) as advance:
        if config.directions == "natural_gradient":
            answers = read_gradients(scored, by_id, policy, layer=config.layer, on_prompt=advance)
            directions = natural_directions(
                scored, answers, attributes=job.recipe.attributes, damping=config.damping
            )
            read = answers.means
        else:
            reading = read_pool(scored, by_id, policy, layer=config.layer, on_prompt=advance)
            directions = find_directions(scored, reading, attributes=job.recipe.attributes)
            read = reading.means
    means: dict[str, list[float]] = defaultdict(list)
    for row, mean in zip(scored, read, strict=True):
        if mean == mean:  # not NaN
            means[row.completion.prompt_id].append(mean)
    usual = {prompt_id: sum(found) / len(found) for prompt_id, found in means.items()}
    stage.publish_directory(DIRECTIONS, directions.save)
    stage.publish_json(FLUENCY, usual)


def _fit_strengths(
    job: Job,
    stage: Stage,
    policy: LoadedPolicy,
    config: SteerConfig,
    directions: Directions,
    dev: list[Prompt],
) -> None:
    recipe = job.recipe
    scorer = load_scorer(job)
    engine = steered_engine(policy, directions, batch_size=recipe.generate.batch_size)
    files = {
        f"tried/{name}/{strength:+g}.json": (name, strength)
        for name in recipe.attributes
        for strength in sorted({0.0, *config.strengths})
    }

    def make(file: str, part: tuple[str, float]) -> None:
        attribute, strength = part
        one = try_strength(
            dev,
            engine,
            scorer,
            attribute=attribute,
            strength=strength,
            sampling=recipe.generate.sampling,
            seed=derive_seed(recipe.seed, "steer"),
        )
        stage.publish_bytes(file, json.dumps(asdict(one)).encode())

    job.make_missing(stage, "steer: try strengths", files, make)
    tried: dict[str, list[Tried]] = {name: [] for name in recipe.attributes}
    for file, (name, _) in files.items():
        tried[name].append(Tried(**stage.read_json(file)))
    by_level = {
        name: strengths_for_levels(found, recipe.levels, max_fluency_drop=config.max_fluency_drop)
        for name, found in tried.items()
    }
    rows = {name: [asdict(one) for one in found] for name, found in tried.items()}
    stage.publish_bytes(STRENGTHS, json.dumps({"by_level": by_level, "tried": rows}).encode())


def cost(job: Job, speed: Speed) -> float:
    """Return estimated seconds: the pool is read, then strengths are tried."""
    recipe, config = job.recipe, job.recipe.steer
    if config is None:
        return 0.0
    length = recipe.generate.sampling.max_tokens
    own = speed.counts["train"] * recipe.generate.completions_per_prompt
    read = 2 * own * length * size_of(recipe.model, job) / speed.flops
    if config.directions == "natural_gradient":
        read *= 2  # there and back
    strengths = len(recipe.attributes) * len({0.0, *config.strengths})
    rows = strengths * min(speed.counts["dev"], config.max_prompts)
    return read + rows * speed.steered_row(job)
