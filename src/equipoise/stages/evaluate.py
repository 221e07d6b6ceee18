"""Step 4 on disk: sweep every responder over unseen prompts, and measure."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cache, partial

from equipoise.evaluate.sweep import sweep, sweep_settings
from equipoise.pipeline.job import Job, shard_name
from equipoise.pipeline.plan import Speed, pass_size
from equipoise.pipeline.readers import (
    AUTO,
    CHUNK,
    GRID,
    MEASURES,
    ONE_DIAL,
    evaluated_prompts,
    read_judges,
)
from equipoise.pipeline.unseen import (
    REWARD,
    check_unseen,
    judges_in_training,
    of_kind,
    warn_of_judges,
)
from equipoise.recipes.check import rerank_size
from equipoise.rewards.scorer import Scorer
from equipoise.seeds import derive_seed
from equipoise.stages.figures_of import measures_of
from equipoise.stages.quality_of import benign
from equipoise.stages.responders import responders
from equipoise.store.shards import to_plain
from equipoise.store.stagedir import Stage
from equipoise.types import Completion, Delivery, DialSetting, JudgeKind, Prompt, Responder

_TITLES = {GRID: "", ONE_DIAL: ", one dial at a time", AUTO: ", all dials on auto"}
"""What the progress says of each folder of deliveries."""


def evaluate(job: Job, stage: Stage) -> None:
    """Sweep every responder over the evaluated split and measure; resumes by shard."""
    recipe, models = job.recipe, stage.fingerprint["models"]
    rewards = {f"{REWARD} {name}": digest for name, digest in of_kind("reward", models).items()}
    warn_of_judges(job, judges_in_training(rewards, of_kind("judge", models)))
    untouched = cache(job.policy)
    prompts = evaluated_prompts(job)
    intersections = check_unseen(job, prompts)
    judges = read_judges(job)
    grid = sweep_settings(job.dials, auto=False)
    for responder in responders(job, judges["optimization"], untouched):
        sweep_one = partial(_sweep_one, job, stage, responder, judges=judges)
        sweep_one(GRID, prompts, grid)
        # Auto is a control of its own: only a tuned policy has learnt one.
        if responder.name == "tuned" and recipe.evaluate.auto_sweep:
            both = sweep_settings(job.dials, auto=True)
            sweep_one(ONE_DIAL, prompts, both[len(grid) :])
        if responder.name == "tuned":
            sweep_one(AUTO, benign(prompts), [DialSetting((None,) * len(recipe.attributes))])
    measures = measures_of(job, stage, judges["generalization"].calibration, prompts, untouched)
    stage.publish_json(MEASURES, to_plain(replace(measures, intersections=intersections)))
    stage.finish(prompts=len(prompts))


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
    folder: str,
    prompts: Sequence[Prompt],
    settings: Sequence[DialSetting],
    *,
    judges: Mapping[JudgeKind, Scorer],
) -> None:
    recipe = job.recipe
    if not settings:
        return
    # One seed for all methods: rerankers of different N share their samples by it.
    seed = derive_seed(recipe.seed, "evaluate")

    def make(name: str, part: Sequence[Prompt]) -> None:
        counted = Counted(responder)
        swept = sweep(
            counted,
            part,
            settings,
            judges,
            seed=seed,
            repeats=recipe.evaluate.repeats,
        )
        rows = [row for chunk in swept for row in chunk]
        cost = {"tokens": counted.tokens_through_model, "sampling_seconds": counted.seconds}
        stage.publish_rows(name, rows, Delivery, **cost)

    parts = {
        f"{folder}/{responder.name}/{shard_name(i)}": prompts[start : start + CHUNK]
        for i, start in enumerate(range(0, len(prompts), CHUNK))
    }
    title = f"evaluate {responder.name}{_TITLES[folder]}"
    job.make_missing(stage, title, parts, make, size=len)


def cost(job: Job, speed: Speed) -> float:
    """Return estimated seconds: every method's answers are sampled, and judged."""
    recipe, config = job.recipe, job.recipe.evaluate
    count = speed.counts[config.split]
    settings: int = recipe.levels ** len(recipe.attributes)
    answers = min(count, config.max_prompts or count) * settings * config.repeats
    samples = [rerank_size(name) or 1 for name in config.responders]
    single = float(sum(n == 1 for n in samples))
    if config.auto_sweep and "tuned" in config.responders and len(recipe.attributes) > 1:
        # Only the tuned model is swept with a dial on auto.
        single += recipe.levels * len(recipe.attributes) / settings
    reranked = float(max([n for n in samples if n > 1], default=0))
    if config.rerank_stock is not None and reranked:
        # The stock is drawn once per prompt, not once per setting.
        reranked = config.rerank_stock / settings
    sampled = answers * (single + reranked) * config.sampling.max_tokens
    judged, rewards = pass_size(recipe.judges, job), pass_size(recipe.reward_models, job)
    read = answers * ((single + (reranked > 0)) * (judged + rewards) + reranked * rewards)
    text = speed.prompt_tokens + config.sampling.max_tokens
    return sampled / speed.sampled + 2 * text * read / speed.flops
