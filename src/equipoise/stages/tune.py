"""Step 3 on disk: the dials are tuned, checkpointed, and saved with their manifest."""

from __future__ import annotations

import json
from pathlib import Path

from equipoise.dials.tokens import save_dial_model
from equipoise.encoding.encode import Encoder
from equipoise.engine.sample import TransformersEngine
from equipoise.evaluate.measure import measure
from equipoise.evaluate.sweep import sweep, sweep_settings
from equipoise.models.hub import resolve_model
from equipoise.pipeline.job import CURVE, MODEL, Job
from equipoise.pipeline.plan import Speed, pass_size
from equipoise.pipeline.readers import (
    START_CURVE,
    load_scorer,
    prompts_of,
    read_calibration,
    read_directions,
    read_examples,
    read_judges,
)
from equipoise.rewards.load import reward_hash
from equipoise.rlhf.closeness import closeness, deaf_floor
from equipoise.rlhf.tune import Material, Probe, tune_by_rlhf
from equipoise.seeds import derive_seed
from equipoise.stats import Bootstrap
from equipoise.steer.responders import Tuned
from equipoise.store.stagedir import Stage
from equipoise.training.loop import Training
from equipoise.tune.rehearsal import rehearse_policy
from equipoise.tune.shifts import ShiftDirections
from equipoise.tune.trainer import TunedPolicy
from equipoise.tune.trainer import tune as train
from equipoise.types import Prompt


def tune(job: Job, stage: Stage) -> None:
    """Tune the policy on the distilled set, or online; resumes from the newest checkpoint."""
    recipe = job.recipe
    checkpoints = stage.work / "checkpoints"
    if not checkpoints.is_dir():
        _rehearse(job, stage.work / "rehearsal")
    by = _tune_by_rlhf if recipe.tune.objective == "rlhf" else _tune_on_examples
    with job.progress.steps("tune") as on_step, job.run.writing():
        tuned = by(job, Training(checkpoints, recipe.seed, on_step))
    manifest = tuned.manifest.model_copy(
        update={
            "calibration": json.loads(read_calibration(job.run).to_json()),
            "reward_models": {
                attribute: reward_hash(config, fitted_root=job.fitted_root)
                for attribute, config in recipe.reward_models.items()
            },
        }
    )

    def build(directory: Path) -> None:
        save_dial_model(tuned.model, tuned.tokenizer, manifest, directory)

    stage.publish_directory(MODEL, build)
    stage.publish_json(CURVE, tuned.curve)
    if tuned.start_curve:
        stage.publish_json(START_CURVE, tuned.start_curve)
    stage.finish(dtype=tuned.dtype, steps=len(tuned.curve), seconds=tuned.seconds)


def _rehearse(job: Job, folder: Path) -> None:
    """Find out before the first step whether what will be saved can be loaded."""
    recipe = job.recipe
    with job.run.writing():
        rehearse_policy(
            resolve_model(job.place(recipe.model)),
            recipe.tune,
            folder,
            dials=job.dials,
            rendering=job.rendering,
        )


def _tune_on_examples(job: Job, training: Training) -> TunedPolicy:
    recipe = job.recipe
    return train(
        job.policy(),
        read_examples(job.run),
        recipe.tune,
        dials=job.dials,
        training=training,
        base_model=recipe.model,
        steering=steering_of(job),
    )


def steering_of(job: Job) -> ShiftDirections | None:
    """Return the directions that `tune.steered_start` distils; none without it."""
    if job.recipe.tune.steered_start is None:
        return None
    found = read_directions(job.run.done("steer"))
    return ShiftDirections(found.vectors, found.layer)


def _tune_by_rlhf(job: Job, training: Training) -> TunedPolicy:
    """Tune by RLHF with the run's own reward models and calibration."""
    recipe = job.recipe
    job.progress.say(
        f"tune: a policy deaf to its dials earns {deaf_floor(recipe.levels):.3f}; "
        "read the rewards of rlhf against that"
    )
    material = Material(
        start=job.policy(),
        prompts=prompts_of(job.run, "train"),
        examples=read_examples(job.run) if recipe.tune.rlhf.warm_start else (),
        scorer=load_scorer(job),
    )
    return tune_by_rlhf(
        job.policy(),
        material,
        recipe.tune,
        dials=job.dials,
        training=training,
        base_model=recipe.model,
        probe=_probe(job) if recipe.tune.rlhf.probe_every else None,
    )


def _probe(job: Job) -> Probe:
    """Return a function that sweeps the grid on a few prompts and asks both kinds of judges."""
    recipe, judges, prompts = job.recipe, read_judges(job), _watched_prompts(job)
    settings = sweep_settings(job.dials, auto=False)
    sampling = recipe.evaluate.sampling

    def probe(engine: TransformersEngine, encoder: Encoder) -> dict[str, float]:
        chunks = sweep(
            Tuned(engine, encoder, sampling=sampling),
            prompts,
            settings,
            judges,
            seed=derive_seed(recipe.seed, "rlhf probe"),
        )
        deliveries = [row for chunk in chunks for row in chunk]
        found: dict[str, float] = {}
        for kind in judges:
            near = [
                closeness([d.unit[kind][a] for a in recipe.attributes], d.setting, recipe.levels)
                for d in deliveries
            ]
            found[f"{kind}_closeness"] = sum(near) / len(near)
            measured = measure(
                deliveries,
                judge=kind,
                dials=job.dials,
                bootstrap=Bootstrap(0, 0),
            )
            for attribute, estimate in measured.mp.items():
                found[f"{kind}_mp_{attribute}"] = estimate.value
        return found

    return probe


def _watched_prompts(job: Job) -> list[Prompt]:
    """Dev prompts, else training prompts: the test prompts are read once, at the end."""
    found = prompts_of(job.run, "dev") or prompts_of(job.run, "train")
    return found[: job.recipe.tune.rlhf.probe_prompts]


def cost(job: Job, speed: Speed) -> float:
    """Return estimated seconds; RLHF also samples, scores and compares."""
    recipe, config = job.recipe, job.recipe.tune
    branches = 1 + (config.objective == "exmate")
    row = speed.prompt_tokens + branches * recipe.generate.sampling.max_tokens
    if config.objective != "rlhf":
        learnt = config.steps * config.batch_size * row / speed.trained
        return _steered_start_cost(job, speed) + learnt
    warm = config.rlhf.warm_start * config.batch_size * row / speed.trained
    completion = config.rlhf.sampling.max_tokens
    text = speed.prompt_tokens + completion
    # The reference reads what is trained on, forward only: a third of the work.
    per_row = completion / speed.sampled + 4 / 3 * text / speed.trained
    per_row += 2 * text * pass_size(recipe.reward_models, job) / speed.flops
    return warm + config.steps * config.online_batch_size * per_row


def _steered_start_cost(job: Job, speed: Speed) -> float:
    recipe, config = job.recipe, job.recipe.tune.steered_start
    if config is None:
        return 0.0
    # Behind one prompt under 2^A settings, and once without controls, forward only; up to the
    # directions' layer.
    natural = recipe.steer is not None and recipe.steer.directions == "natural_gradient"
    depth = 0.6 if natural else 0.4
    prompt, text = speed.prompt_tokens, float(config.tokens)
    settings: int = 2 ** len(recipe.attributes)
    length = prompt + settings * text + (prompt + text) / 3
    return depth * config.steps * config.batch_size * length / speed.trained
