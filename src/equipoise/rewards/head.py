"""The linear head of a sequence-classification model, and the features that it may read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from equipoise.errors import ModelError
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
