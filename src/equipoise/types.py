"""Everything that flows between the stages, and the seams of scoring and answering.

Axis letters used in shape comments throughout the package: B batch, T tokens, V vocabulary,
P prompts, K completions per prompt, C control cells, A attributes, L levels, N branches.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

from equipoise.denoise import finished_sentences

NOT_STORED: Mapping[str, bool] = {"stored": False}
"""Metadata of a field that lives in memory only; it is in no file of a run."""

Role = Literal["system", "user", "assistant"]
Split = Literal["train", "dev", "test"]
Finish = Literal["stop", "length", "thought"]
"""``stop``: the model ended by itself; ``length``: the limit cut the answer; ``thought``: a thought
did not end, so there is no answer."""
TemplateValue = str | int | float | bool | None
"""Value of a variable that the operator or a recipe gives to a chat template."""


@dataclass(frozen=True)
class Rendering:
    """What a chat template is rendered with besides the turns."""

    variables: Mapping[str, TemplateValue] = field(default_factory=dict)
    """``chat_template_kwargs`` of a recipe or a dial policy, never of a client."""
    date: datetime.date | None = None
    """What ``strftime_now`` takes for today; ``None``: the clock of each rendering."""

    @property
    def key(self) -> str:
        """Equal for equal renderings only; ``1`` and ``true`` differ."""
        return json.dumps([dict(self.variables), str(self.date)], sort_keys=True)


PLAIN = Rendering()
"""No variables, and the clock's date."""
JudgeKind = Literal["optimization", "generalization"]


@dataclass(frozen=True)
class Message:
    """One chat turn. ``content`` is always untrusted text."""

    role: Role
    content: str


@dataclass(frozen=True)
class Prompt:
    """Chat messages up to and including the last user turn: the ``x`` of the paper."""

    id: str
    """Unique within a run; stable across runs of the same recipe."""
    messages: tuple[Message, ...]
    split: Split
    source: str = ""
    """Where the prompt came from (file, data set or world)."""
    label: str = ""
    """The source's own label, e.g. ``safe`` / ``unsafe``; empty where there is none."""
    row: int | None = field(default=None, compare=False, metadata=NOT_STORED)
    """Its row in the source, counted from 1, while it is being loaded."""

    @property
    def place(self) -> str:
        """What a message calls it, as it must not show its text: source and row number."""
        return (
            f"{self.id} of {self.source}" if self.row is None else f"{self.source}, row {self.row}"
        )


@dataclass(frozen=True, order=True)
class DialSetting:
    """One level per attribute, in the manifest's attribute order: ``ζ(s_hp, s_sf)``.

    A level is an int in [0, L) or ``None`` for *auto* (the null level).
    """

    levels: tuple[int | None, ...]

    @property
    def is_cell(self) -> bool:
        """True if no attribute is on auto, i.e. the setting is one of the L^A control cells."""
        return all(level is not None for level in self.levels)


class Judged:
    """A sampled text, and the part of it that is learnt from and judged."""

    text: str
    finish: Finish

    @property
    def sentences(self) -> str | None:
        """The text to learn from, or None: then it is dropped from the pool.

        A text cut by the token limit keeps its finished sentences and gets no end token. One whose
        thought did not end has none.
        """
        if self.finish == "stop":
            return self.text
        return None if self.finish == "thought" else finished_sentences(self.text)

    @property
    def judged(self) -> str:
        """The text that a score is of, never none; the pool of the unit scale was cut too."""
        return self.sentences or self.text


@dataclass(frozen=True)
class Completion(Judged):
    """The assistant's answer: the ``y`` of the paper."""

    prompt_id: str
    sample_index: int
    text: str
    finish: Finish
    """``stop`` if the model ended by itself: then the end token belongs to the completion."""
    n_tokens: int
    """Sampled tokens, thoughts and the end token included."""
    model_hash: str
    round: int = 0
    setting: DialSetting | None = None
    """The setting asked for; ``None`` for the untouched model."""


@dataclass(frozen=True)
class ScoredCompletion:
    """A completion with one finite raw score per attribute; higher is better."""

    completion: Completion
    raw: Mapping[str, float]
    reward_models: Mapping[str, str]
    """Attribute to reward-model hash."""


@dataclass(frozen=True)
class SteeredCompletion:
    """A completion sampled under steering, scored like the pool; its setting is a wish."""

    scored: ScoredCompletion
    strengths: tuple[float, ...]
    """One per attribute, in units of the direction's length."""
    fluency: float
    """Mean log-likelihood per token under the untouched model."""


@dataclass(frozen=True)
class ControlledExample:
    """One training example of the distilled pool."""

    prompt: Prompt
    setting: DialSetting
    text: str
    finished: bool
    """Whether the end token belongs to the completion."""
    unit: Mapping[str, float]
    """Unit score in [0, 1] per attribute."""
    weight: float = 1.0
    """>= 0; the mean over a distilled set is 1."""


@dataclass(frozen=True)
class Delivery(Judged):
    """What one completion delivered for one requested setting, by one kind of judge."""

    prompt_id: str
    setting: DialSetting
    repeat: int
    text: str
    finish: Finish
    n_tokens: int
    unit: Mapping[JudgeKind, Mapping[str, float]]
    """Judge kind to attribute to unit score in [0, 1]."""


@dataclass(frozen=True)
class PreferencePair:
    """Two completions of one prompt, the better one first."""

    prompt: Prompt
    chosen: str
    rejected: str


@dataclass(frozen=True)
class Branch:
    """One continuation of a prompt: control ids (may be empty) and its own seed."""

    control_ids: tuple[int, ...]
    seed: int
    """64-bit; the text depends on this seed only, never on the batch around it."""
    strengths: tuple[float, ...] = ()
    """Steering: one factor per direction of the engine; empty, or all zero, for none."""


@dataclass(frozen=True)
class GenerationRequest:
    """A prompt, prefilled once, and all of its branches."""

    prompt_ids: tuple[int, ...]
    branches: tuple[Branch, ...]


@runtime_checkable
class RewardModel(Protocol):
    """Scores completions of prompts; higher is better, always."""

    name: str
    hash: str

    def score(self, pairs: Sequence[tuple[Prompt, str]]) -> list[float]:
        """Return one finite score per (prompt, completion text), in order."""
        ...


class UnitScale(Protocol):
    """Maps raw scores to unit scores. Shipped: ``pool.calibrate.Calibration``."""

    def unit(self, attribute: str, raw: float) -> float:
        """Return the unit score in [0, 1] of a raw score."""
        ...


class Responder(Protocol):
    """A way to answer under a dial setting: tuned policy, prompting, reranking, untouched model."""

    name: str
    tokens_through_model: int
    """Tokens computed so far (prompt and sampled), the cost printed by the report."""

    def respond(
        self,
        prompts: Sequence[Prompt],
        settings: Sequence[DialSetting],
        *,
        seed: int,
    ) -> list[list[Completion]]:
        """Return completions shaped (P, C): one fresh completion per prompt and setting."""
        ...
