"""``reward.json``: what a reward model was trained on, and how good it is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from equipoise.errors import ModelError
from equipoise.stats import Estimate

CARD = "reward.json"
Pooling = Literal["model", "answer_mean"]


class _Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class HeldOut(_Frozen):
    """One number of the held-out rows, beside two baselines that know no language model."""

    metric: Literal["accuracy", "auc"]
    """Pairs: share in which the chosen completion scores higher, ties ½. Labels: area under ROC."""
    model: Estimate
    """95 % interval by bootstrap over prompts."""
    length_only: Estimate
    """The longer completion is better, or the shorter, whichever holds on the training rows."""
    bag_of_words: Estimate
    """TF-IDF of 1- and 2-grams with logistic regression, fitted on the training rows."""


class RewardCard(_Frozen):
    """Everything that is recorded about a fitted reward model."""

    version: Literal[1] = 1
    attribute: str
    kind: Literal["pairs", "labels"]
    backbone: str
    backbone_hash: str
    head_only: bool
    pooling: Pooling
    """``model``: as the Hugging Face class does it. ``answer_mean``: the head reads the mean of
    the last hidden states over the completion's tokens."""
    format: Literal["chat", "pair"]
    max_length: int
    seed: int
    epochs: float
    batch_size: int
    learning_rate: float
    n_train: int
    n_held_out: int
    n_truncated: int
    """Rows (both splits; for pairs, sides) of which a part did not fit into ``max_length``."""
    data_hash: str
    """Of all rows: prompts, completions, labels, and the split."""
    train_prompts: tuple[str, ...]
    """Sorted distinct :func:`equipoise.overlap.prompt_key` of the rows trained on."""
    held_out_prompts: tuple[str, ...]
    held_out: HeldOut | None
    """``None`` only while it is being measured."""
    losses: tuple[float, ...]
    """Training loss, about fifty values over the run; empty for ``head_only``."""
    seconds: float

    def write(self, directory: Path) -> None:
        """Write ``reward.json`` into a model directory."""
        text = json.dumps(self.model_dump(mode="json"), indent=1, allow_nan=False)
        (directory / CARD).write_text(text + "\n", encoding="utf-8")


def read_card(directory: Path) -> RewardCard | None:
    """Read ``reward.json``; ``None`` where there is none (a model from elsewhere).

    Raises:
        ModelError: The file is damaged or of another version.
    """
    file = directory / CARD
    if not file.is_file():
        return None
    try:
        content: Any = json.loads(file.read_text(encoding="utf-8"))
        return RewardCard.model_validate(content)
    except ValueError as error:
        raise ModelError(
            f"Cannot read {file}",
            why=str(error).splitlines()[0],
            fix="Fit the reward model again, or delete the file to use the model as a plain one.",
        ) from error
