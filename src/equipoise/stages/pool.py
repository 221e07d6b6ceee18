"""Step 1 on disk: prompts, reward models, the model's own answers, their scores."""

from __future__ import annotations

import hashlib
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from equipoise.config import Recipe
from equipoise.dials.dials import Dials
from equipoise.errors import DataError
from equipoise.overlap import prompt_key
from equipoise.pipeline.job import (
    CALIBRATION,
    FITTED,
    PROMPTS,
    Job,
    load_reward_models,
    note_skipped,
    policy_hash,
    read_prompts,
    reward_hashes,
)
from equipoise.pipeline.room import check_context
from equipoise.store.shards import rows_to_jsonl
from equipoise.store.stagedir import Stage
from equipoise.types import Completion, ScoredCompletion

if TYPE_CHECKING:
    from equipoise.pool.generate import Ask


def prompts(job: Job) -> None:
    """Load all splits, refuse what cannot be used, and keep the prompts in the run."""
    stage = job.begin("prompts", {"policy": policy_hash(job.recipe.model)})
    if stage is None:
        return
    from equipoise.data.prompts import check_lengths, load_prompts
    from equipoise.data.sources import Skipped
    from equipoise.encoding.encode import Encoder
    from equipoise.models.files import clear_errors
    from equipoise.models.hub import resolve_model
    from equipoise.models.load import load_tokenizer
    from equipoise.models.read import read_config

    config, skipped = job.recipe.prompts, Skipped()
    loaded = load_prompts(config, data=job.data, seed=job.recipe.seed, skipped=skipped)
    place = resolve_model(job.recipe.model)
    with clear_errors(job.recipe.model, " (its tokenizer)"):
        encoder = Encoder(load_tokenizer(place), rendering=job.rendering)
    unread = skipped.count
    kept = check_lengths(loaded, encoder, config, skipped=skipped)
    dropped = len(loaded) - len(kept) - (skipped.count - unread)
    counts = {name: sum(p.split == name for p in kept) for name in ("train", "dev", "test")}
    if not counts["train"] or not counts["test"]:
        raise DataError(
            "no prompts left to train or to test on",
            why=f"after dropping over-long ones and skipping bad rows there are {counts}",
            fix="raise prompts.max_prompt_tokens, repair the rows, or add sources",
        )
    check_context(job.recipe, kept, encoder, read_config(place))
    stage.publish_bytes(PROMPTS, rows_to_jsonl(kept))
    note_skipped(stage, skipped)
    stage.finish(counts=counts, dropped=dropped)
    left_out = f"; {skipped.count} bad rows skipped" if skipped.count else ""
    left_out += f"; {dropped} over-long ones dropped" if dropped else ""
    job.progress.say(
        f"prompts: {counts['train']} train, {counts['dev']} dev, {counts['test']} test{left_out}"
    )


def fit_reward(job: Job) -> None:
    """Train the recipe's own reward models, if it has any."""
    recipe = job.recipe
    if not recipe.fit_reward:
        job.progress.say("fit-reward: nothing to do (the recipe trains none)")
        return
    backbones = {name: policy_hash(config.backbone) for name, config in recipe.fit_reward.items()}
    evaluated: set[str] = set()
    trained: set[str] = set()
    configs = recipe.fit_reward.values()
    if any(config.leave_out_test or config.leave_out_train for config in configs):
        if not job.run.is_done("prompts"):
            prompts(job)
        for prompt in read_prompts(job.run):
            (trained if prompt.split == "train" else evaluated).add(prompt_key(prompt.messages))
    for name, keys, asked in (
        ("dev and test prompts", evaluated, any(c.leave_out_test for c in configs)),
        ("training prompts", trained, any(c.leave_out_train for c in configs)),
    ):
        if asked:
            backbones[name] = hashlib.sha256("\n".join(sorted(keys)).encode()).hexdigest()
    stage = job.begin("fit-reward", backbones)
    if stage is None:
        return
    from equipoise.data.pairs import load_labelled, load_pairs
    from equipoise.data.sources import Skipped
    from equipoise.rewards.fit import fit_reward as fit

    for name, config in recipe.fit_reward.items():
        folder = f"{FITTED}/{name}"
        if stage.has(folder):
            continue
        load = load_pairs if config.kind == "pairs" else load_labelled
        skipped = Skipped()
        rows = load(config.sources, data=job.data, seed=recipe.seed, skipped=skipped)
        note_skipped(stage, skipped, name)
        left_out = {*(evaluated if config.leave_out_test else ())}
        left_out |= {*(trained if config.leave_out_train else ())}
        if left_out:
            read = len(rows)
            rows = [row for row in rows if prompt_key(row.prompt.messages) not in left_out]  # type: ignore[assignment]
            job.progress.say(f"fit-reward {name}: {read - len(rows)} rows of the run's prompts")
        with job.progress.steps(f"fit-reward {name}") as on_step:

            def build(directory: Path) -> None:
                # Each directory is built before the next turn of the loop.
                fit(
                    rows,  # noqa: B023
                    config,  # noqa: B023
                    attribute=name,  # noqa: B023
                    out_dir=directory / "made",
                    seed=recipe.seed,
                    on_step=on_step,
                )
                for file in list((directory / "made").iterdir()):
                    file.rename(directory / file.name)
                (directory / "made").rmdir()

            stage.publish_directory(folder, build)
    stage.finish()


def generate(job: Job) -> None:
    """Sample K completions per training prompt from the untouched model; resumes by batch."""
    recipe = job.recipe
    stage = job.begin("generate", {"policy": policy_hash(recipe.model)})
    if stage is None:
        return
    from equipoise.engine.sample import TransformersEngine
    from equipoise.models.load import load_causal
    from equipoise.pool.generate import generate as sample

    config = recipe.generate
    train = [prompt for prompt in read_prompts(job.run) if prompt.split == "train"]
    # One shard per batch of the sampler: whole batches are repeated after a kill, so that a
    # resumed run computes, and writes, the same bytes.
    per_shard = max(1, config.batch_size // config.completions_per_prompt)
    names = [_shard(index) for index in range(-(-len(train) // per_shard))]
    done = _published_prompts(stage)
    policy = load_causal(recipe.model, rendering=job.rendering)
    engine = TransformersEngine.of(policy, batch_size=config.batch_size)
    rows = sample(
        train,
        engine,
        policy.encoder,
        config,
        seed=recipe.seed,
        done=done,
        cells=job.dials.cells(),
        ask=_in_words(recipe) if config.prompted_per_prompt else None,
    )
    with job.progress.task("generate", len(train), done=len(done)) as advance:
        for name in names:
            if stage.has(name):
                continue
            part = list(islice(rows, per_shard))
            stage.publish_rows(name, [row for group in part for row in group], Completion)
            advance(len(part))
    per_prompt = config.completions_per_prompt + config.prompted_per_prompt
    stage.finish(completions=len(train) * per_prompt)


def _in_words(recipe: Recipe) -> Ask:
    from equipoise.steer.prompting import Wording

    dials = Dials(tuple(recipe.attributes), recipe.levels)
    return Wording(dials, phrases=recipe.generate.phrases).messages


def score(job: Job) -> None:
    """Score every completion once with every reward model, then calibrate on the pool."""
    recipe = job.recipe
    stage = job.begin("score", reward_hashes(recipe.reward_models, job))
    if stage is None:
        return
    from equipoise.pool.calibrate import calibrate, own_pool
    from equipoise.pool.score import score as score_rows
    from equipoise.pool.score import shortened

    by_id = {prompt.id: prompt for prompt in read_prompts(job.run)}
    source = job.run.done("generate")
    models = load_reward_models(recipe.reward_models, job)
    total = sum(source.shard_facts(name)["rows"] for name in source.shards)
    held = sum(source.shard_facts(name)["rows"] for name in source.shards if stage.has(name))
    cut = 0
    with job.progress.task("score", total, done=held) as advance:
        for name in source.shards:
            completions = source.read_shard(name, Completion)
            # What is scored is what is learnt from: an answer that the token limit cut ends with
            # its last finished sentence.
            kept = shortened(completions)
            cut += len(completions) - len(kept)
            if stage.has(name):
                continue
            scored = [row for chunk in score_rows(kept, by_id, models) for row in chunk]
            stage.publish_rows(name, scored, ScoredCompletion)
            advance(len(completions))
    pool = [row for rows in stage.read_rows(ScoredCompletion) for row in rows]
    if not pool:
        raise DataError(
            "the pool is empty",
            why="no completion holds a finished sentence",
            fix="raise generate.sampling.max_tokens",
        )
    calibration = calibrate(own_pool(pool), mode=recipe.score.calibration)
    stage.publish_bytes(CALIBRATION, calibration.to_json().encode())
    stage.finish(scored=len(pool), no_finished_sentence=cut)


def _published_prompts(stage: Stage) -> set[str]:
    rows = stage.read_rows(Completion, prefix="shard-")
    return {completion.prompt_id for shard in rows for completion in shard}


def _shard(index: int) -> str:
    return f"shard-{index:05d}.parquet"
