"""The linear head of a sequence-classification model, and the features that it may read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from equipoise.errors import ModelError
from equipoise.models.reward_input import RewardInput

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
