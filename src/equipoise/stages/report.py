"""Gather ``report.json`` from the stages' files and render it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from equipoise.errors import RunError
from equipoise.evaluate.measures import Measures
from equipoise.models.hub import resolve_model
from equipoise.pipeline.job import CURVE, Job
from equipoise.pipeline.plan import read_plan
from equipoise.pipeline.readers import (
    JUDGED_POOL,
    MEASURES,
    START_CURVE,
    read_deliveries,
    read_prompts,
    read_skipped,
    workshop_parser,
)
from equipoise.pipeline.rundir import RunDir
from equipoise.pipeline.unseen import judges_by_hash
from equipoise.pool.moec import MoecReport
from equipoise.recipes.source import map_models, shown_model
from equipoise.report.data import BackDoors, ModelFacts, Report, Scale, ShownRecipe, Skipped
from equipoise.report.render import render
from equipoise.report.sampler import Texts
from equipoise.rewards.card import read_card
from equipoise.store.shards import from_plain
from equipoise.store.stagedir import Stage
from equipoise.store.stagefiles import StageFiles
from equipoise.types import Delivery


def report(job: Job, stage: Stage) -> None:
    """Write ``report.html``, ``report.json`` and the figures."""
    made = stage.work / "page"
    shutil.rmtree(made, ignore_errors=True)
    with job.run.writing():
        render(gather(job), made, texts=_texts(job) if job.text else None)
    for file in sorted(path for path in made.rglob("*") if path.is_file()):
        stage.publish_bytes(file.relative_to(made).as_posix(), file.read_bytes())
    stage.finish(text=job.text)


def _texts(job: Job) -> Texts:
    evaluated = job.run.done("evaluate")
    deliveries: dict[str, list[Delivery]] = {}
    for method in job.recipe.evaluate.responders:
        deliveries[method] = read_deliveries(evaluated, method)
    marks = None
    if workshop_parser(job.recipe):
        from equipoise.worlds.workshop.oracle import marked

        marks = marked
    return Texts(deliveries, {prompt.id: prompt for prompt in read_prompts(job.run)}, marks)


def gather(job: Job) -> Report:
    """Return all that is known of the run.

    Raises:
        RunError: The measures are those of a version that cannot be read.
    """
    run = job.run
    scored, distilled, tuned = run.done("score"), run.done("distil"), run.done("tune")
    measures = _measures(run)
    loaded = run.done("prompts").facts()
    counts, dropped = loaded["counts"], loaded.get("dropped", 0)
    recipe = map_models(job.recipe.model_dump(mode="json"), lambda _, name: shown_model(name))
    # The folder of the data is the user's own affair: reports are passed on.
    recipe["data"] = None
    return Report(
        methods=measures.methods,
        differences=measures.differences,
        ceiling=measures.ceiling,
        n={
            "training prompts": counts["train"],
            "dev prompts": counts["dev"],
            "test prompts": counts["test"],
            **({"over-long prompts dropped": dropped} if dropped else {}),
            "completions in the pool": scored.facts()["scored"],
            "tuning examples": distilled.facts()["examples"],
            **measures.n,
        },
        intersections=measures.intersections,
        recipe=ShownRecipe.model_validate(recipe),
        judges_in_training=judges_by_hash(run),
        pool=from_plain(dict[str, Scale], run.done("judge").read_json(JUDGED_POOL)),
        no_finished_sentence=scored.facts()["no_finished_sentence"],
        skipped=from_plain(dict[str, Skipped], read_skipped(run)),
        moec=from_plain(MoecReport, distilled.read_json("moec.json")),
        backdoor=from_plain(BackDoors, distilled.read_json("backdoor.json")),
        losses=losses_of(tuned),
        reward_models=_cards(job),
        stages=run.minutes(),
        planned=read_plan(run.path),
    )


def _measures(run: RunDir) -> Measures:
    try:
        found: Measures = from_plain(Measures, run.done("evaluate").read_json(MEASURES))
    except (TypeError, ValueError, AttributeError) as error:
        raise RunError(
            f"{MEASURES} of this run cannot be read",
            why=f"it was written by another version of Equipoise ({error})",
            fix=f"measure again: equipoise stage evaluate {run.path} --fresh",
        ) from error
    return found


def losses_of(tuned: StageFiles) -> dict[str, dict[str, list[float | None]]]:
    """Return the curves of a tuning, by column; those without a step are left out."""
    curves = {"tuned": tuned.read_json(CURVE)}
    if START_CURVE in tuned.outputs:
        curves["steered start"] = tuned.read_json(START_CURVE)
    # An earlier version, which began the tuning, may have logged other columns than the last row's.
    return {
        name: {key: [row.get(key) for row in rows] for key in rows[-1]}
        for name, rows in curves.items()
        if rows
    }


def _cards(job: Job) -> dict[str, ModelFacts]:
    """Return what is known of every fitted reward model and judge, its rows left out."""
    found: dict[str, ModelFacts] = {}
    refusal = job.recipe.refusal_judge
    for kind, configs in (
        ("reward", job.recipe.reward_models),
        ("judge", job.recipe.judges),
        ("judge", {} if refusal is None else {"refusals": refusal}),
    ):
        for attribute, config in configs.items():
            name = f"{kind} {attribute}"
            known: dict[str, Any] = {}
            if config.oracle is None:
                place = Path(resolve_model(config.model, fitted_root=job.fitted_root))
                card = read_card(place) if place.is_dir() else None
                hidden = {"train_prompts", "held_out_prompts"}
                known = card.model_dump(mode="json", exclude=hidden) if card else {}
            found[name] = ModelFacts(model=shown_model(config.model), **known)
    return found
