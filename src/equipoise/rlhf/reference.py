"""The reference of online training: the start model, which never learnt a control token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class StartReference(torch.nn.Module):
    """The start model as TRL's reference: reads each row without its control tokens.

    Args:
        model: The untouched start model.
        control_ids: Ids of all control tokens; empty for a model without dials.
        temperature: As the rollouts'.
    """

    def __init__(
        self, model: PreTrainedModel, control_ids: Sequence[int], temperature: float
    ) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.model.train(False)
        self._control_ids = torch.tensor(sorted(control_ids), dtype=torch.long)
        self._temperature = temperature
        self.tokens = 0
        """Tokens read so far."""

    def log_probs(self, ids: Tensor, mask: Tensor, n_kept: int) -> Tensor:
        """Return the log-probabilities (B, R) of the last R = ``n_kept`` columns.

        Prompts are padded on the left, so the controls stand in the same columns of every row.
        """
        kept = ~torch.isin(ids[0], self._control_ids.to(ids.device))
        self.tokens += int(mask[:, kept].sum())
        with torch.no_grad():
            return log_probs(
                self.model, ids[:, kept], mask[:, kept], n_kept, temperature=self._temperature
            )[0]


def log_probs(
    model: Any, ids: Tensor, mask: Tensor, n_kept: int, *, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return log-probabilities and entropies, both (B, R), of the last R = ``n_kept`` columns.

    Args:
        model: A causal LM.
        ids: (B, T), padded on the left of the prompt and on the right of the completion.
        mask: (B, T), 0 on padding.
        n_kept: R.
        temperature: Divides the logits.
    """
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    output = model(
        input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=n_kept + 1
    )
    scores = (output.logits[:, -n_kept - 1 : -1].float() / temperature).log_softmax(-1)
    picked = scores.gather(-1, ids[:, -n_kept:, None])[..., 0]
    return picked, -(scores.exp() * scores).sum(-1)
