"""The recipe: one pydantic model per stage, unknown keys refused.

Model names are, in this order: an existing directory, ``workshop://NAME`` (a packaged Workshop
model), ``cache://NAME`` (fetched by ``equipoise fetch``), ``fitted://NAME`` (trained by the
``fit-reward`` stage of the same run), ``made://base``, ``made://sft`` or ``made://align`` (the
result of that stage of the same run), else a Hugging Face hub id.

Data sources are: ``workshop://SPLIT``, a JSONL/Parquet file (also ``.gz``; a relative path is
looked up in the recipe's ``data`` folder, then in the working directory), else a ``datasets`` name.
Which folder a relative path of a recipe's file means: :mod:`equipoise.recipes.source`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from equipoise.config.parts import (
    Config,
    FitRewardConfig,
    Positive,
    PromptsConfig,
    RecipeConfig,
    RewardModelConfig,
    Sampling,
    SamplingConfig,
    SourceConfig,
)
from equipoise.config.training import (
    AlignConfig,
    PretrainConfig,
    RlhfConfig,
    RolloutConfig,
    SftConfig,
    SteeredStartConfig,
    TuneConfig,
)
from equipoise.types import TemplateValue

__all__ = [
    "AlignConfig", "Config", "DistilConfig", "EvaluateConfig", "FitRewardConfig",
    "GenerateConfig", "PretrainConfig", "PromptsConfig", "Recipe", "RecipeConfig",
    "RegenerateConfig", "RewardModelConfig", "RlhfConfig", "RolloutConfig", "Sampling",
    "SamplingConfig", "ScoreConfig", "SftConfig", "SourceConfig", "SteerConfig",
    "SteeredStartConfig", "TuneConfig",
]  # fmt: skip


class GenerateConfig(RecipeConfig):
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


class ScoreConfig(RecipeConfig):
    """Scoring and calibration of the pool."""

    batch_size: Positive = 64
    calibration: Literal["pooled", "within_prompt"] = "pooled"


class SteerConfig(RecipeConfig):
    """Directions from the scored pool, and the strength that each level needs."""

    directions: Literal["difference_of_means", "natural_gradient"] = "natural_gradient"
    """What buys most score per nat of likelihood, or what sets good completions apart inside."""
    damping: Annotated[float, Field(gt=0.0)] = 1.0
    """Of the natural gradient; a larger one trusts the pool less."""
    layer: Annotated[int, Field(ge=0)] | None = None
    """Decoder layer, counted from 0; by default two fifths of the way up (difference of means) or
    three (natural gradient)."""
    strengths: list[float] = Field([-4.0, -3.0, -2.0, -1.0, 1.0, 2.0, 3.0, 4.0], min_length=1)
    """Tried on dev prompts, besides 0, in units of the direction's own length: the mean difference
    of best and worst, or (natural gradient) a nat per completion."""
    max_fluency_drop: Annotated[float, Field(gt=0.0)] | None = 0.5
    """Strengths whose outputs the untouched model finds less likely than its own by more than
    this (nats per token) are not used; ``null`` = use all."""
    max_prompts: Positive = 40
    """Dev prompts that strengths are tried on."""


class RegenerateConfig(RecipeConfig):
    """Steered self-generation: a second pool, in which rare cells are common."""

    steered_per_prompt: Positive = 8
    over: Literal["cells", "corners"] = "cells"
    """Which control cells are wished for; the middle cell, which needs no steering, never is."""
    factors: list[Annotated[float, Field(gt=0.0)]] = Field([1.0, 2.0], min_length=1)
    """Strengths of the top level, used in turn; the bottom level gets the negative, the levels
    between lie on a straight line."""


class DistilConfig(RecipeConfig):
    """MOEC, or one of its ablations; the weights of cells are in all of them."""

    data: Literal["moec", "denoised", "raw"] = "moec"
    min_cells: Positive = 3
    balance_cap: Annotated[float, Field(ge=1.0)] = 1.0
    """Cap of the inverse-frequency weight of rare cells; 1 = no weighting. Whatever ``data`` is:
    ``denoised`` and ``raw`` are weighted as well."""
    max_fluency_drop: Annotated[float, Field(gt=0.0)] | None = None
    """MOEC and ``denoised``: drop a steered completion whose mean log-likelihood per token under
    the untouched model lies more than this below that of its own completions of the prompt."""


class EvaluateConfig(RecipeConfig):
    """Sweep, then measure."""

    responders: list[str] = ["start", "prompting", "rerank8", "tuned"]
    """``start``, ``prompting``, ``rerankN``, ``steering``, ``tuned``."""
    sampling: SamplingConfig = SamplingConfig()
    split: Literal["dev", "test"] = "test"
    repeats: Positive = 1
    bootstrap: Positive = 1000
    max_prompts: Positive | None = None
    fluency_prompts: Positive = 40
    """Prompts, spread over all, of which the untouched model reads every cell's output."""
    references: list[SourceConfig] = []
    """Dialogues that no training saw: perplexity is that of their last answers. None: of the
    untouched model's own answers."""
    auto_sweep: bool = True
    """Also sweep each dial with the other on auto."""
    batch_size: Positive = 128
    phrases: dict[str, list[str]] = {}
    """Prompting: per attribute one sentence per level; empty = built-in English."""
    rerank_stock: Positive | None = None
    """Reranking: samples per prompt, of which every setting draws its N; by default every setting
    gets fresh ones, which on a real model takes hours."""
    in_context: Annotated[int, Field(ge=0)] = 0
    """Prompting: number of in-context examples drawn from the pool."""


class Recipe(RecipeConfig):
    """The whole run."""

    name: str
    description: str = ""
    seed: int = 0
    attributes: list[str] = ["helpfulness", "safety"]
    levels: Annotated[int, Field(ge=2, le=100)] = 5
    model: str
    chat_template_kwargs: dict[str, TemplateValue] = {}
    """Variables of the model's chat template, e.g. ``{enable_thinking: false}``; refused where the
    template knows no such variable."""
    data: str | None = None
    """Folder in which relative data sources are looked up."""
    base: PretrainConfig | None = None
    sft: SftConfig | None = None
    align: AlignConfig | None = None
    prompts: PromptsConfig
    fit_reward: dict[str, FitRewardConfig] = {}
    reward_models: dict[str, RewardModelConfig]
    judges: dict[str, RewardModelConfig]
    refusal_judge: RewardModelConfig | None = None
    """Scores compliance: above 0 the prompt was answered, below 0 refused."""
    generate: GenerateConfig = GenerateConfig()
    score: ScoreConfig = ScoreConfig()
    steer: SteerConfig | None = None
    regenerate: RegenerateConfig | None = None
    distil: DistilConfig = DistilConfig()
    tune: TuneConfig = TuneConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
