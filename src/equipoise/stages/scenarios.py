"""What every scenario of a dial policy delivers in a run."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from equipoise.engine.sample import TransformersEngine
from equipoise.evaluate.scenarios import ScenariosReport, measure_scenarios, scenario_settings
from equipoise.evaluate.sweep import sweep
from equipoise.models.hub import model_hash
from equipoise.pipeline.job import MODEL, Job
from equipoise.pipeline.readers import (
    CHUNK,
    GRID,
    ONE_DIAL,
    SCENARIOS,
    evaluated_prompts,
    read_deliveries,
    read_judges,
)
from equipoise.policy.file import find_policy, load_policy
from equipoise.seeds import derive_seed
from equipoise.steer.responders import Tuned
from equipoise.store.publish import json_bytes, publish_bytes
from equipoise.store.shards import to_plain
from equipoise.types import Delivery, DialSetting

RESULT, TABLE = "scenarios.json", "scenarios.md"


def scenarios(job: Job, *, policy: str) -> Path:
    """Measure every scenario on the evaluated prompts, as JSON and as a table.

    Deliveries that the evaluate stage has sampled are taken from there: it turned every dial over
    the same prompts. Only settings that it left out are sampled now, with the same seeds.

    Args:
        job: Of a run whose evaluate stage is complete.
        policy: A policy file, or a shipped policy.

    Returns:
        The folder of the JSON and the table: ``RUN/scenarios/POLICY``.

    Raises:
        RunError: The evaluate stage is not complete.
        ConfigError: The policy does not fit the model.
    """
    recipe, tuned = job.recipe, job.run.done("tune").directory(MODEL)
    file = find_policy(policy)
    rules = load_policy(file, job.dials)
    settings = scenario_settings(rules, job.dials)
    wanted = list(dict.fromkeys(s for stands in settings.values() for s in stands.values()))
    measured = measure_scenarios(
        settings,
        list(_deliveries(job, wanted)),
        dials=job.dials,
        bootstrap=job.bootstrap,
    )
    reasons = {name: scenario.why for name, scenario in rules.scenarios.items()}
    measured = replace(
        measured,
        scenarios={n: replace(one, why=reasons[n]) for n, one in measured.scenarios.items()},
    )
    facts = {
        "policy": file.stem,
        "policy_hash": rules.hash,
        "model_hash": model_hash(str(tuned)),
        "split": recipe.evaluate.split,
        "sampling": recipe.evaluate.sampling.model_dump(mode="json"),
    }
    place = job.run.path / SCENARIOS / file.stem
    with job.run.writing():
        place.mkdir(parents=True, exist_ok=True)
        publish_bytes(place / RESULT, json_bytes({**facts, **to_plain(measured)}))
        publish_bytes(place / TABLE, scenario_table(measured).encode())
    return place


def scenario_table(measured: ScenariosReport) -> str:
    """Return a Markdown table: asked for and delivered, per scenario and attribute.

    Deliveries are mean unit scores with 95 % intervals, by the judges where they were asked.
    """
    judge = min(measured.judges)  # generalization, if it is there
    head = ["scenario", "setting"]
    head += [f"{name}, {what}" for name in measured.attributes for what in ("asked", "delivered")]
    rows = [head, ["---"] * len(head)]
    for name, scenario in measured.scenarios.items():
        for said, stood in (("default", scenario.default), ("least safe", scenario.loosest)):
            row = [name, said]
            for attribute in measured.attributes:
                asked, found = stood.target[attribute], stood.delivered[judge][attribute]
                row.append("auto" if asked is None else f"{asked:.2f}")
                row.append(f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f})")
            rows.append(row)
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def _deliveries(job: Job, wanted: Sequence[DialSetting]) -> Iterable[Delivery]:
    """Return the deliveries of the wanted settings; what the run lacks is sampled."""
    evaluated = job.run.done("evaluate")
    held = [
        row
        for folder in (GRID, ONE_DIAL)
        for row in read_deliveries(evaluated, "tuned", folder)
        if row.setting in set(wanted)
    ]
    missing = [setting for setting in wanted if setting not in {row.setting for row in held}]
    yield from held
    if missing:
        yield from _sampled(job, missing)


def _sampled(job: Job, settings: Sequence[DialSetting]) -> Iterable[Delivery]:
    recipe, config = job.recipe, job.recipe.evaluate
    policy = job.tuned_policy()
    engine = TransformersEngine.of(policy, batch_size=config.batch_size)
    judges = read_judges(job)
    prompts = evaluated_prompts(job)
    chunks = sweep(
        Tuned(engine, policy.encoder, sampling=config.sampling),
        prompts,
        settings,
        judges,
        seed=derive_seed(recipe.seed, "evaluate"),
        repeats=config.repeats,
        chunk=CHUNK,
    )
    with job.progress.task("evaluate scenarios", len(prompts)) as advance:
        for rows in chunks:
            yield from rows
            advance(min(CHUNK, len(prompts)))
