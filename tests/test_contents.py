"""Templates that decide by what a turn says: followed, or the text is refused; never in silence."""

from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from bigram_kit import ASKED, TURNS, byte_tokenizer
from equipoise.encoding.encode import Encoder
from equipoise.errors import DataError
from equipoise.types import Message

# As in the templates of Qwen3, DeepSeek R1 and GLM.
_HISTORY = {
    "qwen": (
        "m.content.split('</think>')[-1].lstrip('\\n') if '</think>' in m.content else m.content"
    ),
    "deepseek": "m.content.split('</think>')[-1]",
    "glm": "m.content.split('</think>')[-1].strip()",
}
_ANSWERS = [
    "Four.",
    "<think>add</think>Four.",
    "<think>\nadd\n</think>\n\nFour.",
    "add</think>  \n Four. ",
    "<think>a</think>b</think>\n\n c",
    "<think>add",
    "\n\nFour.",
    "a </think",
]


def dropping(expression: str) -> PreTrainedTokenizerFast:
    template = (
        "{% for m in messages %}<|{{ m.role }}|>{% if m.role == 'assistant' %}{{ "
        + expression
        + " }}{% else %}{{ m.content }}{% endif %}<|end|>{% endfor %}"
    )
    return byte_tokenizer(template + ASKED, plain=("<think>", "</think>"))


def chat(*texts: str) -> list[Message]:
    roles = ("user", "assistant")
    return [Message(roles[i % 2], text) for i, text in enumerate(texts)]  # type: ignore[arg-type]


def rendered(tokenizer: PreTrainedTokenizerFast, turns: list[Message]) -> str:
    plain = [{"role": m.role, "content": m.content} for m in turns]
    return str(tokenizer.apply_chat_template(plain, add_generation_prompt=True, tokenize=False))


@pytest.mark.parametrize("kind", _HISTORY)
@pytest.mark.parametrize("answer", _ANSWERS)
def test_the_thoughts_of_earlier_answers_are_dropped_as_the_template_does(
    kind: str, answer: str
) -> None:
    tokenizer = dropping(_HISTORY[kind])
    encoder, turns = Encoder(tokenizer), chat("2+2?", answer, "3+3?", answer, "4+4?")
    ids = encoder.prompt_ids(turns)
    assert tokenizer.decode(ids) == rendered(tokenizer, turns)
    # What stays is text, whatever it spells; the dropped thought was none of the model's either.
    marks = set(tokenizer.convert_tokens_to_ids(["<think>", "</think>"]))
    assert not marks & set(ids)


_OBEYS = {
    "the last user turn": (
        "{% if '/no_think' in messages[-1]['content'] %}<think></think>{% endif %}"
    ),
    "any user turn": (
        "{% for m in messages %}{% if m.role == 'user' and m.content.endswith('/no_think') %}"
        "<think></think>{% endif %}{% endfor %}"
    ),
    "the system turn": (
        "{% if messages[0].role == 'system' and '/no_think' in messages[0].content %}"
        "<think></think>{% endif %}"
    ),
}


@pytest.mark.parametrize("where", _OBEYS)
def test_a_text_that_the_template_obeys_is_refused_and_others_are_not(where: str) -> None:
    tokenizer = byte_tokenizer(TURNS + ASKED + _OBEYS[where], plain=("<think>", "</think>"))
    encoder = Encoder(tokenizer)
    role = "system" if "system" in where else "user"
    for text in ("hi", "/no_thin", "no_think", "/NO_THINK"):
        turns = [Message(role, text), Message("user", "hm")]  # type: ignore[arg-type]
        assert tokenizer.decode(encoder.prompt_ids(turns)) == rendered(tokenizer, turns)
    obeyed = [Message("user", "hi /no_think")]
    if role == "system":
        obeyed.insert(0, Message("system", "brief /no_think"))
    with pytest.raises(DataError, match="acts upon '/no_think'"):
        encoder.prompt_ids(obeyed)


def test_a_history_that_is_rewritten_in_another_way_is_refused() -> None:
    kept = "m.content.split('</think>')[0] if '</think>' in m.content else m.content"
    encoder = Encoder(dropping(kept))
    assert encoder.prompt_ids(chat("2+2?", "Four.", "3+3?"))
    with pytest.raises(DataError, match="acts upon '</think>'"):
        encoder.prompt_ids(chat("2+2?", "add</think>Four.", "3+3?"))


def test_a_history_that_is_cut_at_one_place_only_is_refused() -> None:
    first = "m.content.split('</think>')[-1] if loop.first else m.content"
    tokenizer = byte_tokenizer(TURNS.replace("m['content']", first) + ASKED)
    encoder = Encoder(tokenizer)
    turns = chat("a", "b</think>", "c")
    assert tokenizer.decode(encoder.prompt_ids(turns)) == rendered(tokenizer, turns)
    with pytest.raises(DataError, match="acts upon '</think>'"):
        encoder.prompt_ids(chat("a</think>b"))


def test_templates_that_write_contents_down_refuse_nothing() -> None:
    tokenizer = byte_tokenizer()
    turns = chat("</think> /no_think", "<think>x</think> <tool_call>", '{"name": "f"} /think')
    assert tokenizer.decode(Encoder(tokenizer).prompt_ids(turns)) == rendered(tokenizer, turns)


def test_a_template_that_cuts_every_turn_is_followed() -> None:
    cut = TURNS.replace("m['content']", "m['content'].split('</think>')[-1]")
    tokenizer = byte_tokenizer(cut + ASKED, plain=("<think>", "</think>"))
    turns = chat("a</think>b", "c</think>d", "<think>e</think>f")
    assert tokenizer.decode(Encoder(tokenizer).prompt_ids(turns)) == rendered(tokenizer, turns)
