"""A base model from raw text: a byte-level BPE tokenizer and a small Llama, both from scratch."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from equipoise.config import PretrainConfig
from equipoise.data.dialogues import Dialogue
from equipoise.seeds import derive_seed

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
"""A base model is asked in the form in which its dialogues were written down."""
_SPECIAL = ("<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
_POSITIONS = 2
"""Positions per token of the longest row: answers may run on."""


def train_tokenizer(rows: Sequence[str | Dialogue], vocabulary: int) -> Any:
    """Train a byte-level BPE tokenizer with role markers and a chat template on the rows."""
    return byte_bpe(_texts(rows), vocabulary)


def byte_bpe(texts: Iterable[str], vocabulary: int, **settings: Any) -> Any:
    """Train a byte-level BPE tokenizer with role markers and a chat template.

    Args:
        texts: What it is trained on.
        vocabulary: Tokens in all.
        settings: Of the tokenizer besides, such as ``model_max_length``.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(_SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    tokenizer: Any = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        additional_special_tokens=list(_SPECIAL[2:]),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        **settings,
    )
    return tokenizer


def new_model(tokenizer: Any, config: PretrainConfig, *, seed: int) -> LlamaForCausalLM:
    """Return an untrained Llama."""
    return small_llama(
        tokenizer,
        width=config.width,
        layers=config.layers,
        heads=config.heads,
        positions=_POSITIONS * config.max_length,
        seed=derive_seed(seed, "base weights"),
    )


def small_llama(
    tokenizer: Any, *, width: int, layers: int, heads: int, positions: int, seed: int
) -> LlamaForCausalLM:
    """Return an untrained Llama with tied embeddings; ``seed`` is that of its weights."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            intermediate_size=width * 11 // 4,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=positions,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=int(tokenizer.eos_token_id),
            pad_token_id=int(tokenizer.pad_token_id),
        )
    )


def _texts(rows: Sequence[str | Dialogue]) -> Iterator[str]:
    for row in rows:
        if isinstance(row, str):
            yield row
        else:
            yield " ".join([*(message.content for message in row[0].messages), row[1]])
