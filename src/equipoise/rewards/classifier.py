"""Sequence-classification models: how they are read, their linear head and what it reads."""

from __future__ import annotations

from collections.abc import Container, Sequence
from typing import TYPE_CHECKING, Any

from equipoise.errors import ModelError
from equipoise.models.adapter import is_adapter
from equipoise.models.hub import folder_of
from equipoise.models.limits import positions
from equipoise.models.read import check_headers, check_weights, read_config, read_weights
from equipoise.rewards.input import RewardInput, length_batches

if TYPE_CHECKING:
    import torch


def head_of(model: Any) -> Any:
    """The linear head of a sequence-classification model.

    Raises:
        ModelError: The head is more than one linear layer.
    """
    import torch

    for name in ("score", "classifier"):
        head = getattr(model, name, None)
        if isinstance(head, torch.nn.Linear):
            return head
    raise ModelError(
        f"{type(model).__name__} has no plain linear head",
        why="head_only trains one linear layer on frozen features.",
        fix="Set head_only: false, or use another backbone.",
    )


def answer_mean(
    model: Any, batch: dict[str, torch.Tensor], rows: Sequence[RewardInput]
) -> torch.Tensor:
    """Mean of the last hidden states over each completion's tokens, (B, D)."""
    import torch

    hidden = model.base_model(**batch).last_hidden_state  # (B, T, D)
    position = torch.arange(hidden.shape[1], device=hidden.device)
    start = torch.tensor([row.answer[0] for row in rows], device=hidden.device)[:, None]
    end = torch.tensor([row.answer[1] for row in rows], device=hidden.device)[:, None]
    inside = ((position >= start) & (position < end)).to(hidden.dtype)  # (B, T)
    total: torch.Tensor = (hidden * inside[..., None]).sum(1)
    return total / inside.sum(1, keepdim=True).clamp(min=1)


class FrozenFeatures:
    """What linear heads read off one frozen backbone: the mean hidden state of each completion.

    The rows of the last call are kept, since the reward models of one pool are asked about the same
    rows one after the other; so two heads on one backbone cost one pass through it.

    Args:
        model: A sequence-classification model whose backbone is read.
        batch_size: Rows computed together; it does not change a feature.
    """

    def __init__(self, model: Any, *, batch_size: int = 64) -> None:
        self.positions = 0
        """Tokens through the backbone so far, padding not counted."""
        self._model, self._batch_size = model.eval(), batch_size
        self._kept: dict[RewardInput, torch.Tensor] = {}

    @property
    def body(self) -> torch.nn.Module:
        """The frozen backbone, without a head."""
        body: torch.nn.Module = self._model.base_model
        return body

    def of(self, rows: Sequence[RewardInput]) -> torch.Tensor:
        """Return features (B, D), in order; rows that the last call had are not computed again."""
        import torch

        fresh = list(dict.fromkeys(row for row in rows if row not in self._kept))
        found = {row: self._kept[row] for row in rows if row in self._kept}
        for batch in length_batches([len(row.ids) for row in fresh], self._batch_size):
            chosen = [fresh[i] for i in batch]
            self.positions += sum(len(row.ids) for row in chosen)
            inputs = model_inputs(self._model, chosen)
            with torch.inference_mode():
                found.update(zip(chosen, answer_mean(self._model, inputs, chosen), strict=True))
        self._kept = found
        return torch.stack([found[row] for row in rows])


def model_inputs(model: Any, rows: Sequence[RewardInput]) -> dict[str, torch.Tensor]:
    """Return what a model is called with to read rows, padded on the right, on its device.

    Returns:
        ``input_ids``, ``attention_mask`` and, where the model tells two segments apart (BERT does,
        RoBERTa and Llama do not), ``token_type_ids``; each (B, T).
    """
    import torch

    width = max(len(row.ids) for row in rows)
    ids = torch.full((len(rows), width), model.config.get_text_config().pad_token_id)  # (B, T)
    mask = torch.zeros_like(ids)  # (B, T)
    types = torch.zeros_like(ids)  # (B, T)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        mask[i, : len(row.ids)] = 1
        types[i, : len(row.ids)] = torch.tensor(row.type_ids)
    batch = {"input_ids": ids, "attention_mask": mask}
    if int(getattr(model.config, "type_vocab_size", 0) or 0) > 1:
        batch["token_type_ids"] = types
    return {name: tensor.to(model.device) for name, tensor in batch.items()}


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
