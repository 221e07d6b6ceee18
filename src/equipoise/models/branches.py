"""Several continuations of one prompt in one forward: masks in which branches do not meet.

A mask of our own replaces the model's, so a layer's sliding window has to be part of it. Windows
are counted in positions, which go on from the prompt's end in every branch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from equipoise.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FULL, SLIDING = "full_attention", "sliding_attention"


def layer_windows(config: Any) -> dict[str, int | None]:
    """Return the kinds of a model's layers, each with its window in positions (None: no window).

    Args:
        config: The model's config.

    Raises:
        ModelError: A kind of layer is neither full nor sliding attention.
    """
    text = config.get_text_config()
    window: int | None = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None) or [FULL if window is None else SLIDING]
    unknown = sorted(set(kinds) - {FULL, SLIDING})
    if unknown:
        raise ModelError(
            f"models of type {config.model_type} are not supported",
            why=f"they have layers of kind {', '.join(unknown)}, and the branches of a prompt can "
            "be kept apart in full and sliding attention only",
            fix="use another model; docs/architectures.md lists those that were tried",
        )
    return {kind: window if kind == SLIDING else None for kind in sorted(set(kinds))}


def branch_mask(branch_ids: Tensor, position_ids: Tensor, window: int | None = None) -> Tensor:
    """Return which key each query may see: a boolean (B, 1, T, T).

    A query sees earlier keys of the prompt and of its own branch, within the window. Padding sees
    itself only, since a row of the mask with nothing in it would be not-a-number.

    Args:
        branch_ids: (B, T): -1 padding, 0 prompt, 1.. branches.
        position_ids: (B, T).
        window: In positions; None for none.
    """
    query, key = branch_ids[:, :, None], branch_ids[:, None, :]
    length = branch_ids.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=branch_ids.device).tril()
    allowed = ((key == 0) | (key == query)) & (key >= 0) & earlier
    if window is not None:
        allowed &= position_ids[:, :, None] - position_ids[:, None, :] < window
    allowed |= torch.eye(length, dtype=torch.bool, device=branch_ids.device)
    return allowed[:, None]


def branch_inputs(
    model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, branch_ids: Tensor
) -> dict[str, Any]:
    """Return what ``model`` is called with to read all branches of a batch apart.

    Args:
        model: A causal language model.
        input_ids: (B, T).
        position_ids: (B, T).
        branch_ids: See :func:`branch_mask`.
    """
    masks = {
        kind: branch_mask(branch_ids, position_ids, window)
        for kind, window in layer_windows(model.config).items()
    }
    if getattr(model.config, "_attn_implementation", "sdpa") != "sdpa":
        lowest = torch.finfo(model.dtype).min
        masks = {
            kind: torch.zeros_like(mask, dtype=model.dtype).masked_fill(~mask, lowest)
            for kind, mask in masks.items()
        }
    # A model whose layers are of one kind takes one mask, one of several kinds a mask for each.
    mask: Any = masks if len(masks) > 1 else next(iter(masks.values()))
    return {"input_ids": input_ids, "position_ids": position_ids, "attention_mask": mask}
