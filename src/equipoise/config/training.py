"""What is trained: the dials, and a start model of the run's own."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from equipoise.config.parts import (
    Fraction,
    Positive,
    RecipeConfig,
    RewardModelConfig,
    SamplingConfig,
    SourceConfig,
)


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
