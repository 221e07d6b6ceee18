"""Step 4 on disk: sweep every responder over unseen prompts, measure, and write the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from equipoise.stages.inputs import (
    Job,
    load_reward_models,
    policy_hash,
    read_calibration,
    read_prompts,
    read_scored,
    reward_hashes,
)
from equipoise.stages.unseen import check_unseen
from equipoise.store.stagedir import Stage
from equipoise.types import (
    Delivery,
    DialSetting,
    JudgeKind,
    Prompt,
    RewardModel,
    ScoredCompletion,
)

if TYPE_CHECKING:
    from equipoise.models.load import LoadedPolicy
    from equipoise.pool.calibrate import Calibration

PAGE = "report.html"
MEASURES = "measures.json"
JUDGE_CALIBRATION = "judge-calibration.json"
CHUNK = 4
"""Prompts per shard of deliveries."""


@dataclass(frozen=True)
class Bench:
    """The two kinds of judges, calibrated on the same pool: the start model's own."""

    judges: Mapping[JudgeKind, Mapping[str, RewardModel]]
    calibrations: Mapping[JudgeKind, Calibration]


def evaluate(job: Job) -> None:
    """Sweep every responder over the evaluated split and measure; resumes by shard."""
    recipe = job.recipe
    models = {"policy": policy_hash(recipe.model)}
    for kind, configs in (("reward", recipe.reward_models), ("judge", recipe.judges)):
        hashes = reward_hashes(configs, job)
        models.update({f"{kind}/{attribute}": digest for attribute, digest in hashes.items()})
    if recipe.refusal_judge is not None:
        models.update(reward_hashes({"refusal judge": recipe.refusal_judge}, job))
    stage = job.begin("evaluate", models)
    if stage is None:
        return
    from equipoise.evaluate.report import plain
    from equipoise.evaluate.sweep import sweep_settings
    from equipoise.models.load import load_causal
    from equipoise.stages.figures_of import measures_of
    from equipoise.stages.quality_of import AUTO, benign
    from equipoise.stages.responders import responders

    @cache
    def untouched() -> LoadedPolicy:
        return load_causal(recipe.model)

    prompts = evaluated_prompts(job)
    intersections = check_unseen(job, prompts)
    bench = _bench(job, stage)
    n_attributes = len(recipe.attributes)
    for responder in responders(job, bench, untouched):
        tuned = responder.name == "tuned"
        # Auto is a control of its own: only a tuned policy has learnt one.
        auto = recipe.evaluate.auto_sweep and tuned
        settings = sweep_settings(n_attributes, recipe.levels, auto=auto)
        _sweep_one(job, stage, responder, prompts, bench, "deliveries", settings)
        if tuned:
            free = [DialSetting((None,) * n_attributes)]
            _sweep_one(job, stage, responder, benign(prompts), bench, AUTO, free)
    measures = measures_of(job, stage, bench, prompts, untouched)
    stage.publish_json(MEASURES, plain({**measures, "intersections": intersections}))
    stage.finish(prompts=len(prompts))


def evaluated_prompts(job: Job) -> list[Prompt]:
    """Return the prompts of the evaluated split, at most ``max_prompts``."""
    config = job.recipe.evaluate
    found = [prompt for prompt in read_prompts(job.run) if prompt.split == config.split]
    return found[: config.max_prompts]


def report(job: Job) -> None:
    """Write ``report.json``, the page and the figures."""
    stage = job.run.begin("report", fresh=job.fresh)
    if stage.complete and stage.facts().get("text") != job.text:
        # With and without text are two views of one run: no reason to refuse.
        job.run.drop_from("report")
        stage = job.run.begin("report")
    if stage.complete:
        job.progress.say("report: nothing to do")
        return
    from equipoise.stages.rendering import render_report

    render_report(job, stage)
    stage.finish(text=job.text)


def _bench(job: Job, stage: Stage) -> Bench:
    from equipoise.evaluate.report import plain
    from equipoise.pool.calibrate import calibrate, calibration_report, own_pool
    from equipoise.pool.score import score

    recipe = job.recipe
    judges: dict[JudgeKind, Mapping[str, RewardModel]] = {
        "optimization": load_reward_models(recipe.reward_models, job),
        "generalization": load_reward_models(recipe.judges, job),
    }
    source, by_id = job.run.done("score"), {p.id: p for p in read_prompts(job.run)}
    shards = [name for name in source.shards if name.startswith("shard-")]
    with job.progress.task("judge the pool", len(shards)) as advance:
        for name in shards:
            if not stage.has(f"pool/{name}"):
                rows = source.read_shard(name, ScoredCompletion)
                chunks = score([row.completion for row in rows], by_id, judges["generalization"])
                judged = [row for chunk in chunks for row in chunk]
                stage.publish_rows(f"pool/{name}", judged, ScoredCompletion)
            advance(1)
    pool = [row for rows in stage.read_rows(ScoredCompletion, prefix="pool/") for row in rows]
    calibration = calibrate(own_pool(pool), mode="pooled")
    stage.publish_bytes(JUDGE_CALIBRATION, calibration.to_json().encode())
    trained = read_calibration(job.run)
    facts = calibration_report(own_pool(read_scored(job.run)), trained, judged=own_pool(pool))
    stage.publish_json("pool.json", plain(facts))
    return Bench(judges, {"optimization": trained, "generalization": calibration})


def _sweep_one(
    job: Job,
    stage: Stage,
    responder: Any,
    prompts: Sequence[Prompt],
    bench: Bench,
    folder: str,
    settings: Sequence[DialSetting],
) -> None:
    from equipoise.evaluate.sweep import sweep
    from equipoise.seeds import derive_seed

    recipe, config = job.recipe, job.recipe.evaluate
    chunks = [prompts[start : start + CHUNK] for start in range(0, len(prompts), CHUNK)]
    names = [f"{folder}/{responder.name}/shard-{i:05d}.parquet" for i in range(len(chunks))]
    held = sum(len(part) for name, part in zip(names, chunks, strict=True) if stage.has(name))
    # One seed for all methods: rerankers of different N share their samples by it.
    seed = derive_seed(recipe.seed, "evaluate")
    title = f"evaluate {responder.name}" + (", dials on auto" if folder != "deliveries" else "")
    with job.progress.task(title, len(prompts), done=held) as advance:
        for name, part in zip(names, chunks, strict=True):
            if stage.has(name):
                continue
            before = responder.tokens_through_model
            swept = sweep(
                responder,
                part,
                settings,
                bench.judges,
                bench.calibrations,
                seed=seed,
                repeats=config.repeats,
            )
            rows = [row for chunk in swept for row in chunk]
            tokens = responder.tokens_through_model - before
            stage.publish_rows(name, rows, Delivery, tokens=tokens)
            advance(len(part))
