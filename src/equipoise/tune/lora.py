"""LoRA through peft, with the control rows trained and saved beside the adapter."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from equipoise.dials import embeddings as rows
from equipoise.dials.manifest import DialManifest
from equipoise.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def add_lora(
    model: PreTrainedModel,
    manifest: DialManifest,
    *,
    rank: int,
    seed: int,
    revision: str | None = None,
) -> Any:
    """Wrap a model that has its control tokens installed; return the peft model.

    Only the adapter and the control tokens' rows are trained and saved, those of the embedding and
    of an untied output head (``trainable_token_indices``), so the adapter directory stays small and
    the dials are in it.

    Args:
        model: A causal LM with installed dials.
        manifest: Says which rows are the control tokens'.
        rank: LoRA rank, at least 1; alpha is twice the rank.
        seed: Of the adapter's initial weights.
        revision: The commit of a model that came from the hub, by which the adapter will find it.

    Raises:
        ModelError: The output head has a bias, which peft leaves out where it trains rows.
    """
    from peft import LoraConfig, get_peft_model

    if rows.head_bias(model) is not None:
        raise ModelError(
            f"LoRA cannot tune models of type {model.config.model_type}",
            why="their output head has a bias, and peft drops it where rows of a head are trained",
            fix="tune full weights: tune.lora_rank=0",
        )
    torch.manual_seed(seed)
    wrapped: Any = get_peft_model(
        model,
        LoraConfig(
            task_type="CAUSAL_LM",
            r=rank,
            lora_alpha=2 * rank,
            lora_dropout=0.0,
            target_modules="all-linear",
            trainable_token_indices={
                name: list(manifest.all_ids) for name in rows.row_modules(model)
            },
            revision=revision,
        ),
    )
    # peft keeps these names in a set and writes them in its order, another in every process.
    adapter = wrapped.peft_config["default"]
    adapter.target_modules = sorted(adapter.target_modules)
    # Left to itself, peft asks the hub at every checkpoint whether the embedding was resized, and
    # then saves embedding and head whole. The control rows are in the adapter already.
    wrapped.save_pretrained = partial(wrapped.save_pretrained, save_embedding_layers=False)
    # peft's README.md names the base by its path on this machine; dials.json says the rest.
    wrapped.create_or_update_model_card = lambda output_dir: None
    return wrapped
