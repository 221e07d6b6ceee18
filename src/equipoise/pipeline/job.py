"""What a stage is handed: its run, its part of the recipe, and how it reports."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from equipoise.config import Recipe
from equipoise.dials.dials import Dials
from equipoise.pipeline.rundir import RunDir
from equipoise.pipeline.stored import settle_date
from equipoise.pipeline.table import MADE
from equipoise.progress import Progress
from equipoise.recipes.source import home
from equipoise.stats import Bootstrap
from equipoise.store.stagedir import Stage
from equipoise.types import Rendering

if TYPE_CHECKING:
    from equipoise.models.load import LoadedPolicy
    from equipoise.training.checkpoints import Curve

FITTED, MODEL = "fitted", "model"
"""Folders of trained models: of ``fit-reward``, and of every stage that trains a policy."""
CURVE = "curve.json"
"""What a training says of each step."""
Part = TypeVar("Part")


@dataclass(frozen=True)
class Job:
    """One stage at work."""

    run: RunDir
    progress: Progress
    recipe: Recipe
    """As the run keeps it. A stage sees only what its row in the table names."""
    text: bool = True
    """Whether the report shows prompts and completions."""

    @classmethod
    def of(cls, run: RunDir, progress: Progress, *, text: bool = True) -> Job:
        """Return a job that may read the whole recipe."""
        return cls(run, progress, run.recipe, text)

    @property
    def dials(self) -> Dials:
        """The recipe's attributes and levels."""
        return Dials(tuple(self.recipe.attributes), self.recipe.levels)

    @property
    def bootstrap(self) -> Bootstrap:
        """What the recipe's intervals come from."""
        return Bootstrap(self.recipe.evaluate.bootstrap, self.recipe.seed)

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

    def place(self, model: str) -> str:
        """Return a model's name, ``made://STAGE`` as the folder that this stage has made.

        Raises:
            RunError: That stage is not complete.
        """
        stage = model.removeprefix(MADE)
        return model if stage == model else str(self.run.done(stage).path / MODEL)

    def policy(self) -> LoadedPolicy:
        """Load the start model."""
        from equipoise.models.load import load_causal

        return load_causal(self.place(self.recipe.model), rendering=self.rendering)

    def tuned_policy(self) -> LoadedPolicy:
        """Load the tuned model, its hashes checked."""
        from equipoise.models.load import load_causal

        return load_causal(str(self.run.done("tune").directory(MODEL)), rendering=self.rendering)

    def settle_threads(self) -> None:
        """Compute with the number of threads that this run has settled on."""
        from equipoise.models.hub import resolve_model
        from equipoise.pipeline.threads import settle_threads

        name = self.run.recipe.model
        made = self.run.path / name.removeprefix(MADE) / MODEL
        place = made if name.startswith(MADE) else Path(resolve_model(name))
        with self.run.writing():
            settle_threads(self.run.path, place if place.is_dir() else None)

    def make_missing(
        self,
        stage: Stage,
        title: str,
        parts: Mapping[str, Part],
        make: Callable[[str, Part], None],
        *,
        size: Callable[[Part], int] = lambda _: 1,
    ) -> None:
        """Make the files of a stage that are not published yet: the one loop that resumes.

        Args:
            stage: The stage.
            title: What the progress is called.
            parts: File name to what the file is made of, in order. They must not depend on what is
                there: then a resumed stage computes, and writes, the same bytes.
            make: Makes and publishes one file.
            size: What a part counts for in the progress.
        """
        total = sum(map(size, parts.values()))
        held = sum(size(part) for name, part in parts.items() if stage.has(name))
        with self.progress.task(title, total, done=held) as advance:
            for name, part in parts.items():
                if not stage.has(name):
                    make(name, part)
                    advance(size(part))


def shard_name(index: int) -> str:
    """Return the name of a stage's shard."""
    return f"shard-{index:05d}.parquet"


def publish_model(stage: Stage, model: Any, tokenizer: Any, curve: Curve, **facts: Any) -> None:
    """Publish a start model with its curve, and end the stage."""

    def build(directory: Path) -> None:
        model.save_pretrained(directory)
        tokenizer.save_pretrained(directory)

    stage.publish_directory(MODEL, build)
    stage.publish_json(CURVE, curve)
    stage.finish(steps=len(curve), **facts)
