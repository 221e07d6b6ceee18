"""Step 3 on disk: the dials are tuned, checkpointed, and saved with their manifest."""

from __future__ import annotations

import json
from pathlib import Path

from equipoise.stages.inputs import Job, policy_hash, read_calibration, reward_hashes
from equipoise.stages.pool import read_examples

MODEL = "model"


def tune(job: Job) -> None:
    """Tune the policy on the distilled set; resumes from the newest complete checkpoint."""
    recipe = job.recipe
    stage = job.begin("tune", {"policy": policy_hash(recipe.model)})
    if stage is None:
        return
    from equipoise.dials.tokens import save_dial_model
    from equipoise.models.load import load_causal
    from equipoise.tune.trainer import tune as train

    examples = read_examples(job)
    with job.progress.steps("tune") as on_step, job.run.writing():
        tuned = train(
            load_causal(recipe.model),
            examples,
            recipe.tune,
            attributes=recipe.attributes,
            levels=recipe.levels,
            seed=recipe.seed,
            checkpoints=stage.work / "checkpoints",
            base_model=recipe.model,
            on_step=on_step,
        )
    manifest = tuned.manifest.model_copy(
        update={
            "calibration": json.loads(read_calibration(job.run).to_json()),
            "reward_models": reward_hashes(recipe.reward_models, job),
        }
    )

    def build(directory: Path) -> None:
        save_dial_model(tuned.model, tuned.tokenizer, manifest, directory)

    stage.publish_directory(MODEL, build)
    stage.publish_json("curve.json", tuned.curve)
    stage.finish(dtype=tuned.dtype, steps=recipe.tune.steps, seconds=tuned.seconds)
