"""The content of ``report.json``: written by ``to_plain``, read back by :func:`read_report`.

Every part but ``recipe`` and ``methods`` may be missing; the page leaves it out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from equipoise.evaluate.measure import ControlReport
from equipoise.evaluate.measures import Measures
from equipoise.pool.backdoor import BackDoor
from equipoise.pool.moec import MoecReport
from equipoise.rewards.card import HeldOut
from equipoise.store.shards import from_plain
from equipoise.types import JudgeKind

Column = Sequence[float | None]
"""One value per step."""


class _Shown(BaseModel):
    # What the page does not show passes through to report.json.
    model_config = ConfigDict(frozen=True, extra="allow")


class Distilled(_Shown):
    """What the distilled set is made by."""

    data: Literal["moec", "denoised", "raw"] = "moec"


class ShownRecipe(_Shown):
    """The recipe of the run; the page prints all of it."""

    name: str = "run"
    description: str = ""
    attributes: tuple[str, ...]
    levels: int
    distil: Distilled = Distilled()


class ModelFacts(_Shown):
    """A reward model or judge: its name, then its card if it was fitted by a run."""

    model: str
    held_out: HeldOut | None = None


@dataclass(frozen=True)
class Scale:
    """How the pool gives one attribute its scale, see ``pool.calibrate.calibration_report``."""

    n: int = 0
    between_prompt_share: float | None = None
    top_tie: float | None = None
    highest_unit: float | None = None
    within_prompt_judge_correlation: float | None = None
    """Agreement of reward model and judge: mean over prompts of Pearson's correlation."""


@dataclass(frozen=True)
class Skipped:
    """Rows of the data that could not be used."""

    count: int
    first: Sequence[str]


@dataclass(frozen=True)
class BackDoors:
    """The back door of equally many examples, before and after distilling."""

    before: BackDoor
    after: BackDoor


@dataclass(frozen=True, kw_only=True)
class Report(Measures):
    """One run."""

    recipe: ShownRecipe
    pool: Mapping[str, Scale] = field(default_factory=dict)
    no_finished_sentence: int | None = None
    """Completions that the pool lacks, as they had no finished sentence."""
    judges_in_training: Mapping[str, str] = field(default_factory=dict)
    """Attribute to what training used its judge as: such judges are no judges."""
    skipped: Mapping[str, Skipped] = field(default_factory=dict)
    """By stage, with ``on_bad_row: skip``."""
    moec: MoecReport | None = None
    backdoor: BackDoors | None = None
    losses: Mapping[str, Mapping[str, Column]] = field(default_factory=dict)
    """Tuning to the columns of its curve, ``step`` among them."""
    reward_models: Mapping[str, ModelFacts] = field(default_factory=dict)
    stages: Mapping[str, float | None] = field(default_factory=dict)
    """Minutes."""
    planned: Mapping[str, float] = field(default_factory=dict)
    """Minutes, as estimated before the run."""

    @property
    def attributes(self) -> tuple[str, ...]:
        """The dials."""
        return self.recipe.attributes

    @property
    def levels(self) -> int:
        """L."""
        return self.recipe.levels

    @property
    def judge(self) -> JudgeKind:
        """The judge that the page shows: generalization where any method has it."""
        judged = any(method.generalization for method in self.methods.values())
        return "generalization" if judged else "optimization"

    def swept(self, judge: JudgeKind | None = None) -> dict[str, ControlReport]:
        """Return method to its control by this judge (the page's by default), where it is known."""
        found = {name: m.by(judge or self.judge) for name, m in self.methods.items()}
        return {name: control for name, control in found.items() if control is not None}

    def best(self, judge: JudgeKind | None = None) -> ControlReport | None:
        """Return the control of the ceiling by this judge (the page's by default)."""
        return None if self.ceiling is None else self.ceiling.by(judge or self.judge)


def read_report(plain: Mapping[str, Any]) -> Report:
    """Return the report that ``report.json`` holds, also one of an earlier version.

    Raises:
        TypeError: A part lacks a field.
    """
    pool = {name: facts for name, facts in (plain.get("pool") or {}).items() if name != _UNFINISHED}
    unfinished = (plain.get("pool") or {}).get(_UNFINISHED)  # where it stood earlier
    there = {key: value for key, value in plain.items() if value is not None}
    found: Report = from_plain(Report, {_UNFINISHED: unfinished, **there, "pool": pool})
    return found


_UNFINISHED = "no_finished_sentence"
