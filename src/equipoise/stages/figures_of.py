"""From the deliveries on disk to the numbers of the report: control, cost, quality, ceiling."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from equipoise.evaluate.measures import JUDGES, Ceiling, Cost, Measures, Method, Quality
from equipoise.pipeline.job import CURVE, Job
from equipoise.pipeline.readers import (
    GRID,
    ONE_DIAL,
    START_CURVE,
    read_deliveries,
    workshop_parser,
)
from equipoise.recipes.check import rerank_size
from equipoise.store.stagedir import Stage
from equipoise.types import JudgeKind, Prompt, ScoredCompletion, UnitScale

if TYPE_CHECKING:
    from equipoise.evaluate.measure import ControlReport
    from equipoise.models.load import LoadedPolicy


def measures_of(
    job: Job,
    stage: Stage,
    scale: UnitScale,
    prompts: Sequence[Prompt],
    untouched: Callable[[], LoadedPolicy],
) -> Measures:
    """Return all that is measured of the deliveries; the intersections are left to the caller."""
    from equipoise.evaluate.measure import compare_mp, measure
    from equipoise.stages.quality_of import quality_of, refusals_of, tuned_quality

    config, dials, bootstrap = job.recipe.evaluate, job.dials, job.bootstrap
    found = {name: read_deliveries(stage, name) for name in config.responders}
    by_id = {prompt.id: prompt for prompt in prompts}
    controls: dict[str, dict[JudgeKind, ControlReport]] = {}
    qualities: dict[str, Quality] = {}
    with job.progress.task("measure", len(found)) as advance:
        for name, deliveries in found.items():
            swept = [*deliveries, *read_deliveries(stage, name, ONE_DIAL)]
            controls[name] = {
                judge: measure(swept, judge=judge, dials=dials, bootstrap=bootstrap)
                for judge in JUDGES
            }
            qualities[name] = quality_of(job, deliveries, by_id, untouched())
            advance(1)
    if "tuned" in found and "start" in found:
        qualities |= tuned_quality(job, stage, found["start"], by_id, untouched(), qualities)
    refusals = refusals_of(job, found, by_id)
    others = [name for name in found if "tuned" in found and name != "tuned"]
    return Measures(
        methods={
            name: Method(
                **controls[name],
                cost=_cost(job, stage, name),
                quality=qualities[name],
                refusals=refusals.get(name),
            )
            for name in found
        },
        differences={
            f"tuned − {other}": compare_mp(
                found["tuned"],
                found[other],
                judge="generalization",
                dials=dials,
                bootstrap=bootstrap,
            )
            for other in others
        },
        ceiling=_ceiling(job, scale, prompts),
        n={f"evaluated prompts ({config.split})": len(prompts), "repeats": config.repeats},
    )


def _cost(job: Job, stage: Stage, method: str) -> Cost:
    facts = {name: stage.shard_facts(name) for name in stage.shards if name.startswith(f"{GRID}/")}

    def total(key: str, chosen: str) -> float:
        start = f"{GRID}/{chosen}/"
        return sum(float(fact[key]) for name, fact in facts.items() if name.startswith(start))

    seconds = total("sampling_seconds", method)
    counts = {name: size for name in job.recipe.evaluate.responders if (size := rerank_size(name))}
    if method in counts:
        # Rerankers share one sampling pass; each is charged its own part of it.
        shared = sum(total("sampling_seconds", name) for name in counts)
        seconds = shared * counts[method] / max(counts.values())
    cost = Cost(seconds, total("tokens", method))
    if method != "tuned":
        return cost
    tuned = job.run.done("tune")
    names = [name for name in (CURVE, START_CURVE) if name in tuned.outputs]
    curves = [tuned.read_json(name) for name in names]
    return replace(
        cost,
        steps=float(tuned.facts()["steps"]),
        tuning_seconds=60 * tuned.minutes,
        tuning_tokens=sum(curve[-1]["tokens"] for curve in curves if curve),
    )


def _ceiling(job: Job, scale: UnitScale, prompts: Sequence[Prompt]) -> Ceiling:
    """Measure a policy that picks, per prompt and cell, the completion nearest both targets.

    In the Workshop it picks among all that the grammar can write, for the evaluated prompts. On
    real data nobody knows what could be written: "best of pool by judge" takes its place, over the
    training prompts and their pool.
    """
    from equipoise.evaluate.measure import measure_grid
    from equipoise.evaluate.metrics import ceiling_grid

    recipe = job.recipe
    oracles = {name: config.model for name, config in recipe.judges.items()}
    known = oracles == {name: f"workshop://oracle/{name}" for name in ("helpfulness", "safety")}
    if known and workshop_parser(recipe) and recipe.attributes == ["helpfulness", "safety"]:
        from equipoise.worlds.workshop.ceiling import ceiling_candidates

        name = "attainable ceiling"
        candidates = ceiling_candidates(prompts, scale, seed=recipe.seed)
    else:
        name, candidates = "best of pool by judge", _pool_candidates(job, scale)
    grid = ceiling_grid(candidates, dials=job.dials)
    measured = measure_grid(grid, bootstrap=job.bootstrap)
    return Ceiling(name=name, generalization=measured)


def _pool_candidates(job: Job, scale: UnitScale) -> list[Any]:
    import numpy as np

    units: dict[str, list[list[float]]] = defaultdict(list)
    for rows in job.run.done("judge").read_rows(ScoredCompletion):
        for row in rows:
            scores = [scale.unit(name, row.raw[name]) for name in job.recipe.attributes]
            units[row.completion.prompt_id].append(scores)
    return [np.array(rows) for rows in units.values()]
