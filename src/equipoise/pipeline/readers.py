"""What several stages read: the prompts, the pools, the judges, and what is known of the rows."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import TYPE_CHECKING, Any

from equipoise.config import Recipe, RewardModelConfig
from equipoise.overlap import prompt_key
from equipoise.pipeline.job import Job
from equipoise.pipeline.rundir import RunDir
from equipoise.pipeline.table import ORDER
from equipoise.store.shards import rows_from_jsonl
from equipoise.store.stagedir import Stage
from equipoise.store.stagefiles import StageFiles
from equipoise.types import (
    ControlledExample,
    Delivery,
    JudgeKind,
    Prompt,
    RewardModel,
    ScoredCompletion,
    SteeredCompletion,
)

if TYPE_CHECKING:
    from equipoise.data.sources import Skipped
    from equipoise.engine.sample import TransformersEngine
    from equipoise.models.load import LoadedPolicy
    from equipoise.pool.calibrate import Calibration
    from equipoise.rewards.scorer import Scorer
    from equipoise.steer.directions import Directions

PROMPTS = "prompts.jsonl"
CALIBRATION = "calibration.json"
"""Of the stages ``score`` and ``judge``."""
JUDGED_POOL = "pool.json"
"""Of ``judge``: what is known of the pool by both kinds of judges."""
SKIPPED = "skipped"
DIRECTIONS, STRENGTHS = "directions", "strengths.json"
FLUENCY = "fluency.json"
"""Prompt id to the mean log-likelihood per token of the model's own completions."""
EXAMPLES = "examples.parquet"
MEASURES = "measures.json"
START_CURVE = "start.json"
"""Of a steered start, if there was one: it comes before the tuning's own curve."""
SCENARIOS = "scenarios"
"""Folder of what is measured of dial policies; it is no stage."""
CHUNK = 4
"""Prompts per shard of deliveries."""
GRID, ONE_DIAL, AUTO = "deliveries", "one-dial", "auto"
"""Folders of deliveries: every cell; the tuned policy's with one dial set, and with none."""


def note_skipped(stage: Stage, skipped: Skipped, name: str = "rows") -> None:
    """Keep which rows ``on_bad_row: skip`` left out; a stage that read every row keeps nothing."""
    if skipped.count:
        stage.publish_json(f"{SKIPPED}/{name}.json", skipped.facts())


def read_skipped(run: RunDir) -> dict[str, dict[str, Any]]:
    """Return what :func:`note_skipped` kept, by stage (and name, if it is not ``rows``)."""
    found: dict[str, dict[str, Any]] = {}
    for stage in (name for name in ORDER if run.is_done(name)):
        files = run.done(stage)
        for file in files.outputs:
            folder, _, name = file.partition("/")
            if folder == SKIPPED:
                title = f"{stage} {name.removesuffix('.json')}".removesuffix(" rows")
                found[title] = files.read_json(file)
    return found


def read_prompts(run: RunDir) -> list[Prompt]:
    """Return all prompts of the run, in their order: train, dev, test."""
    return rows_from_jsonl(run.done("prompts").read_bytes(PROMPTS), Prompt)


def prompts_of(run: RunDir, split: str) -> list[Prompt]:
    """Return the prompts of one split."""
    return [prompt for prompt in read_prompts(run) if prompt.split == split]


def prompt_keys(run: RunDir, splits: Collection[str]) -> set[str]:
    """Return what the prompts of some splits are compared by."""
    return {prompt_key(one.messages) for one in read_prompts(run) if one.split in splits}


def evaluated_prompts(job: Job) -> list[Prompt]:
    """Return the prompts of the evaluated split, at most ``max_prompts``."""
    config = job.recipe.evaluate
    return prompts_of(job.run, config.split)[: config.max_prompts]


def read_scored(run: RunDir) -> list[ScoredCompletion]:
    """Return the scored pool."""
    shards = run.done("score").read_rows(ScoredCompletion, prefix="shard-")
    return [row for rows in shards for row in rows]


def read_steered(run: RunDir) -> list[SteeredCompletion]:
    """Return the steered pool; empty if the run has none."""
    if not run.asks_for("regenerate"):
        return []
    shards = run.done("regenerate").read_rows(SteeredCompletion, prefix="shard-")
    return [row for rows in shards for row in rows]


def read_calibration(run: RunDir, stage: str = "score") -> Calibration:
    """Return the calibration of the reward models, or of the judges (stage ``judge``).

    Both are on the start model's pool.
    """
    from equipoise.pool.calibrate import Calibration

    return Calibration.from_json(run.done(stage).read_bytes(CALIBRATION).decode())


def read_directions(stage: StageFiles) -> Directions:
    """Return the directions of a ``steer`` stage, their hashes checked."""
    from equipoise.steer.directions import Directions

    return Directions.load(stage.directory(DIRECTIONS))


def steered_engine(
    policy: LoadedPolicy, directions: Directions, *, batch_size: int
) -> TransformersEngine:
    """Return an engine that can steer."""
    from equipoise.engine.sample import TransformersEngine

    steering = (directions.vectors, directions.layer)
    return TransformersEngine.of(policy, batch_size=batch_size, steering=steering)


def read_examples(run: RunDir) -> list[ControlledExample]:
    """Return the distilled set."""
    return run.done("distil").read_shard(EXAMPLES, ControlledExample)


def read_deliveries(stage: StageFiles, method: str, folder: str = GRID) -> list[Delivery]:
    """Return what a method delivered."""
    shards = stage.read_rows(Delivery, prefix=f"{folder}/{method}/")
    return [row for rows in shards for row in rows]


def load_reward_models(
    configs: Mapping[str, RewardModelConfig], job: Job
) -> dict[str, RewardModel]:
    """Load one reward model (or judge) per attribute, in attribute order."""
    from equipoise.rewards.classifier import FrozenFeatures
    from equipoise.rewards.load import load_reward_model

    features: dict[str, FrozenFeatures] = {}
    return {
        attribute: load_reward_model(
            configs[attribute],
            attribute=attribute,
            fitted_root=job.fitted_root,
            batch_size=job.recipe.score.batch_size,
            features=features,
        )
        for attribute in job.recipe.attributes
    }


def load_scorer(job: Job) -> Scorer:
    """Load the run's own reward models with their scale."""
    from equipoise.rewards.scorer import Scorer

    models = load_reward_models(job.recipe.reward_models, job)
    return Scorer(models, read_calibration(job.run))


def read_judges(job: Job) -> dict[JudgeKind, Scorer]:
    """Load both kinds of judges, each with its scale over the start model's own pool."""
    from equipoise.rewards.scorer import Scorer

    judges = load_reward_models(job.recipe.judges, job)
    return {
        "optimization": load_scorer(job),
        "generalization": Scorer(judges, read_calibration(job.run, "judge")),
    }


def workshop_parser(recipe: Recipe) -> Callable[[Prompt, str], bool] | None:
    """Return the Workshop's own parser if the prompts are the Workshop's."""
    sources = [*recipe.prompts.train, *recipe.prompts.test]
    if not all(source.source.startswith("workshop://") for source in sources):
        return None
    from equipoise.worlds.workshop import parses

    return parses
