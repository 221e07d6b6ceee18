"""RLHF on disk: what the tune stage reads for it, and the looks at both judges on the way."""

from __future__ import annotations

from typing import TYPE_CHECKING

from equipoise.pipeline.job import (
    Job,
    load_reward_models,
    load_scorer,
    read_prompts,
    read_scored,
)
from equipoise.stages.distil import read_examples
from equipoise.stats import Bootstrap
from equipoise.types import JudgeKind, Prompt

if TYPE_CHECKING:
    from equipoise.encoding.encode import Encoder
    from equipoise.engine.sample import TransformersEngine
    from equipoise.rewards.scorer import Scorer
    from equipoise.rlhf.tune import Probe
    from equipoise.training.loop import Training
    from equipoise.tune.trainer import TunedPolicy

JUDGED_FOR_SCALE = 1000
"""Pool rows that give the judges a unit scale while tuning; the evaluation judges the whole."""


def tune_online(job: Job, training: Training) -> TunedPolicy:
    """Tune by RLHF with the run's own reward models and calibration."""
    from equipoise.models.load import load_causal
    from equipoise.rlhf.closeness import deaf_floor
    from equipoise.rlhf.tune import Material, tune_by_rlhf

    recipe = job.recipe
    train_prompts = [p for p in read_prompts(job.run) if p.split == "train"]
    job.progress.say(
        f"tune: a policy deaf to its dials earns {deaf_floor(recipe.levels):.3f}; "
        "read the rewards of rlhf against that"
    )
    material = Material(
        load_causal(recipe.model, rendering=job.rendering),
        train_prompts,
        read_examples(job) if recipe.tune.rlhf.warm_start else (),
        load_scorer(job),
    )
    return tune_by_rlhf(
        load_causal(recipe.model, rendering=job.rendering),
        material,
        recipe.tune,
        dials=job.dials,
        training=training,
        base_model=job.run.recipe.model,
        probe=_probe(job) if recipe.tune.rlhf.probe_every else None,
    )


def _probe(job: Job) -> Probe:
    """Return a function that sweeps the grid on a few prompts and asks both kinds of judges."""
    from equipoise.evaluate.measure import measure
    from equipoise.evaluate.sweep import sweep, sweep_settings
    from equipoise.rlhf.closeness import closeness
    from equipoise.seeds import derive_seed
    from equipoise.steer.responders import Tuned as TunedResponder

    recipe = job.recipe
    judges: dict[JudgeKind, Scorer] = {
        "optimization": load_scorer(job),
        "generalization": _judges(job),
    }
    prompts = _watched_prompts(job)
    settings = sweep_settings(job.dials, auto=False)

    def probe(engine: TransformersEngine, encoder: Encoder) -> dict[str, float]:
        responder = TunedResponder(engine, encoder, sampling=recipe.evaluate.sampling)
        chunks = sweep(
            responder,
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
    prompts = read_prompts(job.run)
    dev = [p for p in prompts if p.split == "dev"]
    found = dev or [p for p in prompts if p.split == "train"]
    return found[: job.recipe.tune.rlhf.probe_prompts]


def _judges(job: Job) -> Scorer:
    """Load the judges and calibrate them on an even part of the start model's own pool."""
    from equipoise.pool.calibrate import calibrate, own_pool
    from equipoise.pool.score import score
    from equipoise.rewards.scorer import Scorer

    by_id = {p.id: p for p in read_prompts(job.run)}
    own = own_pool(read_scored(job.run))
    part = own[:: -(-len(own) // JUDGED_FOR_SCALE)]
    judges = load_reward_models(job.recipe.judges, job)
    rows = score([row.completion for row in part], by_id, judges)
    scale = calibrate([row for chunk in rows for row in chunk], mode="pooled")
    return Scorer(judges, scale)
