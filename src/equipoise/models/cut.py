"""Small models of a big one's kind: two layers, narrow heads, random weights, or none at all."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch

from equipoise.errors import ModelError
from equipoise.models.read import quiet

CUT_LAYERS = 2
VOCABULARY = 64
"""Rows of the embedding of a small model, if its tokenizer is not needed."""
_WINDOW, _WIDE, _EXPERTS = 6, 64, 4
_HEADS, _HEAD = 4, 16
_LARGEST = 10**9
_AMPLIFIED = 3.0
"""Times the initial weights: as it is born, a model hardly looks at other positions."""
_WIDTHS = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size",
           "ffn_dim", "n_inner", "ffn_hidden_size")  # fmt: skip
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
_COUNTS = {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}


def cut_config(config: Any, *, vocabulary: int | None = VOCABULARY) -> Any:
    """Return a copy of a config with two layers, one of each kind if there are several.

    Hidden size and heads stay: which of them fit together is for the architecture to know.

    Args:
        config: Of a causal language model.
        vocabulary: Rows of the embedding; None leaves them as they are, and windows and special
            tokens too.
    """
    small = copy.deepcopy(config)
    parts = [small, *(getattr(small, name) for name in getattr(small, "sub_configs", {}))]
    for part in parts:
        if part is not None and not isinstance(part, dict):
            _cut_layers(part)
            for name in _WIDTHS:
                _at_most(part, name, _WIDE)
            for name in _EXPERT_COUNTS:
                _at_most(part, name, _EXPERTS)
            for name, most in _COUNTS.items():
                _at_most(part, name, most)
    text = small.get_text_config()
    if vocabulary is not None:
        text.vocab_size = vocabulary
        for part in (small, text):
            for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
                if getattr(part, name, None) is not None:
                    setattr(part, name, None)
        if getattr(text, "sliding_window", None):
            text.sliding_window = _WINDOW
        positions = getattr(text, "max_position_embeddings", None)
        if isinstance(positions, int) and positions < VOCABULARY:
            text.max_position_embeddings = VOCABULARY
    return small


def _cut_layers(part: Any) -> None:
    layers = getattr(part, "num_hidden_layers", None)
    if not isinstance(layers, int) or layers <= CUT_LAYERS:
        return
    kinds = getattr(part, "layer_types", None) or []
    kept = sorted({kind: i for i, kind in reversed(list(enumerate(kinds)))}.values())
    kept = sorted({*kept, *range(CUT_LAYERS)} if len(kept) < CUT_LAYERS else kept)
    kept = kept[: max(CUT_LAYERS, len(set(kinds)))]
    lists = {
        name: value
        for name, value in vars(part).items()
        if isinstance(value, list) and len(value) == layers
    }
    part.num_hidden_layers = len(kept)
    for name, value in lists.items():
        setattr(part, name, [value[i] for i in kept])


def _at_most(part: Any, name: str, limit: int) -> None:
    value = getattr(part, name, None)
    if isinstance(value, int) and not isinstance(value, bool) and value > limit:
        setattr(part, name, limit)


def narrow(config: Any) -> Any:
    """Return a copy of a config with four narrow heads, where its text part has the usual names."""
    small = copy.deepcopy(config)
    text = small.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    if isinstance(heads, int) and heads >= _HEADS:
        shared = getattr(text, "num_key_value_heads", None) or heads
        text.num_attention_heads = _HEADS
        text.hidden_size = _HEADS * _HEAD
        if getattr(text, "num_key_value_heads", None):
            text.num_key_value_heads = max(1, _HEADS * shared // heads)
        _at_most(text, "rotary_dim", _HEAD)
        if vars(text).get("head_dim") and not hasattr(text, "qk_rope_head_dim"):
            text.head_dim = _HEAD
    return small


def narrowest_model(config: Any) -> Any:
    """Build a random model of a (small) config, with narrow heads where that can be built.

    Raises:
        ModelError: It cannot be built.
    """
    try:
        model = random_model(narrow(config))
        with torch.inference_mode():
            model(input_ids=torch.tensor([[3, 4, 5]]), use_cache=False)
    except Exception as error:  # its numbers do not fit together; it has to be as wide as it is
        size = sum(weight.numel() for weight in empty_model(config).parameters())
        if size > _LARGEST:
            why = f"two layers of it, with {size:,} numbers, are too large to be tried"
            raise refused(config.model_type, why) from error
        return random_model(config)
    return model


def random_model(config: Any) -> Any:
    """Build a model of a config with random weights, always the same, in evaluation mode.

    Raises:
        ModelError: Its class cannot be found or built.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _built(config, torch.float32)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim >= 2:
                    weight.mul_(_AMPLIFIED)
    return model.to("cpu").eval()


def empty_model(config: Any) -> Any:
    """Build a model of a config without numbers (on the meta device), to count and name them.

    Raises:
        ModelError: Its class cannot be found or built.
    """
    with torch.device("meta"):
        return _built(config, None)


def _built(config: Any, dtype: torch.dtype | None) -> Any:
    from transformers import AutoModelForCausalLM

    build: Any = AutoModelForCausalLM.from_config
    with quiet(logging.CRITICAL):
        try:
            return build(config, dtype=dtype)
        except Exception as error:  # a class checks its config as it pleases
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise refused(config.model_type, f"it cannot be built ({reason[:200]})") from error


def refused(kind: str, why: str) -> ModelError:
    """Return the error for a type of model that is not supported."""
    return ModelError(
        f"models of type {kind} are not supported",
        why=why,
        fix="use another model; docs/architectures.md lists those that were tried",
    )
