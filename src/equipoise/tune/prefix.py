"""The shared prefix: one forward over ``prompt ‖ ζ y ‖ ζ' y`` with branches that do not meet.

Costs (P + 2R)/(P + R) of CLM instead of 2, and equals separate forwards (DESIGN section 3).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def branch_mask(branch_ids: Tensor) -> Tensor:
    """Return which key each query may see: (B, T) branch ids to a boolean (B, 1, T, T).

    A query sees earlier keys of the prompt and of its own branch. Padding sees itself only, since
    a row of the mask with nothing in it would be not-a-number.
    """
    query, key = branch_ids[:, :, None], branch_ids[:, None, :]
    length = branch_ids.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=branch_ids.device).tril()
    allowed = ((key == 0) | (key == query)) & (key >= 0) & earlier
    allowed |= torch.eye(length, dtype=torch.bool, device=branch_ids.device)
    return allowed[:, None]


def branch_logits(
    model: PreTrainedModel,
    input_ids: Tensor,
    position_ids: Tensor,
    branch_ids: Tensor,
    *,
    n_branches: int,
    branch_length: int,
) -> Tensor:
    """Return the logits of the branches only: (B, N, R, V).

    The prompt's logits are never computed: no label stands there, and on a real model the
    vocabulary is a fifth of the compute.
    """
    mask = branch_mask(branch_ids)
    if getattr(model.config, "_attn_implementation", "sdpa") != "sdpa":
        additive = torch.zeros(mask.shape, dtype=model.dtype, device=mask.device)
        mask = additive.masked_fill(~mask, torch.finfo(model.dtype).min)
    output = model(
        input_ids=input_ids,
        position_ids=position_ids,
        attention_mask=mask,
        use_cache=False,
        logits_to_keep=n_branches * branch_length,
    )
    logits: Tensor = output.logits
    return logits.reshape(len(logits), n_branches, branch_length, -1)
