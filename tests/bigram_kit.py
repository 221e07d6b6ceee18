"""Models that say what a test wants: the next token depends on the last one only."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from equipoise.config import Sampling
from equipoise.engine.sample import TransformersEngine
from equipoise.engine.seam import Sampled
from equipoise.models.load import LoadedPolicy
from equipoise.types import Branch, GenerationRequest, Message

HI = (Message("user", "hi"),)
TURNS = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
ASKED = "{% if add_generation_prompt %}<|assistant|>{% endif %}"


def byte_tokenizer(
    template: str | None = TURNS + ASKED,
    markers: Sequence[str] = ("<|end|>", "<|system|>", "<|user|>", "<|assistant|>"),
    *,
    plain: Sequence[str] = (),
    eos: str | None = "<|end|>",
) -> PreTrainedTokenizerFast:
    """One token per byte, the markers, and added tokens that are not flagged special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(m, special=True, normalized=False) for m in markers])
    tokenizer.add_tokens([AddedToken(p, special=False, normalized=False) for p in plain])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=eos)
    wrapped.chat_template = template
    return wrapped


def bigram(n_tokens: int, said: Sequence[int]) -> LlamaForCausalLM:
    """A Llama of V tokens that goes on with ``said[i + 1]`` behind ``said[i]``."""
    size = n_tokens + n_tokens % 2
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=size,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        tie_word_embeddings=False,
        max_position_embeddings=1024,
        bos_token_id=None,
        eos_token_id=None,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for weight in model.model.layers.parameters():
            if weight.ndim == 2:
                weight.zero_()
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.lm_head.weight.zero_()
        for last, following in pairwise(said):
            model.lm_head.weight[following, last] = 20 / size**0.5
    return model


def bigram_dir(
    folder: Path,
    tokenizer: PreTrainedTokenizerFast,
    said: Sequence[str],
    *,
    ends: object = None,
) -> str:
    """Write a bigram model that says these tokens; ``ends`` goes into generation_config."""
    ids = tokenizer.convert_tokens_to_ids(list(said))
    bigram(len(tokenizer), ids).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if ends is not None:
        text = json.dumps({"eos_token_id": ends})
        (folder / "generation_config.json").write_text(text)
    return str(folder)


def sample(policy: LoadedPolicy, max_tokens: int = 16) -> Sampled:
    """Ask the model, greedily."""
    engine = TransformersEngine(policy.model, policy.encoder, model_hash="")
    request = GenerationRequest(tuple(policy.encoder.prompt_ids(HI)), (Branch((), 1),))
    return engine.generate([request], Sampling(top_k=1, max_tokens=max_tokens))[0][0]
