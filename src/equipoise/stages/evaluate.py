"""Step 4 on disk: sweep every responder over unseen prompts, measure, and write the report."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import TYPE_CHECKING

from equipoise.pipeline.job import (
    Job,
    policy_hash,
    read_prompts,
    reward_hashes,
)
from equipoise.stages.judge import read_judges
from equipoise.stages.quality_of import AUTO, ONE_DIAL
from equipoise.stages.unseen import (
    REWARD,
    check_unseen,
    judges_in_training,
    warn_of_judges,
)
from equipoise.store.shards import to_plain
from equipoise.store.stagedir import Stage
from equipoise.types import Completion, Delivery, DialSetting, JudgeKind, Prompt, Responder

if TYPE_CHECKING:
    from equipoise.models.load import LoadedPolicy
    from equipoise.rewards.scorer import Scorer

PAGE = "report.html"
MEASURES = "measures.json"
_TITLES = {"deliveries": "", ONE_DIAL: ", one dial at a time", AUTO: ", all dials on auto"}
"""What the progress says of each folder of deliveries."""
CHUNK = 4
"""Prompts per shard of deliveries."""


def evaluate(job: Job) -> None:
    """Sweep every responder over the evaluated split and measure; resumes by shard."""
    recipe = job.recipe
    models = {"policy": policy_hash(recipe.model)}
    rewards, judged = (reward_hashes(c, job) for c in (recipe.reward_models, recipe.judges))
    for kind, hashes in (("reward", rewards), ("judge", judged)):
        models.update({f"{kind}/{attribute}": digest for attribute, digest in hashes.items()})
    if recipe.refusal_judge is not None:
        models.update(reward_hashes({"refusal judge": recipe.refusal_judge}, job))
    stage = job.begin("evaluate", models)
    if stage is None:
        return
    named = {f"{REWARD} {attribute}": digest for attribute, digest in rewards.items()}
    warn_of_judges(job, judges_in_training(named, judged))
    from equipoise.evaluate.sweep import sweep_settings
    from equipoise.models.load import load_causal
    from equipoise.stages.figures_of import measures_of
    from equipoise.stages.quality_of import benign
    from equipoise.stages.responders import responders

    @cache
    def untouched() -> LoadedPolicy:
        return load_causal(recipe.model, rendering=job.rendering)

    prompts = evaluated_prompts(job)
    intersections = check_unseen(job, prompts)
    judges = read_judges(job)
    n_attributes = len(recipe.attributes)
    grid = sweep_settings(job.dials, auto=False)
    for responder in responders(job, judges["optimization"], untouched):
        _sweep_one(job, stage, responder, prompts, judges, "deliveries", grid)
        # Auto is a control of its own: only a tuned policy has learnt one.
        if responder.name == "tuned" and recipe.evaluate.auto_sweep:
            both = sweep_settings(job.dials, auto=True)
            _sweep_one(job, stage, responder, prompts, judges, ONE_DIAL, both[len(grid) :])
        if responder.name == "tuned":
            free = [DialSetting((None,) * n_attributes)]
            _sweep_one(job, stage, responder, benign(prompts), judges, AUTO, free)
    measures = measures_of(job, stage, judges["generalization"].calibration, prompts, untouched)
    stage.publish_json(MEASURES, to_plain(replace(measures, intersections=intersections)))
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
    from equipoise.stages.report import render_report

    render_report(job, stage)
    stage.finish(text=job.text)


class Counted:
    """A responder and what it costs: judging its answers is no part of that."""

    def __init__(self, responder: Responder) -> None:
        self._responder, self.name, self.seconds = responder, responder.name, 0.0
        self.tokens_through_model = 0

    def respond(
        self, prompts: Sequence[Prompt], settings: Sequence[DialSetting], *, seed: int
    ) -> list[list[Completion]]:
        """Let it respond, and count."""
        start, before = time.monotonic(), self._responder.tokens_through_model
        found = self._responder.respond(prompts, settings, seed=seed)
        self.seconds += time.monotonic() - start
        self.tokens_through_model += self._responder.tokens_through_model - before
        return found


def _sweep_one(
    job: Job,
    stage: Stage,
    responder: Responder,
    prompts: Sequence[Prompt],
    judges: Mapping[JudgeKind, Scorer],
    folder: str,
    settings: Sequence[DialSetting],
) -> None:
    from equipoise.evaluate.sweep import sweep
    from equipoise.seeds import derive_seed

    recipe, config = job.recipe, job.recipe.evaluate
    if not settings:
        return
    chunks = [prompts[start : start + CHUNK] for start in range(0, len(prompts), CHUNK)]
    names = [f"{folder}/{responder.name}/shard-{i:05d}.parquet" for i in range(len(chunks))]
    held = sum(len(part) for name, part in zip(names, chunks, strict=True) if stage.has(name))
    # One seed for all methods: rerankers of different N share their samples by it.
    seed = derive_seed(recipe.seed, "evaluate")
    title = f"evaluate {responder.name}{_TITLES[folder]}"
    with job.progress.task(title, len(prompts), done=held) as advance:
        for name, part in zip(names, chunks, strict=True):
            if stage.has(name):
                continue
            counted = Counted(responder)
            swept = sweep(
                counted,
                part,
                settings,
                judges,
                seed=seed,
                repeats=config.repeats,
            )
            rows = [row for chunk in swept for row in chunk]
            cost = {"tokens": counted.tokens_through_model, "sampling_seconds": counted.seconds}
            stage.publish_rows(name, rows, Delivery, **cost)
            advance(len(part))
