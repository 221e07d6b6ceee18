"""Step 3 on disk: the dials are tuned, checkpointed, and saved with their manifest."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from equipoise.pipeline.job import Job, policy_hash, read_calibration, reward_hashes
from equipoise.stages.distil import read_examples
from equipoise.stages.rlhf import tune_online

if TYPE_CHECKING:
    from equipoise.tune.shifts import ShiftDirections

MODEL = "model"
START_CURVE = "start.json"
"""Of distilled steering, if there was any."""


def check_thoughts(job: Job) -> None:
    """Refuse a start model that thinks before it answers, at no more cost than its tokenizer."""
    from equipoise.encoding.encode import Encoder
    from equipoise.encoding.thoughts import refuse_thoughts
    from equipoise.models.hub import resolve_model
    from equipoise.models.load import load_tokenizer

    tokenizer = load_tokenizer(resolve_model(job.recipe.model))
    refuse_thoughts(Encoder(tokenizer, rendering=job.rendering))


def tune(job: Job) -> None:
    """Tune the policy on the distilled set, or online; resumes from the newest checkpoint."""
    recipe = job.recipe
    models = {"policy": policy_hash(recipe.model)}
    if recipe.tune.objective == "rlhf":
        for kind, configs in (("reward", recipe.reward_models), ("judge", recipe.judges)):
            hashes = reward_hashes(configs, job)
            models.update({f"{kind}/{attribute}": digest for attribute, digest in hashes.items()})
    stage = job.begin("tune", models)
    if stage is None:
        return
    from equipoise.dials.tokens import save_dial_model
    from equipoise.models.load import load_causal
    from equipoise.rewards.load import reward_hash
    from equipoise.training.loop import Training
    from equipoise.tune.trainer import tune as train

    checkpoints = stage.work / "checkpoints"
    if not checkpoints.is_dir():
        _rehearse(job, stage.work / "rehearsal")
    with job.progress.steps("tune") as on_step, job.run.writing():
        training = Training(checkpoints, recipe.seed, on_step)
        if recipe.tune.objective == "rlhf":
            tuned = tune_online(job, training)
        else:
            tuned = train(
                load_causal(recipe.model, rendering=job.rendering),
                read_examples(job),
                recipe.tune,
                dials=job.dials,
                training=training,
                base_model=job.run.recipe.model,
                steering=steering_of(job),
            )
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
    stage.publish_json("curve.json", tuned.curve)
    if tuned.start_curve:
        stage.publish_json(START_CURVE, tuned.start_curve)
    stage.finish(dtype=tuned.dtype, steps=len(tuned.curve), seconds=tuned.seconds)


def _rehearse(job: Job, folder: Path) -> None:
    """Find out before the first step whether what will be saved can be loaded."""
    from equipoise.models.hub import resolve_model
    from equipoise.tune.rehearsal import rehearse_policy

    recipe = job.recipe
    with job.run.writing():
        rehearse_policy(
            resolve_model(recipe.model),
            recipe.tune,
            folder,
            dials=job.dials,
            rendering=job.rendering,
        )


def steering_of(job: Job) -> ShiftDirections | None:
    """Return the directions that `tune.steered_start` distils; none without it."""
    if job.recipe.tune.steered_start is None:
        return None
    from equipoise.stages.steer import read_directions
    from equipoise.tune.shifts import ShiftDirections

    found = read_directions(job.run.done("steer"))
    return ShiftDirections(found.vectors, found.layer)
