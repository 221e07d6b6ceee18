"""What the table of stages says of one of them, and the part of a recipe that it can read."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Any, cast

from equipoise.config import Recipe

if TYPE_CHECKING:
    from equipoise.pipeline.job import Job


class Phase(Enum):
    """When a stage runs."""

    START = "before all others, in a run that makes its own start model"
    RUN = "in every run, in the table's order"
    BESIDE = "when it is asked for, on a run that is evaluated"


@dataclass(frozen=True)
class Also:
    """What a stage depends on besides, in some runs."""

    when: Callable[[Recipe], bool]
    reads: tuple[str, ...] = ()
    inputs: tuple[str, ...] = ()


def nothing(_: Job) -> dict[str, str]:
    """Of a stage that uses no model."""
    return {}


def always(_: Recipe) -> bool:
    """In every run."""
    return True


def never(_: Recipe) -> bool:
    """In no run."""
    return False


@dataclass(frozen=True)
class StageSpec:
    """One row."""

    name: str
    help: str
    where: str
    """``module:function``; the function takes the :class:`~equipoise.pipeline.job.Job` and the
    stage's folder."""
    reads: tuple[str, ...]
    """Fields of the recipe, FIELD or FIELD.PART, that it may read; with ``inputs`` and ``models``
    they decide about reuse."""
    inputs: tuple[str, ...] = ()
    """Earlier stages whose files it reads."""
    models: Callable[[Job], dict[str, str]] = nothing
    """Name to hash of the models that it uses."""
    optional: str | None = None
    """The field that asks for it, if a recipe may leave it out."""
    also: Also = Also(never)
    checks: tuple[str, ...] = ()
    """Fields that it only looks at in order to refuse: they change nothing that it publishes."""
    phase: Phase = Phase.RUN
    prompts_first: Callable[[Recipe], bool] = always
    """Whether the run's prompts are loaded before it."""
    computes: bool = True
    """Whether the number of threads matters to it."""
    planned: bool = False
    """Whether its module has a function ``cost(job, speed)``: seconds, for the plan."""
    refuses_thoughts: bool = False
    """Whether a start model that thinks before it answers is refused."""
    shows_text: bool = False
    """Whether it shows prompts and completions, or leaves them out."""


class UnlistedFieldError(Exception):
    """A stage reads a field that its row does not name: its fingerprint would lie."""


class _Part:
    """A config, of which some fields or parts of fields can be read."""

    def __init__(self, whole: object, reads: Collection[str], place: str) -> None:
        self._whole, self._reads, self._place = whole, frozenset(reads), place

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if name in self._reads:
            return getattr(self._whole, name)
        parts = [
            read.removeprefix(f"{name}.") for read in self._reads if read.startswith(f"{name}.")
        ]
        if not parts:
            raise UnlistedFieldError(f"{self._place}{name} is read; pipeline/table.py lacks it")
        value = getattr(self._whole, name)
        return None if value is None else _Part(value, parts, f"{self._place}{name}.")


def view_of(recipe: Recipe, reads: Collection[str], *, stage: str) -> Recipe:
    """Return what looks like the recipe and raises for every field that is not among ``reads``.

    Args:
        recipe: The whole one.
        reads: FIELD, or FIELD.PART.
        stage: Who reads, for the error.
    """
    if set(reads) >= set(Recipe.model_fields):
        return recipe
    return cast(Recipe, _Part(recipe, reads, f"stage {stage}: recipe."))
