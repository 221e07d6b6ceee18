"""Sequence-classification models: read whole, padded by a token that has a row, and how long."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from equipoise.errors import ModelError
from equipoise.models.adapter import is_adapter
from equipoise.models.hub import folder_of
from equipoise.models.limits import positions
from equipoise.models.read import check_headers, check_weights, read_config, read_weights


def read_classifier(place: str, *, attribute: str, num_labels: int | None = None) -> Any:
    """Load a sequence-classification model in float32.

    Args:
        place: Directory or hub id.
        attribute: For messages.
        num_labels: ``None`` to load a finished model; 1 to put a fresh head on a backbone.

    Raises:
        ModelError: Unreadable, or no head in the files of a finished model.
    """
    import torch
    from transformers import AutoModelForSequenceClassification

    folder = str(folder_of(place))
    if is_adapter(folder):
        raise ModelError(
            f"Cannot load {place} as reward model for {attribute}",
            why="It holds an adapter, and reward models are read whole.",
            fix="Merge it into its base first: `merge_and_unload` of peft, then `save_pretrained`.",
        )
    fresh, auto = num_labels is not None, AutoModelForSequenceClassification
    config = read_config(folder)
    if fresh:
        config.num_labels = num_labels
    check_headers(folder, config, auto, fresh=fresh)
    model, found = read_weights(folder, config, auto, torch.float32)
    of_head = {key for key in found["missing_keys"] if _is_of_head(key, model)}
    if of_head and not fresh:
        raise ModelError(
            f"{place} cannot score {attribute}: it has no classification head",
            why=f"Its weights lack {', '.join(sorted(of_head)[:3])}.",
            fix="Name a reward model, or train one on this backbone with `fit_reward`.",
        )
    if fresh:
        found["missing_keys"] = set(found["missing_keys"]) - of_head
        found["mismatched_keys"] = [
            one for one in found["mismatched_keys"] if not _is_of_head(one[0], model)
        ]
    check_weights(place, model, found)
    return model


def _is_of_head(name: str, model: Any) -> bool:
    # BERT's pooler belongs to its head: models that were trained otherwise have none.
    return not name.startswith(f"{model.base_model_prefix}.") or ".pooler." in name


def settle_padding(model: Any, tokenizer: Any, ends: Container[int] = ()) -> None:
    """Make model and tokenizer agree on padding: causal heads read the last token before it.

    Args:
        model: Its config is changed in place.
        tokenizer: Its padding token counts where the config names none.
        ends: Of a finished model: ids that end a row. A head without padding reads the end itself,
            so a model that pads with its end would be read one token too early.

    Raises:
        ModelError: There is no padding token, or no row for it.
    """
    config = model.config.get_text_config()
    if config.pad_token_id is None:
        config.pad_token_id = tokenizer.pad_token_id
        if config.pad_token_id in ends:
            n_rows = model.get_input_embeddings().weight.shape[0]
            config.pad_token_id = next((i for i in range(n_rows) if i not in ends), None)
    if config.pad_token_id is None:
        raise ModelError(
            "The reward model has no padding token",
            why="Neither its config nor its tokenizer names one, nor an end token to stand in.",
            fix="Set pad_token in tokenizer_config.json.",
        )
    n_rows = model.get_input_embeddings().weight.shape[0]
    if not 0 <= config.pad_token_id < n_rows:
        raise ModelError(
            f"The reward model pads with id {config.pad_token_id}, for which it has no row",
            why=f"Its embedding has the rows 0 to {n_rows - 1}.",
            fix="Set pad_token_id in config.json, or pad_token in tokenizer_config.json, to a "
            "token with a row that stands in no text.",
        )


def longest_input(config: Any, tokenizer: Any, wanted: int) -> int:
    """``wanted``, or less where model or tokenizer cannot take so many tokens."""
    longest = tokenizer.model_max_length
    if not isinstance(longest, int | float) or not longest > 0:
        raise ModelError(
            f"The reward model takes {longest!r} tokens",
            why="That is model_max_length in tokenizer_config.json.",
            fix="Set it to a number, or leave it out.",
        )
    return int(min(wanted, positions(config) or wanted, longest))
