"""A tiny policy, examples and requests for the sampling and tuning tests."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from equipoise.dials.encode import Encoder
from equipoise.models.load import LoadedPolicy
from equipoise.types import ControlledExample, DialSetting, Message, Prompt
from tokenizer_kit import byte_bpe

ATTRIBUTES = ("helpfulness", "safety")


def tiny_policy(*, tied: bool = True, attention: str = "sdpa", seed: int = 0) -> LoadedPolicy:
    """A two-layer Llama, 32 wide, on the byte-level BPE tokenizer of the kit."""
    tokenizer = byte_bpe()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=tied,
            attn_implementation=attention,
        )
    ).eval()
    return LoadedPolicy(model, tokenizer, Encoder(tokenizer), None, f"tiny-{seed}")


def prompt(index: int) -> Prompt:
    words = ["how", "do", "i", "clean", "the", "small", "brass", "bell", "number"]
    text = " ".join(words[: 2 + index % 7]) + f" {index}?"
    return Prompt(f"p{index}", (Message("user", text),), "train")


def examples(n_prompts: int = 6) -> list[ControlledExample]:
    """Four cells per prompt; what is said depends on the cell only."""
    words = {0: "no no no", 4: "yes gladly"}
    return [
        ControlledExample(
            prompt(i),
            DialSetting((hp, sf)),
            f"{words[hp]} {'carefully' if sf else 'boldly'}",
            True,
            {"helpfulness": hp / 5 + 0.1, "safety": sf / 5 + 0.1},
        )
        for i in range(n_prompts)
        for hp in (0, 4)
        for sf in (0, 4)
    ]
