"""Any Hugging Face sequence-classification model as a reward model.

A score depends on prompt and completion only: not on the batch, not on the order.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from equipoise.config import RewardModelConfig
from equipoise.errors import ModelError, RewardError
from equipoise.models.files import clear_errors
from equipoise.models.hub import model_hash, resolve_model
from equipoise.models.limits import check_vocabulary
from equipoise.models.load import default_device, load_tokenizer
from equipoise.models.read import read_config
from equipoise.rewards.card import Pooling, RewardCard, read_card
from equipoise.rewards.classifier import (
    FrozenFeatures,
    head_of,
    longest_input,
    model_inputs,
    read_classifier,
    settle_padding,
)
from equipoise.rewards.input import InputEncoder, RewardInput, length_batches
from equipoise.types import Prompt, RewardModel

if TYPE_CHECKING:
    from equipoise.encoding.encode import Encoder


def files_hash(config: RewardModelConfig, *, fitted_root: Path | None) -> str:
    """Return the hash of a reward model's files; sign, logit, format and length are not in it."""
    if config.oracle is not None:
        return load_reward_model(config, attribute=config.oracle).hash
    return model_hash(resolve_model(config.model, fitted_root=fitted_root))


def reward_hash(config: RewardModelConfig, *, fitted_root: Path | None) -> str:
    """Return the hash that the loaded reward model carries, without reading its weights.

    Raises:
        ModelError: The model is missing, or its config or tokenizer cannot be used.
    """
    from equipoise.encoding.encode import Encoder

    files = files_hash(config, fitted_root=fitted_root)
    if config.oracle is not None:
        return files
    place = resolve_model(config.model, fitted_root=fitted_root)
    card = _card_of(place)
    with clear_errors(config.model, " (its tokenizer)"):
        encoder = Encoder(load_tokenizer(place))
    return _settings_hash(files, config, _input_of(config, card, encoder, read_config(place)), card)


def _card_of(place: str) -> RewardCard | None:
    return read_card(Path(place)) if Path(place).is_dir() else None


def _input_of(
    config: RewardModelConfig, card: RewardCard | None, encoder: Encoder, model_config: Any
) -> InputEncoder:
    return InputEncoder.of(
        encoder,
        format=card.format if card is not None and config.format == "auto" else config.format,
        max_length=longest_input(model_config, encoder.tokenizer, config.max_length),
    )


def _settings_hash(
    files: str, config: RewardModelConfig, encode: InputEncoder, card: RewardCard | None
) -> str:
    """The hash of all that decides a score: the files, and how the recipe reads them."""
    pooling: Pooling = "model" if card is None else card.pooling
    settings = (files, encode.format, encode.max_length, config.sign, config.logit, pooling)
    return hashlib.sha256("\n".join(map(str, settings)).encode()).hexdigest()


def load_reward_model(
    config: RewardModelConfig,
    *,
    attribute: str,
    fitted_root: Path | None = None,
    batch_size: int = 64,
    device: str | None = None,
    features: dict[str, FrozenFeatures] | None = None,
) -> RewardModel:
    """Load a reward model or judge.

    Args:
        config: Name (see :mod:`equipoise.config`; also ``workshop://oracle/ATTRIBUTE``), prompt
            format, sign and logit.
        attribute: For messages.
        fitted_root: Folder of the reward models that this run has trained.
        batch_size: Rows scored together; it does not change a score.
        device: A torch device; by default the GPU if there is one, else the CPU.
        features: Frozen features by their source. Reward models loaded with one dict share what
            they read off the same frozen backbone: two heads cost one pass.

    Raises:
        ModelError: The model is missing, has no classification head, or no such logit.
    """
    if config.oracle is not None:
        from equipoise.worlds import workshop

        oracle: RewardModel = workshop.oracle_model(config.oracle)
        return oracle
    from equipoise.encoding.encode import Encoder

    place = resolve_model(config.model, fitted_root=fitted_root)
    tokenizer = load_tokenizer(place)
    model = read_classifier(place, attribute=attribute)
    if config.logit >= model.config.num_labels:
        raise ModelError(
            f"{config.model} has no logit {config.logit}",
            why=f"Its head has {model.config.num_labels} outputs, counted from 0.",
            fix=f"Correct reward_models.{attribute}.logit.",
        )
    card = _card_of(place)
    with clear_errors(config.model, " (its tokenizer)"):
        encoder = Encoder(tokenizer)
        settle_padding(model, tokenizer, encoder.eos_ids)
        check_vocabulary(config.model, model, encoder)
    model.to(device or default_device())
    encode = _input_of(config, card, encoder, model.config)
    shared = None
    if card is not None and card.pooling == "answer_mean":
        source = f"{card.backbone_hash} {encode.format} {encode.max_length}"
        shared = FrozenFeatures(model, batch_size=batch_size)
        if features is not None:
            shared = features.setdefault(source, shared)
            # Both bodies hold the same numbers: one of them is enough.
            setattr(model, model.base_model_prefix, shared.body)
    return ClassifierReward(
        model,
        encode,
        name=config.model,
        hash=_settings_hash(model_hash(place), config, encode, card),
        sign=config.sign,
        logit=config.logit,
        features=shared,
        batch_size=batch_size,
    )


class ClassifierReward:
    """Scores with a loaded sequence-classification model; see :func:`load_reward_model`."""

    def __init__(
        self,
        model: Any,
        encode: InputEncoder,
        *,
        name: str,
        hash: str,
        sign: int = 1,
        logit: int = 0,
        features: FrozenFeatures | None = None,
        batch_size: int = 64,
    ) -> None:
        self.model = model.eval()
        self.encode = encode
        self.name, self.hash = name, hash
        self.n_truncated = 0
        """Rows so far of which a part did not fit into ``max_length``."""
        self._sign, self._logit, self._features = sign, logit, features
        self._batch_size = batch_size

    def score(self, pairs: Sequence[tuple[Prompt, str]]) -> list[float]:
        """Return one finite score per (prompt, completion text), in order; higher is better.

        Raises:
            RewardError: The model gave another shape or a value that is not finite; the message
                names the prompt.
        """
        rows = [self.encode(prompt.messages, text) for prompt, text in pairs]
        self.n_truncated += sum(row.truncated for row in rows)
        values = self._logits(rows)
        for value, (prompt, _) in zip(values, pairs, strict=True):
            if not math.isfinite(value):
                raise not_finite(self.name, value, prompt.id)
        return [self._sign * value for value in values]

    def _logits(self, rows: Sequence[RewardInput]) -> list[float]:
        import torch

        if self._features is not None:
            with torch.inference_mode():
                read = self._checked(head_of(self.model)(self._features.of(rows)), rows)
            return [float(value) for value in read[:, self._logit]]
        values = [math.nan] * len(rows)
        for batch in length_batches([len(row.ids) for row in rows], self._batch_size):
            for i, value in zip(batch, self._forward([rows[i] for i in batch]), strict=True):
                values[i] = value
        return values

    def _forward(self, rows: Sequence[RewardInput]) -> list[float]:
        import torch

        with torch.inference_mode():
            logits = self._checked(
                self.model(**model_inputs(self.model, rows)).logits, rows
            )  # (B, n_labels)
        values: list[float] = logits[:, self._logit].float().tolist()
        return values

    def _checked(self, logits: Any, rows: Sequence[RewardInput]) -> Any:
        if tuple(logits.shape) != (len(rows), self.model.config.num_labels):
            raise RewardError(
                f"Reward model {self.name} returned scores of the wrong shape",
                why=f"{tuple(logits.shape)} for {len(rows)} rows.",
                fix="Use a sequence-classification model; nothing was written.",
            )
        return logits


def not_finite(name: str, value: float, prompt_id: str) -> RewardError:
    """The error for a score that is NaN or infinite."""
    return RewardError(
        f"Reward model {name} returned {value} for a completion of prompt {prompt_id}",
        why="A score must be a finite number; weights or number type of the model may be broken.",
        fix="Check the model on this prompt; nothing was written.",
    )
