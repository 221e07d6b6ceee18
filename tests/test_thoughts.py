"""Thoughts: their marks are no text, may be sampled, and are no part of the answer."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from bigram_kit import ASKED, HI, TURNS, bigram_dir, byte_tokenizer, sample
from equipoise.dials.encode import Encoder
from equipoise.models.load import load_causal
from equipoise.types import Message
from tokenizer_kit import hostile

_MARKERS = ("<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
_PLAIN = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<box>", "</box>")
_CUT = TURNS.replace("m['content']", "m['content'].split('</think>')[-1]")

TEMPLATES = {
    "opened by the prompt": _CUT + ASKED.replace("{% endif %}", "<think>\n{% endif %}"),
    "opened by the prompt, kept in history": TURNS
    + ASKED.replace("{% endif %}", "<think>\n{% endif %}"),
    "opened by the model": _CUT + ASKED,
    "a switch that writes an empty thought": TURNS
    + ASKED.replace(
        "{% endif %}",
        "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
        "{% endif %}{% endif %}",
    ),
    "a switch that opens or closes": TURNS
    + ASKED.replace(
        "{% endif %}", "{% if thinking %}<think>{% else %}</think>{% endif %}{% endif %}"
    ),
    "an empty thought before every answer": (
        "{% for m in messages %}<|{{ m.role }}|>"
        "{% if m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}<|end|>{% endfor %}"
    )
    + ASKED,
    "its own field": (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.reasoning_content %}"
        "<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}<|end|>{% endfor %}"
    )
    + ASKED,
    "explained to the model": "<|system|>Put <think> first, then </think>.<|end|>" + _CUT + ASKED,
}
NONE = {
    "no mention": TURNS + ASKED,
    "tools": TURNS + "{% if tools %}<tool_call>{{ tools }}</tool_call>{% endif %}" + ASKED,
    "around the user": (
        "{% for m in messages %}{% if m.role == 'user' %}<box>{{ m.content }}</box>"
        "{% else %}{{ m.content }}<|end|>{% endif %}{% endfor %}"
    ),
    "explained only": "<|system|>Put <think> first, then </think>.<|end|>" + TURNS + ASKED,
}


def encoder_of(template: str) -> Encoder:
    return Encoder(byte_tokenizer(template, _MARKERS, plain=_PLAIN))


def names(encoder: Encoder, ids: object) -> set[str]:
    return set(encoder.tokenizer.convert_ids_to_tokens(sorted(ids)))  # type: ignore[call-overload]


@pytest.mark.parametrize("kind", TEMPLATES)
def test_marks_of_thoughts_may_be_sampled_and_no_text_writes_them(kind: str) -> None:
    encoder = encoder_of(TEMPLATES[kind])
    assert encoder.thought is not None
    marks = encoder.thought.ids
    assert names(encoder, marks) == {"<think>", "</think>"}
    assert marks <= encoder.forbidden
    assert not marks & set(encoder.masked_ids)
    assert {"<|system|>", "<|user|>", "<|assistant|>"} <= names(encoder, encoder.masked_ids)
    plain = encoder.prompt_ids([Message("user", "a"), Message("assistant", "b"), *HI])
    own = [i for i in plain if i in encoder.forbidden]
    rng = random.Random(kind)
    for _ in range(100):
        texts = [hostile(rng, ["<think>", "</think>", "<|end|>"]) + "." for _ in range(3)]
        turns = [Message("user", texts[0]), Message("user", texts[2])]
        turns.insert(1, Message("assistant", texts[1]))
        assert [i for i in encoder.prompt_ids(turns) if i in encoder.forbidden] == own
        assert not encoder.forbidden & set(encoder.completion_ids(texts[0], finished=False))


@pytest.mark.parametrize("kind", NONE)
def test_other_pairs_are_no_thoughts(kind: str) -> None:
    encoder = encoder_of(NONE[kind])
    assert encoder.thought is None
    # What the template mentions stays a marker: no text writes it, and it is never sampled.
    mentioned = {p for p in _PLAIN if p in NONE[kind]}
    assert mentioned <= names(encoder, encoder.masked_ids)


def test_thoughts_are_no_part_of_the_decoded_answer() -> None:
    encoder = encoder_of(TEMPLATES["opened by the prompt"])

    def decoded(text: str) -> str:
        return encoder.decode(encoder.tokenizer.encode(text, add_special_tokens=False))

    assert decoded("<think>\nhm\n</think>\n\nok") == "ok"
    assert decoded("hm</think>ok") == "ok"
    assert decoded("ok\n<think>hm</think>\nyes") == "ok\n\nyes"
    assert decoded("<think>hm") == ""
    assert decoded("\nok") == "\nok"


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("opened by the prompt", ("\n", "h", "m", "</think>", "o", "k", "<|end|>")),
        ("opened by the model", ("<|assistant|>", "<think>", "h", "</think>", "o", "k", "<|end|>")),
    ],
)
def test_a_model_can_close_its_thought(tmp_path: Path, kind: str, said: tuple[str, ...]) -> None:
    tokenizer = byte_tokenizer(TEMPLATES[kind], _MARKERS, plain=_PLAIN)
    pieces = [tokenizer.tokenize(s)[0] if s == "\n" else s for s in said]
    answer = sample(load_causal(bigram_dir(tmp_path, tokenizer, pieces)))
    assert (answer.text, answer.finish) == ("ok", "stop")
