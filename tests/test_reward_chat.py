"""Reward models in chat format read the ids that their chat template gives, the answer included."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from bigram_kit import byte_tokenizer
from equipoise.encoding import sealing
from equipoise.encoding.encode import Encoder
from equipoise.errors import ModelError
from equipoise.rewards.input import InputEncoder
from equipoise.types import Message
from tokenizer_kit import FAMILIES, MARKERS, conversation, hostile, ordinary

_QWEN = (
    "{% for m in messages %}<|{{ m.role }}|>\n{% if m.role == 'assistant' and loop.last %}"
    "<think>\n\n</think>\n\n{% endif %}{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def qwen() -> PreTrainedTokenizerFast:
    """An empty thought before the last answer, and a line break behind it."""
    return byte_tokenizer(_QWEN, plain=("<think>", "</think>"))


_ALL: dict[str, Callable[[], PreTrainedTokenizerFast]] = {**FAMILIES, "qwen": qwen}


def input_of(tokenizer: PreTrainedTokenizerFast, max_length: int = 4096) -> InputEncoder:
    return InputEncoder.of(Encoder(tokenizer), format="chat", max_length=max_length)


@pytest.mark.parametrize("family", _ALL)
def test_the_ids_are_those_of_the_template(family: str) -> None:
    tokenizer = _ALL[family]()
    encode, rng = input_of(tokenizer), random.Random(family)
    for _ in range(200):
        turns, answer = conversation(rng, lambda: ordinary(rng)), ordinary(rng)
        whole = [*turns, {"role": "assistant", "content": answer}]
        own = tokenizer.apply_chat_template(whole, return_dict=False)
        row = encode([Message(t["role"], t["content"]) for t in turns], answer)  # type: ignore[arg-type]
        assert list(row.ids) == own, whole
        assert not row.truncated
        said = tokenizer.decode(row.ids[slice(*row.answer)], skip_special_tokens=True)
        letters = [c for c in answer.lower() if c.isascii() and c.isalnum()]
        if family not in ("wordpiece", "word_level"):  # these lose unknown words
            assert [c for c in said.lower() if c.isascii() and c.isalnum()] == letters


@pytest.mark.parametrize("family", FAMILIES)
def test_no_answer_writes_a_marker(family: str) -> None:
    tokenizer = _ALL[family]()
    encode, rng = input_of(tokenizer), random.Random(f"hostile {family}")
    forbidden = encode.encoder.forbidden
    asked = [Message("user", "the")]
    usual = [i for i in encode(asked, "the").ids if i in forbidden]
    for _ in range(300):
        ids = encode(asked, hostile(rng, MARKERS[family])).ids
        assert [i for i in ids if i in forbidden] == usual


def test_what_stands_behind_the_end_stays_when_the_rest_is_cut() -> None:
    tokenizer = qwen()
    row = input_of(tokenizer, 40)([Message("user", "p" * 100 + "Q")], "A" + "b" * 100)
    text = tokenizer.decode(row.ids)
    assert len(row.ids) == 40
    assert row.truncated
    assert "<|assistant|>\n<think>\n\n</think>\n\nAbb" in text
    assert text.endswith("b<|end|>\n")
    answer = tokenizer.decode(row.ids[slice(*row.answer)])
    assert answer.startswith("Abb")
    assert answer.endswith("b<|end|>")


@pytest.mark.parametrize("answer", ["", " ", "\n"])
def test_an_empty_answer_is_one(answer: str) -> None:
    tokenizer = qwen()
    row = input_of(tokenizer)([Message("user", "hi")], answer)
    assert tokenizer.decode(row.ids).endswith(f"</think>\n\n{answer}<|end|>\n")
    assert tokenizer.decode(row.ids[slice(*row.answer)]) == f"{answer}<|end|>"


def test_a_template_that_does_not_end_with_the_answer_is_refused() -> None:
    tokenizer = byte_tokenizer(
        "{% for m in messages | reverse %}{{ m.content }}<|end|>{% endfor %}"
    )
    with pytest.raises(ModelError, match="does not end with the answer"):
        input_of(tokenizer)([Message("user", "hi")], "yes")


class Counting:
    """A tokenizer that notes every text it encodes."""

    def __init__(self, tokenizer: Tokenizer, seen: list[str]) -> None:
        self.tokenizer, self.seen = tokenizer, seen

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)

    def encode(self, *texts: str, **options: Any) -> Any:
        self.seen += texts
        return self.tokenizer.encode(*texts, **options)


@pytest.mark.parametrize(
    ("family", "format"), [("byte_bpe", "chat"), ("byte_bpe", "pair"), ("wordpiece", "pair")]
)
def test_a_prompt_is_encoded_once_for_all_its_answers_and_each_answer_once(
    monkeypatch: pytest.MonkeyPatch, family: str, format: Literal["chat", "pair"]
) -> None:
    seen: list[str] = []
    seal = sealing.seal

    def counted(*given: Any) -> sealing.SealedTokenizer:
        found = seal(*given)
        return replace(found, tokenizer=Counting(found.tokenizer, seen))  # type: ignore[arg-type]

    monkeypatch.setattr(sealing, "seal", counted)
    encode = InputEncoder.of(Encoder(_ALL[family]()), format=format, max_length=512)
    seen.clear()
    for prompt in ("ferry", "kettle"):
        for answer in ("noon", "one", "two"):
            encode([Message("user", f"when does the {prompt} leave")], f"{prompt} at {answer}")
    for prompt in ("ferry", "kettle"):
        assert sum(f"the {prompt} leave" in text for text in seen) == 1
        for answer in ("noon", "one", "two"):
            assert sum(f"{prompt} at {answer}" in text for text in seen) == 1
