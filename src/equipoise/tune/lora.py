"""LoRA through peft, with the control rows trained and saved beside the adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from equipoise.dials.tokens import DialManifest

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def add_lora(model: PreTrainedModel, manifest: DialManifest, *, rank: int, seed: int) -> Any:
    """Wrap a model that has its control tokens installed; return the peft model.

    Only the adapter and the rows of the control tokens are trained and saved
    (``trainable_token_indices``), so the adapter directory stays small and the dials are in it.

    Args:
        model: A causal LM with installed dials.
        manifest: Says which rows are the control tokens'.
        rank: LoRA rank, at least 1; alpha is twice the rank.
        seed: Of the adapter's initial weights.
    """
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(seed)
    return get_peft_model(
        model,
        LoraConfig(
            task_type="CAUSAL_LM",
            r=rank,
            lora_alpha=2 * rank,
            lora_dropout=0.0,
            target_modules="all-linear",
            trainable_token_indices=list(manifest.all_ids),
        ),
    )
