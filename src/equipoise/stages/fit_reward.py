"""Reward models of the run's own, trained on pairs or labelled answers."""

from __future__ import annotations

from functools import partial

from equipoise.data.pairs import load_labelled, load_pairs
from equipoise.data.sources import Skipped
from equipoise.overlap import prompt_key
from equipoise.pipeline.job import FITTED, Job
from equipoise.pipeline.plan import Speed, rows_of, size_of
from equipoise.pipeline.readers import note_skipped, prompt_keys
from equipoise.rewards.fit import build_reward
from equipoise.store.stagedir import Stage


def fit_reward(job: Job, stage: Stage) -> None:
    """Train one model after the other."""
    recipe = job.recipe
    for name, config in recipe.fit_reward.items():
        folder = f"{FITTED}/{name}"
        if stage.has(folder):
            continue
        load = load_pairs if config.kind == "pairs" else load_labelled
        skipped = Skipped()
        rows = load(config.sources, data=job.data, seed=recipe.seed, skipped=skipped)
        note_skipped(stage, skipped, name)
        splits = (*(("dev", "test") if config.leave_out_test else ()),
                  *(("train",) if config.leave_out_train else ()))  # fmt: skip
        left_out = prompt_keys(job.run, splits) if splits else set()
        if left_out:
            read = len(rows)
            rows = [row for row in rows if prompt_key(row.prompt.messages) not in left_out]  # type: ignore[assignment]
            job.progress.say(f"fit-reward {name}: {read - len(rows)} rows of the run's prompts")
        placed = config.model_copy(update={"backbone": job.place(config.backbone)})
        with job.progress.steps(f"fit-reward {name}") as on_step:
            build = partial(
                build_reward, rows, placed, attribute=name, seed=recipe.seed, on_step=on_step
            )
            stage.publish_directory(folder, build)
    stage.finish()


def cost(job: Job, speed: Speed) -> float:
    """Return estimated seconds."""
    flops = 0.0
    for config in job.recipe.fit_reward.values():
        rows = sum(rows_of(source, job.data) for source in config.sources)
        sides = 2 if config.kind == "pairs" else 1
        per_token = 2 if config.head_only else 6 * config.epochs
        # Most rows are shorter than the limit.
        flops += rows * sides * 0.7 * config.max_length * per_token * size_of(config.backbone, job)
    return flops / speed.flops
