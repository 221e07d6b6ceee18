"""Steering on disk: directions from the scored pool, strengths on dev prompts, a steered pool."""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

from equipoise.config import SteerConfig
from equipoise.pipeline.job import (
    FLUENCY,
    Job,
    load_reward_models,
    load_scorer,
    policy_hash,
    read_prompts,
    read_scored,
    reward_hashes,
)
from equipoise.store.stagedir import Stage
from equipoise.types import Prompt, SteeredCompletion

if TYPE_CHECKING:
    from equipoise.engine.sample import TransformersEngine
    from equipoise.models.load import LoadedPolicy
    from equipoise.steer.directions import Directions

DIRECTIONS = "directions"
STRENGTHS = "strengths.json"


def steer(job: Job) -> None:
    """Find the directions, and how strongly each level needs them; resumes by strength."""
    recipe = job.recipe
    if recipe.steer is None:
        job.progress.say("steer: nothing to do (the recipe does not ask for it)")
        return
    stage = job.begin("steer", _models(job))
    if stage is None:
        return
    from equipoise.models.load import load_causal

    policy = load_causal(recipe.model, rendering=job.rendering)
    if not (stage.has(DIRECTIONS) and stage.has(FLUENCY)):
        _find(job, stage, policy, recipe.steer)
    directions = read_directions(stage)
    agreement = {name: round(share, 3) for name, share in directions.agreement.items()}
    dev = [prompt for prompt in read_prompts(job.run) if prompt.split == "dev"]
    if dev:
        dev = dev[: recipe.steer.max_prompts]
        _fit_strengths(job, stage, policy, recipe.steer, directions, dev)
    stage.finish(layer=directions.layer, agreement=agreement, dev_prompts=len(dev))
    job.progress.say(f"steer: layer {directions.layer}, prompts that agree: {agreement}")


def read_directions(stage: Any) -> Directions:
    """Return the directions of a ``steer`` stage, their hashes checked."""
    from equipoise.steer.directions import Directions

    return Directions.load(stage.directory(DIRECTIONS))


def steered_engine(
    policy: LoadedPolicy, directions: Directions, *, batch_size: int
) -> TransformersEngine:
    """Return an engine that can steer."""
    from equipoise.engine.sample import TransformersEngine

    return TransformersEngine.of(
        policy, batch_size=batch_size, steering=(directions.vectors, directions.layer)
    )


def regenerate(job: Job) -> None:
    """Sample, score and read the steered pool; resumes by batch."""
    recipe, config = job.recipe, job.recipe.regenerate
    if config is None:
        job.progress.say("regenerate: nothing to do (the recipe does not ask for it)")
        return
    stage = job.begin("regenerate", _models(job))
    if stage is None:
        return
    from equipoise.models.likelihood import Answer, read_answers
    from equipoise.models.load import load_causal
    from equipoise.pool.score import score
    from equipoise.steer.regeneration import batches_of
    from equipoise.steer.regeneration import regenerate as sample

    prompts = _steered_prompts(job)
    by_id = {prompt.id: prompt for prompt in prompts}
    policy = load_causal(recipe.model, rendering=job.rendering)
    models = load_reward_models(recipe.reward_models, job)
    engine = steered_engine(
        policy, read_directions(job.run.done("steer")), batch_size=recipe.generate.batch_size
    )
    batches = batches_of(prompts, policy.encoder, config, recipe.generate)
    done = [number for number in range(len(batches)) if stage.has(_shard(number))]
    sampled = sample(
        prompts,
        engine,
        policy.encoder,
        config,
        recipe.generate,
        dials=job.dials,
        seed=recipe.seed,
        done=done,
    )
    held = sum(len(batches[number]) for number in done)
    with job.progress.task("regenerate", len(prompts), done=held) as advance:
        for number, rows in sampled:
            kept = [
                (replace(one, text=text), strengths)
                for one, strengths in rows
                if (text := one.sentences)
            ]
            answers = [Answer(one.prompt_id, one.text, one.finish == "stop") for one, _ in kept]
            read = read_answers(policy.model, policy.encoder, answers, by_id)
            fluency = [reading.mean for reading in read]
            scored = [
                row for part in score([one for one, _ in kept], by_id, models) for row in part
            ]
            steered = [
                SteeredCompletion(row, strengths, mean)
                for row, (_, strengths), mean in zip(scored, kept, fluency, strict=True)
            ]
            cut = len(rows) - len(kept)
            stage.publish_rows(_shard(number), steered, SteeredCompletion, unfinished=cut)
            advance(len(batches[number]))
    facts = [stage.shard_facts(name) for name in stage.shards]
    stage.finish(
        scored=sum(int(fact["rows"]) for fact in facts),
        no_finished_sentence=sum(int(fact["unfinished"]) for fact in facts),
    )


def _models(job: Job) -> dict[str, str]:
    hashes = reward_hashes(job.recipe.reward_models, job)
    rewards = {f"reward/{attribute}": digest for attribute, digest in hashes.items()}
    return {"policy": policy_hash(job.recipe.model), **rewards}


def _find(job: Job, stage: Stage, policy: LoadedPolicy, config: SteerConfig) -> None:
    """Let the model read its own pool: directions, and its usual log-likelihood per prompt."""
    from equipoise.pool.calibrate import own_pool
    from equipoise.steer.directions import find_directions, read_pool
    from equipoise.steer.natural_gradient import natural_directions, read_gradients

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
    from equipoise.seeds import derive_seed
    from equipoise.steer.strengths import Tried, strengths_for_levels, try_strength

    recipe = job.recipe
    scorer = load_scorer(job)
    engine = steered_engine(policy, directions, batch_size=recipe.generate.batch_size)
    grid = sorted({0.0, *config.strengths})
    tried: dict[str, list[Tried]] = {name: [] for name in recipe.attributes}
    with job.progress.task("steer: try strengths", len(grid) * len(tried)) as advance:
        for name, found in tried.items():
            for strength in grid:
                file = f"tried/{name}/{strength:+g}.json"
                if not stage.has(file):
                    one = try_strength(
                        dev,
                        engine,
                        scorer,
                        attribute=name,
                        strength=strength,
                        sampling=recipe.generate.sampling,
                        seed=derive_seed(recipe.seed, "steer"),
                    )
                    stage.publish_bytes(file, json.dumps(asdict(one)).encode())
                found.append(Tried(**stage.read_json(file)))
                advance(1)
    by_level = {
        name: strengths_for_levels(found, recipe.levels, max_fluency_drop=config.max_fluency_drop)
        for name, found in tried.items()
    }
    rows = {name: [asdict(one) for one in found] for name, found in tried.items()}
    stage.publish_bytes(STRENGTHS, json.dumps({"by_level": by_level, "tried": rows}).encode())


def _steered_prompts(job: Job) -> list[Prompt]:
    """Return the training prompts that have own completions: the others have no usual fluency."""
    usual = job.run.done("steer").read_json(FLUENCY)
    return [prompt for prompt in read_prompts(job.run) if prompt.id in usual]


def _shard(number: int) -> str:
    return f"shard-{number:05d}.parquet"
