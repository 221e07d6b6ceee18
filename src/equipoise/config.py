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

from pydantic import BaseModel, ConfigDict, Field, field_validator

from equipoise.types import TemplateValue

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
    """See the module docstring."""
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


class RolloutConfig(RecipeConfig):
    """What RLHF learns from, with dials or without: groups of samples, near the start model."""

    group: Annotated[int, Field(ge=2)] = 8
    """Completions per prompt and setting; a reward counts as its distance from their mean, in their
    standard deviations."""
    kl_limit: Annotated[float, Field(gt=0.0)] = 2.0
    """Nats per token; three steps above it end the tuning, as does a last step above it."""
    sampling: SamplingConfig = SamplingConfig()
    """Of the completions that are learnt from."""


class RlhfConfig(RolloutConfig):
    """RLHF with control: sample under a setting, reward closeness to it, stay near the start."""

    beta: Annotated[float, Field(gt=0.0)] = 0.1
    """Weight of the KL per token to the start model."""
    batch_size: Positive | None = None
    """Completions per step; none: as many as the warm start's ``tune.batch_size``."""
    learning_rate: Annotated[float, Field(gt=0)] = 5e-5
    warm_start: Annotated[int, Field(ge=0)] = 0
    """Steps of CLM before: an untrained control token gives no signal to reinforce."""
    checkpoint_every: Positive = 10
    """Steps; ``tune.checkpoint_every`` is the warm start's."""
    probe_every: Annotated[int, Field(ge=0)] = 50
    """Steps between looks at both judges; 0 = none."""
    probe_prompts: Positive = 8
    """Prompts of a look: dev prompts where there are any, else training prompts."""


class SteeredStartConfig(RecipeConfig):
    """Steering distilled into control tokens, before the objective begins."""

    steps: Positive = 160
    batch_size: Positive = 4
    """Texts; each is read under a drawn setting and its mirror images on every dial."""
    strength: Annotated[float, Field(gt=0.0)] = 2.0
    """Of the top level, in units of the direction's own length; the bottom level gets the
    negative, the levels between lie on a straight line, auto gets 0."""
    max_shift: Annotated[float, Field(gt=0.0)] = 2.0
    """A setting whose directions add up to more than this (in mean lengths of a direction) is
    pushed by so much only: directions that agree would push it out of the language."""
    tokens: Positive = 32
    """Of a completion; the rest teaches nothing new."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-3
    rows_learning_rate: Annotated[float, Field(gt=0)] = 1e-2
    """Of the control tokens' rows."""
    checkpoint_every: Positive = 40


class TuneConfig(RecipeConfig):
    """CLM, ExMATE or RLHF; full weights or LoRA."""

    objective: Literal["clm", "exmate", "rlhf"] = "exmate"
    weight: Annotated[float, Field(ge=0.0)] = 1.0
    """``w`` of the counterfactual term."""
    counterfactual: Literal["uniform", "one_attribute", "observed"] = "uniform"
    exp_of: Literal["example", "batch"] = "example"
    """exp of each example's mean log-likelihood, or of the batch mean."""
    steps: Annotated[int, Field(ge=0)] = 400
    """0 = the distilled steering alone."""
    batch_size: Positive = 32
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    auto_rate: Fraction = 0.15
    """Probability, per attribute, that its level is dropped to auto."""
    lora_rank: Annotated[int, Field(ge=0)] = 0
    """0 = full weights."""
    steered_start: SteeredStartConfig | None = None
    """LoRA, in a recipe that steers: begin with steering distilled into control tokens."""
    dtype: Literal["probe", "float32", "bfloat16"] = "probe"
    checkpoint_every: Positive = 100
    rlhf: RlhfConfig = RlhfConfig()
    """Read by ``objective: rlhf`` only."""

    @property
    def online_batch_size(self) -> int:
        """Completions per online step of RLHF."""
        return self.rlhf.batch_size or self.batch_size


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


class PretrainConfig(RecipeConfig):
    """A base model from raw text: tokenizer and a small Llama, both from scratch."""

    sources: list[SourceConfig] = Field(min_length=1)
    """Rows with ``text``, or dialogues; ``workshop://base``."""
    vocabulary: Annotated[int, Field(ge=300)] = 1024
    width: Positive = 128
    layers: Positive = 4
    heads: Positive = 4
    steps: Positive = 1200
    batch_size: Positive = 64
    learning_rate: Annotated[float, Field(gt=0)] = 3e-3
    max_length: Positive = 256
    """Tokens; a longer row is left out."""
    checkpoint_every: Positive = 200


class SftConfig(RecipeConfig):
    """Supervised fine-tuning on dialogues: the last answer is learnt."""

    model: str = "made://base"
    sources: list[SourceConfig] = Field(min_length=1)
    """Dialogues; ``workshop://base``, ``workshop://aligned``."""
    steps: Positive = 200
    batch_size: Positive = 32
    learning_rate: Annotated[float, Field(gt=0)] = 5e-4
    max_length: Positive = 256
    checkpoint_every: Positive = 100


class AlignConfig(RecipeConfig):
    """Alignment: DPO on preference pairs, or RLHF on a weighted sum of rewards."""

    model: str = "made://sft"
    method: Literal["dpo", "rlhf"] = "dpo"
    sources: list[SourceConfig] = Field(min_length=1)
    """Preference pairs for DPO, prompts for RLHF."""
    steps: Positive = 200
    batch_size: Positive = 32
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    max_length: Positive = 256
    checkpoint_every: Positive = 100
    beta: Annotated[float, Field(gt=0.0)] = 0.1
    """DPO's temperature; RLHF's weight of the KL to the model before."""
    rewards: dict[str, RewardModelConfig] = {}
    """RLHF: reward models by name."""
    weights: dict[str, float] = {}
    """RLHF: weight of each reward, in units of its standard deviation over the model's own
    completions; 1 where none is given."""
    rlhf: RolloutConfig = RolloutConfig()
    """Read by ``method: rlhf`` only."""


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
