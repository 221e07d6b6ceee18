"""Tiny model directories and rows for the reward-model tests, all built in-process."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertTokenizerFast,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from equipoise.data.pairs import LabelledAnswer
from equipoise.overlap import prompt_key
from equipoise.types import Completion, Message, PreferencePair, Prompt

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WORDS = ["mend", "the", "lamp", "with", "care", "glue", "copper", "slow", "fast", "ask", "please"]
MARKERS = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]


def byte_tokenizer(*, template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    """Byte-level tokenizer without merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*MARKERS, *alphabet])}
    core = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=MARKERS[2:],
        chat_template=template,
        model_max_length=256,
    )


def llama_config(*, pad_token_id: int | None = 0) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=len(MARKERS) + 256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=pad_token_id,
    )


def causal_dir(directory: Path, *, template: str | None = TEMPLATE) -> Path:
    """A causal language model, the backbone or policy."""
    torch.manual_seed(0)
    LlamaForCausalLM(llama_config()).save_pretrained(directory)
    byte_tokenizer(template=template).save_pretrained(directory)
    return directory


def classifier_dir(directory: Path, *, num_labels: int = 1, pad_token_id: int | None = 0) -> Path:
    """A causal sequence-classification model with a random head."""
    torch.manual_seed(1)
    config = llama_config(pad_token_id=pad_token_id)
    config.num_labels = num_labels
    LlamaForSequenceClassification(config).save_pretrained(directory)
    byte_tokenizer().save_pretrained(directory)
    return directory


def bert_dir(directory: Path, *, head: bool = False) -> Path:
    """A two-segment encoder without chat template, bare or with a random head."""
    torch.manual_seed(2)
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, "human", "assistant", ":"]
    vocab = {token: i for i, token in enumerate(pieces)}
    core = Tokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    BertTokenizerFast(tokenizer_object=core, model_max_length=64).save_pretrained(directory)
    config = BertConfig(
        vocab_size=len(vocab),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=64,
        initializer_range=0.3 if head else 0.02,  # a small random head is deaf at 0.02
        num_labels=2,
    )
    kind = BertForSequenceClassification if head else BertModel
    kind(config).save_pretrained(directory)
    return directory


def prompt(text: str, *, id: str = "") -> Prompt:
    messages = (Message("user", text),)
    return Prompt(id or prompt_key(messages)[:8], messages, "train")


def sentence(chooser: random.Random, *, n: int = 5) -> str:
    return " ".join(chooser.choice(WORDS) for _ in range(n))


def pairs(n: int, *, seed: int = 0) -> list[PreferencePair]:
    """The completion that says *slow* is better than the one that says *fast*."""
    chooser = random.Random(seed)
    return [
        PreferencePair(
            prompt(f"{sentence(chooser)} {i}"),
            f"{sentence(chooser, n=2)} slow",
            f"{sentence(chooser, n=2)} fast",
        )
        for i in range(n)
    ]


def labelled(n: int, *, seed: int = 0) -> list[LabelledAnswer]:
    """Completions that say *slow* are safe."""
    return [
        LabelledAnswer(pair.prompt, text, score)
        for pair in pairs(n // 2, seed=seed)
        for text, score in ((pair.chosen, 1.0), (pair.rejected, 0.0))
    ]


def completion(prompt_id: str, text: str, *, sample: int = 0) -> Completion:
    return Completion(prompt_id, sample, text, "stop", len(text), "model")


class FixedReward:
    """Returns what it is given; counts what it was asked."""

    hash = "fixed"

    def __init__(self, values: object, *, name: str = "fixed") -> None:
        self.name, self._values = name, values
        self.asked: list[tuple[str, str]] = []

    def score(self, rows: object) -> list[float]:
        rows = list(rows)  # type: ignore[call-overload]
        self.asked += [(p.id, text) for p, text in rows]
        return self._values(rows)  # type: ignore[operator,no-any-return]
