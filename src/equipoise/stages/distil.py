"""Step 2 on disk: the scored pool becomes what the dials are tuned on (MOEC)."""

from __future__ import annotations

from functools import partial

from equipoise.pipeline.job import Job
from equipoise.pipeline.readers import (
    EXAMPLES,
    FLUENCY,
    read_calibration,
    read_prompts,
    read_scored,
    read_steered,
    workshop_parser,
)
from equipoise.pool.backdoor import back_door
from equipoise.pool.calibrate import unit_scores
from equipoise.pool.moec import distil as distil_pool
from equipoise.store.shards import to_plain
from equipoise.store.stagedir import Stage
from equipoise.types import ControlledExample


def distil(job: Job, stage: Stage) -> None:
    """Distil the scored pool (MOEC) and measure the back door before and after."""
    recipe = job.recipe
    own, steered = read_scored(job.run), read_steered(job.run)
    scored = [*own, *(row.scored for row in steered)]
    drops: list[float] = [0.0] * len(own)
    if steered:
        usual = job.run.done("steer").read_json(FLUENCY)
        drops += [usual[row.scored.completion.prompt_id] - row.fluency for row in steered]
    run_moec = partial(
        distil_pool,
        scored,
        unit_scores(scored, read_calibration(job.run)),
        {prompt.id: prompt for prompt in read_prompts(job.run)},
        dials=job.dials,
        parses=workshop_parser(recipe),
        fluency_drops=drops,
    )
    examples, facts = run_moec(recipe.distil)
    raw, _ = run_moec(recipe.distil.model_copy(update={"data": "raw"}))
    doors = {
        name: to_plain(back_door(rows, n_rows=min(len(raw), len(examples)), seed=recipe.seed))
        for name, rows in (("before", raw), ("after", examples))
    }
    stage.publish_rows(EXAMPLES, examples, ControlledExample)
    stage.publish_json("moec.json", to_plain(facts))
    stage.publish_json("backdoor.json", doors)
    stage.finish(examples=len(examples))
    job.progress.say(f"distil: {len(examples)} examples kept of {len(scored)}")
