"""Forge lift of a run's tuned model, measured over HTTP on loopback."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from equipoise.dials.dials import Dials
from equipoise.pipeline.job import Job
from equipoise.pipeline.readers import SCENARIOS, evaluated_prompts, read_judges
from equipoise.policy.decide import Server, allowed_levels
from equipoise.policy.file import find_policy, load_policy
from equipoise.policy.rules import DialPolicy, Key
from equipoise.store.publish import json_bytes, publish_bytes
from equipoise.store.shards import to_plain
from equipoise.types import DialSetting

if TYPE_CHECKING:
    from equipoise.models.load import LoadedPolicy

RESULT = "forge.json"
_NAME = "model"
_AT_ONCE = 64
"""Requests under way, each in a slot: a step of many rows costs little more than one of few."""


def forge(job: Job, *, policy: str, answers: int) -> Path:
    """Serve the run's tuned model, forge, measure, and write ``forge.json``.

    The setting is the middle of what the widest scenario allows: there a dial has room both ways.

    Args:
        job: Of a run whose evaluate stage is complete.
        policy: A policy file, or a shipped policy.
        answers: Per prompt and version.

    Returns:
        The file: ``RUN/scenarios/POLICY/forge.json``.

    Raises:
        ServingError: The server gave no answers.
    """
    from equipoise.evaluate.forge import ForgePlan, measure_forge
    from equipoise.steer.served import HttpResponder

    recipe, config = job.recipe, job.recipe.evaluate
    file = find_policy(policy)
    rules = load_policy(file, job.dials)
    scenario, setting = widest(rules, job.dials)
    loaded = job.tuned_policy()
    judges = read_judges(job)
    sampling = config.sampling
    prompts = evaluated_prompts(job)
    plan = ForgePlan(job.dials, repeats=answers, phrases=config.phrases, bootstrap=job.bootstrap)
    with (
        served(loaded, file, rules) as (url, key),
        job.progress.task("forge", plan.n_answers(len(prompts))) as advance,
    ):
        measured = measure_forge(
            HttpResponder(
                url,
                key,
                f"{_NAME}@{scenario}",
                attributes=recipe.attributes,
                sampling=sampling.model_copy(
                    update={
                        "temperature": min(sampling.temperature, 2.0),
                        "max_tokens": min(sampling.max_tokens, rules.limits.max_tokens),
                    }
                ),
                workers=_AT_ONCE,
            ),
            prompts,
            setting,
            judges,
            plan,
            on_answers=advance,
        )
    facts = {
        "scenario": scenario,
        "policy_hash": rules.hash,
        "model_hash": loaded.hash,
        "split": config.split,
    }
    place = job.run.path / SCENARIOS / file.stem
    with job.run.writing():
        place.mkdir(parents=True, exist_ok=True)
        publish_bytes(place / RESULT, json_bytes({**facts, **to_plain(measured)}))
    return place / RESULT


def widest(policy: DialPolicy, dials: Dials) -> tuple[str, DialSetting]:
    """Return the scenario that allows the most cells, and the middle of its ranges."""
    server = Server(dials, policy.server, policy.round_up)
    ranges = {
        name: [allowed_levels(attribute, {}, scenario, server) for attribute in dials.attributes]
        for name, scenario in policy.scenarios.items()
    }
    name = max(ranges, key=lambda name: math.prod(len(allowed) for allowed in ranges[name]))
    return name, DialSetting(tuple(allowed[len(allowed) // 2] for allowed in ranges[name]))


@contextmanager
def served(loaded: LoadedPolicy, file: Path, policy: DialPolicy) -> Iterator[tuple[str, str]]:
    """Serve a model on a free loopback port while the block runs; yields its URL and a key."""
    from equipoise.engine.batcher import ContinuousBatcher
    from equipoise.policy.keys import digest, new_secret
    from equipoise.policy.reload import RulesSource
    from equipoise.serve.app import Api, build_app
    from equipoise.serve.http import on_loopback
    from equipoise.serve.main import LOCAL_HOSTS, served_model

    secret = new_secret()
    # A key of its own, so that the policy's rate for strangers does not slow a measurement down.
    key = Key(
        id="measuring",
        sha256=digest(secret),
        scenarios=tuple(policy.scenarios),
        requests_per_minute=10**6,
    )
    model = served_model(loaded, _NAME)
    source = RulesSource(
        file,
        None,
        dials=model.dials,
        fixed_keys=(key,),
    )
    engine = ContinuousBatcher(loaded.model, loaded.encoder, slots=_AT_ONCE)
    app = build_app(Api(model, engine), source.current, hosts=LOCAL_HOSTS)
    with on_loopback(app) as port:
        yield f"http://127.0.0.1:{port}", secret
