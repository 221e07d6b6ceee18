"""What every part of a recipe is made of: data sources, reward models, sampling."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]


class Config(BaseModel):
    """Base of every config: frozen, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class RecipeConfig(Config):
    """Base of a recipe's parts: true is no number, no text is one, and no number is infinite."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


class SourceConfig(RecipeConfig):
    """Where rows come from."""

    source: str
    """See the docstring of :mod:`equipoise.config`."""
    limit: Positive | None = None
    """At most this many rows, drawn by the recipe's seed."""
    split: str = "train"
    """Split of a ``datasets`` name; ignored for files."""
    where: dict[str, str] = {}
    """Keep only rows whose field equals the value, e.g. ``{label: unsafe}``."""
    min_score: float | None = None
    """Labelled answers: rows with a score of at least this are positive (safe)."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """A row that cannot be used ends the run, or is left out and counted in the report."""


class PromptsConfig(RecipeConfig):
    """Which prompts to train on, to choose on (dev), and to test on."""

    train: list[SourceConfig] = Field(min_length=1)
    test: list[SourceConfig] = Field(min_length=1)
    n_dev: Annotated[int, Field(ge=0)] = 0
    """Dev prompts, split off the training prompts."""
    max_prompt_tokens: Positive = 512
    """A longer prompt is refused, never truncated."""
    on_long_prompt: Literal["refuse", "drop"] = "refuse"


class FitRewardConfig(RecipeConfig):
    """Train one reward model from preference pairs or from labelled answers."""

    backbone: str
    kind: Literal["pairs", "labels"]
    sources: list[SourceConfig] = Field(min_length=1)
    held_out: Positive = 200
    """Rows kept back for the accuracy that is reported; never trained on."""
    head_only: bool = False
    """Linear head on frozen mean-pooled features."""
    format: Literal["auto", "chat", "pair"] = "auto"
    """``chat``: the model's chat template; ``pair``: (prompt, completion) as two segments;
    ``auto``: chat where the tokenizer has a template, else pair."""
    epochs: Annotated[float, Field(gt=0)] = 1.0
    batch_size: Positive = 16
    learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    max_length: Positive = 256
    leave_out_test: bool = False
    """Leave out rows whose prompt is one of the recipe's dev or test prompts."""
    leave_out_train: bool = False
    """The same for its training prompts, whose completions the model will score."""


class RewardModelConfig(RecipeConfig):
    """Load one reward model (or judge)."""

    model: str
    format: Literal["auto", "chat", "pair"] = "auto"
    sign: Literal[1, -1] = 1
    """-1 for a cost model, so that higher is better everywhere else."""
    logit: Annotated[int, Field(ge=0)] = 0
    """Which logit of the classification head is the score."""
    max_length: Positive = 512

    @field_validator("sign", mode="before")
    @classmethod
    def _no_truth(cls, sign: object) -> object:
        # A literal compares by ==, and True == 1.
        if isinstance(sign, bool):
            raise ValueError("Input should be 1 or -1")
        return sign

    @property
    def oracle(self) -> str | None:
        """What an exact rule of the Workshop scores (``workshop://oracle/NAME``); else None."""
        name = self.model.removeprefix("workshop://oracle/")
        return None if name == self.model else name


class Sampling(RecipeConfig):
    """How completions are sampled."""

    temperature: Annotated[float, Field(ge=0.0)] = 1.0
    """0 = always the likeliest token."""
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 256
    """Candidates per step (0 = whole vocabulary)."""
    max_tokens: Positive = 64
    """Of the answer."""
    max_thought_tokens: Annotated[int, Field(ge=0)] = 512
    """Of the thought before it, where the model writes one; a thought that does not end is no
    answer."""


class SamplingConfig(Sampling):
    """The sampling of a recipe, where completions of one prompt must differ."""

    temperature: Annotated[float, Field(gt=0.0, le=10.0)] = 1.0
    max_thought_tokens: Positive = 512
