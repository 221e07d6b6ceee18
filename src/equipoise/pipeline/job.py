"""What several stages read: the prompts, the scored pool, models and their hashes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from equipoise.config import Recipe, RewardModelConfig
from equipoise.dials.dials import Dials
from equipoise.pipeline.rundate import settle_date
from equipoise.progress import Progress
from equipoise.recipes.source import home
from equipoise.stats import Bootstrap
from equipoise.store.fingerprint import ORDER
from equipoise.store.rundir import RunDir
from equipoise.store.shards import rows_from_jsonl
from equipoise.store.stagedir import Stage
from equipoise.types import Prompt, Rendering, RewardModel, ScoredCompletion, SteeredCompletion

if TYPE_CHECKING:
    from equipoise.data.sources import Skipped
    from equipoise.pool.calibrate import Calibration
    from equipoise.rewards.scorer import Scorer

PROMPTS = "prompts.jsonl"
CALIBRATION = "calibration.json"
FITTED = "fitted"
MADE = "made://"
SKIPPED = "skipped"
FLUENCY = "fluency.json"
"""Prompt id to the mean log-likelihood per token of the model's own completions."""


@dataclass(frozen=True)
class Job:
    """One invocation: where it works, how it reports, and what it may drop."""

    run: RunDir
    progress: Progress
    fresh: bool = False
    text: bool = True
    """Whether the report shows prompts and completions."""

    @property
    def dials(self) -> Dials:
        """The recipe's attributes and levels."""
        return Dials(tuple(self.run.recipe.attributes), self.run.recipe.levels)

    @property
    def bootstrap(self) -> Bootstrap:
        """What the recipe's intervals come from."""
        return Bootstrap(self.run.recipe.evaluate.bootstrap, self.run.recipe.seed)

    @property
    def recipe(self) -> Recipe:
        """The resolved recipe; ``made://NAME`` stands there as the directory of that stage."""
        return settled(self.run.recipe, self.run.path)

    @property
    def data(self) -> Path | None:
        """Folder of relative data sources."""
        return home(self.recipe.data) if self.recipe.data else None

    @property
    def rendering(self) -> Rendering:
        """What the policy's chat template is given besides the turns, in all stages."""
        with self.run.writing():
            date = settle_date(self.run.path)
        return Rendering(self.recipe.chat_template_kwargs, date)

    @property
    def fitted_root(self) -> Path:
        """Folder of the reward models that this run has trained."""
        return self.run.path / "fit-reward" / FITTED

    def begin(self, name: str, models: Mapping[str, str] | None = None) -> Stage | None:
        """Begin a stage, or say that there is nothing to do and return ``None``."""
        stage = self.run.begin(name, models=models, fresh=self.fresh)
        if stage.complete:
            self.progress.say(f"{name}: nothing to do")
            return None
        if name not in ("prompts", "report"):
            self.settle_threads()
        return stage

    def settle_threads(self) -> None:
        """Compute with the number of threads that this run has settled on."""
        from equipoise.models.hub import resolve_model
        from equipoise.pipeline.threads import settle_threads

        made = self.run.recipe.model.startswith(MADE)
        place = Path(self.recipe.model if made else resolve_model(self.recipe.model))
        with self.run.writing():
            settle_threads(self.run.path, place if place.is_dir() else None)


def settled(recipe: Recipe, run: Path) -> Recipe:
    """Return the recipe with every ``made://STAGE`` as a directory of the run."""

    def place(name: str) -> str:
        stage = name.removeprefix(MADE)
        return name if stage == name else str(run / stage / "model")

    changes: dict[str, object] = {"model": place(recipe.model)}
    for name in ("sft", "align"):
        part = getattr(recipe, name)
        if part is not None:
            changes[name] = part.model_copy(update={"model": place(part.model)})
    changes["fit_reward"] = {
        name: config.model_copy(update={"backbone": place(config.backbone)})
        for name, config in recipe.fit_reward.items()
    }
    return recipe.model_copy(update=changes)


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


def read_scored(run: RunDir) -> list[ScoredCompletion]:
    """Return the scored pool."""
    shards = run.done("score").read_rows(ScoredCompletion, prefix="shard-")
    return [row for rows in shards for row in rows]


def read_steered(run: RunDir) -> list[SteeredCompletion]:
    """Return the steered pool; empty if the recipe asks for none."""
    if run.recipe.regenerate is None:
        return []
    shards = run.done("regenerate").read_rows(SteeredCompletion, prefix="shard-")
    return [row for rows in shards for row in rows]


def read_calibration(run: RunDir) -> Calibration:
    """Return the calibration of the reward models on the start model's pool."""
    from equipoise.pool.calibrate import Calibration

    return Calibration.from_json(run.done("score").read_bytes(CALIBRATION).decode())


def policy_hash(name: str) -> str:
    """Return the hash of the start model's files; a hub model is brought into the cache first.

    Raises:
        ModelError: There is no such model, or it is an adapter.
    """
    from equipoise.models.adapter import refuse_adapter
    from equipoise.models.hub import model_hash, resolve_model

    place = resolve_model(name)
    refuse_adapter(place)
    return model_hash(place)


def reward_hashes(configs: Mapping[str, RewardModelConfig], job: Job) -> dict[str, str]:
    """Return attribute to hash of the files of reward models (or judges).

    For fingerprints, which hold how the recipe reads those files beside it.
    """
    from equipoise.rewards.load import files_hash

    root = job.fitted_root
    return {name: files_hash(config, fitted_root=root) for name, config in configs.items()}


def load_scorer(job: Job) -> Scorer:
    """Load the run's own reward models with their scale."""
    from equipoise.rewards.scorer import Scorer

    models = load_reward_models(job.recipe.reward_models, job)
    return Scorer(models, read_calibration(job.run))


def load_reward_models(
    configs: Mapping[str, RewardModelConfig], job: Job
) -> dict[str, RewardModel]:
    """Load one reward model (or judge) per attribute, in attribute order."""
    from equipoise.rewards.head import FrozenFeatures
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


def workshop_parser(recipe: Recipe) -> Callable[[Prompt, str], bool] | None:
    """Return the Workshop's own parser if the prompts are the Workshop's."""
    sources = [*recipe.prompts.train, *recipe.prompts.test]
    if not all(source.source.startswith("workshop://") for source in sources):
        return None
    from equipoise.worlds.workshop import parses

    return parses
