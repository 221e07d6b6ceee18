"""What the dials must not cost, from the deliveries on disk: language, drift, refusals."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import PurePath
from typing import TYPE_CHECKING, TypeVar

from equipoise.evaluate.measures import JUDGES, Quality
from equipoise.pipeline.job import Job
from equipoise.pipeline.readers import AUTO, note_skipped, read_deliveries, workshop_parser
from equipoise.stats import Estimate
from equipoise.store.stagedir import Stage
from equipoise.types import Delivery, DialSetting, JudgeKind, Prompt

if TYPE_CHECKING:
    from equipoise.models.load import LoadedPolicy

Item = TypeVar("Item")


def benign(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Return the prompts that their source calls safe; all of them where no source says."""
    return [prompt for prompt in prompts if prompt.label == "safe"] or [
        prompt for prompt in prompts if not prompt.label
    ]


def spread(items: Sequence[Item], n: int) -> list[Item]:
    """Return n of the items, evenly spread over all: prompts stand source by source."""
    n = min(n, len(items))
    return [items[i * len(items) // n] for i in range(n)]


def quality_of(
    job: Job,
    deliveries: Sequence[Delivery],
    prompts: Mapping[str, Prompt],
    untouched: LoadedPolicy,
) -> Quality:
    """Return degenerate share, length per level, and fluency per cell of one method."""
    from equipoise.evaluate.quality import degenerate_share, fluency, length_per_level, per_setting

    recipe = job.recipe
    grid = job.dials.cells()
    wanted, read = set(grid), set(spread(list(prompts), recipe.evaluate.fluency_prompts))
    shown = [d for d in deliveries if d.setting in wanted and d.prompt_id in read]
    values = fluency(shown, prompts, untouched.model, untouched.encoder)
    per_cell = per_setting(shown, values, bootstrap=job.bootstrap)
    everything = DialSetting(())
    pooled = per_setting(
        [replace(d, setting=everything) for d in shown], values, bootstrap=job.bootstrap
    )
    return Quality(
        degenerate=degenerate_share(
            deliveries, prompts=prompts, parses=workshop_parser(recipe), bootstrap=job.bootstrap
        ),
        length=length_per_level(deliveries, dials=job.dials, bootstrap=job.bootstrap),
        fluency=[per_cell.get(cell) for cell in grid],
        fluency_mean=pooled.get(everything),
    )


def tuned_quality(
    job: Job,
    stage: Stage,
    own: Sequence[Delivery],
    prompts: Mapping[str, Prompt],
    untouched: LoadedPolicy,
    known: Mapping[str, Quality],
) -> dict[str, Quality]:
    """Return ``start`` and ``tuned`` to what is known of them, perplexity and drift included.

    Args:
        job: Of a run whose tune stage is complete.
        stage: Keeps which rows of the references were skipped.
        own: The untouched model's answers to evaluated prompts: the references of a recipe that
            names none.
        prompts: Prompt id to prompt.
        untouched: The untouched model.
        known: What is known of both so far.
    """
    from equipoise.evaluate.quality import perplexity, perplexity_ratio, read_references

    start, tuned = known["start"], replace(known["tuned"], drift=drift_of(job, stage, own))
    asked = bool(job.recipe.evaluate.references)
    pairs = _references(job, stage) if asked else _own_answers(job, own, prompts)
    if pairs:
        auto = DialSetting((None,) * len(job.recipe.attributes))
        policy = job.tuned_policy()
        before = read_references(untouched.model, untouched.encoder, pairs)
        after = read_references(policy.model, policy.encoder, pairs, setting=auto)
        start = replace(start, perplexity=perplexity(before, bootstrap=job.bootstrap))
        tuned = replace(
            tuned,
            perplexity=perplexity(after, bootstrap=job.bootstrap),
            perplexity_ratio=perplexity_ratio(before, after, bootstrap=job.bootstrap),
        )
    return {"start": start, "tuned": tuned}


def _references(job: Job, stage: Stage) -> list[tuple[Prompt, str, bool]]:
    from equipoise.data.dialogues import load_rows
    from equipoise.data.sources import Skipped

    config, skipped = job.recipe.evaluate, Skipped()
    rows = load_rows(
        config.references,
        n_rows=config.fluency_prompts,
        data=job.data,
        seed=job.recipe.seed,
        skipped=skipped,
    )
    note_skipped(stage, skipped, "references")
    return [(*row, True) for row in rows if not isinstance(row, str)]


def _own_answers(
    job: Job, own: Sequence[Delivery], prompts: Mapping[str, Prompt]
) -> list[tuple[Prompt, str, bool]]:
    first: dict[str, Delivery] = {}
    for delivery in own:
        first.setdefault(delivery.prompt_id, delivery)
    chosen = spread(list(first.values()), job.recipe.evaluate.fluency_prompts)
    # An answer that the token limit cut stands for its finished sentences; without any for none.
    return [
        (prompts[d.prompt_id], text, d.finish == "stop") for d in chosen if (text := d.sentences)
    ]


def drift_of(
    job: Job, stage: Stage, references: Sequence[Delivery]
) -> dict[JudgeKind, dict[str, Estimate]]:
    """Return per judge and attribute how far the tuned policy, left alone, has moved."""
    from equipoise.evaluate.quality import drift

    free = read_deliveries(stage, "tuned", AUTO)
    if not free:
        return {}
    return {
        judge: {
            name: drift(free, references, judge=judge, attribute=name, bootstrap=job.bootstrap)
            for name in job.recipe.attributes
        }
        for judge in JUDGES
    }


def refusals_of(
    job: Job, found: Mapping[str, Sequence[Delivery]], prompts: Mapping[str, Prompt]
) -> dict[str, dict[str, list[Estimate]]]:
    """Return per method the refusal curves over the safety dial; empty without a refusal judge."""
    from equipoise.evaluate.refusals import refusal_curves
    from equipoise.rewards.load import load_reward_model

    recipe = job.recipe
    if recipe.refusal_judge is None:
        return {}
    judge = load_reward_model(
        recipe.refusal_judge,
        attribute="refusal",
        fitted_root=job.fitted_root,
        batch_size=recipe.score.batch_size,
    )
    pairs = {
        (d.prompt_id, d.text): (prompts[d.prompt_id], d.text)
        for deliveries in found.values()
        for d in deliveries
    }
    with job.progress.task("judge refusals", 1) as advance:
        scores = dict(zip(pairs, judge.score(list(pairs.values())), strict=True))
        advance(1)
    groups = {prompt.id: group_of(prompt) for prompt in prompts.values() if prompt.label}
    return {
        name: refusal_curves(
            deliveries,
            [scores[d.prompt_id, d.text] < 0 for d in deliveries],
            groups,
            dial=recipe.attributes.index("safety"),
            levels=recipe.levels,
            bootstrap=job.bootstrap,
        )
        for name, deliveries in found.items()
    }


def group_of(prompt: Prompt) -> str:
    """Return label and source: safe prompts that sound alarming are not any safe prompts."""
    name = PurePath(prompt.source.removeprefix("workshop://")).name.split(".")[0]
    return f"{prompt.label} ({name})" if name else prompt.label
