"""The recipe: one pydantic model per stage, unknown keys refused.

Model names are, in this order: an existing directory, ``workshop://NAME`` (a packaged Workshop
model), ``cache://NAME`` (fetched by ``equipoise fetch``), ``fitted://NAME`` (trained by the
``fit-reward`` stage of the same run), else a Hugging Face hub id.

Data sources are: ``workshop://SPLIT``, a JSONL/Parquet file (also ``.gz``; a relative path is
looked up in the recipe's ``data`` folder, then in the working directory), else a ``datasets`` name.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[int, Field(ge=1)]


class Config(BaseModel):
    """Base of every config: frozen, unknown keys refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SourceConfig(Config):
    """Where rows come from."""

    source: str
    """See the module docstring."""
    limit: Positive | None = None
    """At most this many rows, drawn by the recipe's seed."""
    split: str = "train"
    """Split of a ``datasets`` name; ignored for files."""
    where: dict[str, str] = {}
    """Keep only rows whose field equals the value, e.g. ``{label: unsafe}``."""
    min_score: float | None = None
    """Labelled answers: rows with a score of at least this are positive (safe)."""


class PromptsConfig(Config):
    """Which prompts to train on, to choose on (dev), and to test on."""

    train: list[SourceConfig] = Field(min_length=1)
    test: list[SourceConfig] = Field(min_length=1)
    n_dev: Annotated[int, Field(ge=0)] = 0
    """Dev prompts, split off the training prompts."""
    max_prompt_tokens: Positive = 512
    """A longer prompt is refused, never truncated."""
    on_long_prompt: Literal["refuse", "drop"] = "refuse"


class FitRewardConfig(Config):
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


class RewardModelConfig(Config):
    """Load one reward model (or judge)."""

    model: str
    format: Literal["auto", "chat", "pair"] = "auto"
    sign: Literal[1, -1] = 1
    """-1 for a cost model, so that higher is better everywhere else."""
    logit: Annotated[int, Field(ge=0)] = 0
    """Which logit of the classification head is the score."""
    max_length: Positive = 512


class SamplingConfig(Config):
    """How completions are sampled."""

    temperature: Annotated[float, Field(gt=0.0, le=10.0)] = 1.0
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = 1.0
    top_k: Annotated[int, Field(ge=0)] = 256
    """Candidates per step (0 = whole vocabulary)."""
    max_tokens: Positive = 64


class GenerateConfig(Config):
    """Self-generation: K completions per training prompt from the untouched model."""

    completions_per_prompt: Positive = 16
    sampling: SamplingConfig = SamplingConfig()
    batch_size: Positive = 128
    """Rows (prompts times completions) decoded together."""
    prompted_per_prompt: Annotated[int, Field(ge=0)] = 0
    """Further completions per prompt, each asked for one control cell in words: they fill rare
    cells. They are scored and learnt from, but the unit scale stays that of the model's own."""
    phrases: dict[str, list[str]] = {}
    """The words for them, as in ``evaluate.phrases``; empty = built-in English."""


class ScoreConfig(Config):
    """Scoring and calibration of the pool."""

    batch_size: Positive = 64
    calibration: Literal["pooled", "within_prompt"] = "pooled"


class DistilConfig(Config):
    """MOEC, or one of its ablations."""

    data: Literal["moec", "denoised", "raw"] = "moec"
    min_cells: Positive = 3
    balance_cap: Annotated[float, Field(ge=1.0)] = 1.0
    """Cap of the inverse-frequency weight of rare cells; 1 = no weighting."""


class TuneConfig(Config):
    """CLM or ExMATE, full weights or LoRA."""

    objective: Literal["clm", "exmate"] = "exmate"
    weight: Annotated[float, Field(ge=0.0)] = 1.0
    """``w`` of the counterfactual term."""
    counterfactual: Literal["uniform", "one_attribute", "observed"] = "uniform"
    n_counterfactuals: Positive = 1
    exp_of: Literal["example", "batch"] = "example"
    """exp of each example's mean log-likelihood, or of the batch mean."""
    steps: Positive = 400
    batch_size: Positive = 32
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    auto_rate: Fraction = 0.15
    """Probability, per attribute, that its level is dropped to auto."""
    lora_rank: Annotated[int, Field(ge=0)] = 0
    """0 = full weights."""
    dtype: Literal["probe", "float32", "bfloat16"] = "probe"
    checkpoint_every: Positive = 100


class EvaluateConfig(Config):
    """Sweep, then measure."""

    responders: list[str] = ["start", "prompting", "rerank8", "tuned"]
    """``start``, ``prompting``, ``rerankN``, ``tuned``."""
    sampling: SamplingConfig = SamplingConfig()
    split: Literal["dev", "test"] = "test"
    repeats: Positive = 1
    bootstrap: Positive = 1000
    max_prompts: Positive | None = None
    auto_sweep: bool = True
    """Also sweep each dial with the other on auto."""
    batch_size: Positive = 128
    phrases: dict[str, list[str]] = {}
    """Prompting: per attribute one sentence per level; empty = built-in English."""
    in_context: Annotated[int, Field(ge=0)] = 0
    """Prompting: number of in-context examples drawn from the pool."""


class Recipe(Config):
    """The whole run."""

    name: str
    description: str
    seed: int = 0
    attributes: list[str] = ["helpfulness", "safety"]
    levels: Annotated[int, Field(ge=2, le=100)] = 5
    model: str
    data: str | None = None
    """Folder in which relative data sources are looked up."""
    prompts: PromptsConfig
    fit_reward: dict[str, FitRewardConfig] = {}
    reward_models: dict[str, RewardModelConfig]
    judges: dict[str, RewardModelConfig]
    generate: GenerateConfig = GenerateConfig()
    score: ScoreConfig = ScoreConfig()
    distil: DistilConfig = DistilConfig()
    tune: TuneConfig = TuneConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
