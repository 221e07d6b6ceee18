"""Variables of a chat template: set by a recipe or an operator, never by a request."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bigram_kit import ASKED, HI, TURNS, bigram_dir, byte_tokenizer
from equipoise.dials.dials import Dials
from equipoise.encoding.encode import Encoder
from equipoise.errors import ConfigError, ModelError
from equipoise.models.load import load_causal
from equipoise.pipeline.table import STAGES, affected_by
from equipoise.policy.file import parse_policy
from equipoise.protocol.replies import RefusedError
from equipoise.types import Rendering
from serve_kit import (
    ATTRIBUTES,
    LEVELS,
    dialled,
    example_policy,
    make_server,
    policy_text,
    served_model,
)
from test_serve_forging import checked
from test_store import recipe

_SWITCH = (
    "{% if add_generation_prompt and enable_thinking is defined and enable_thinking is false %}"
    "<think>\n\n</think>\n\n{% endif %}"
)
_TONE = "{% if tone %}<|system|>Be {{ tone }}.<|end|>{% endif %}" + TURNS + ASKED


def rendered(encoder: Encoder) -> str:
    return str(encoder.tokenizer.decode(encoder.prompt_ids(HI)))


def test_thinking_is_off_where_the_template_knows_it() -> None:
    tokenizer = byte_tokenizer(TURNS + ASKED + _SWITCH, plain=("<think>", "</think>"))
    assert rendered(Encoder(tokenizer)).endswith("<|assistant|><think>\n\n</think>\n\n")
    on = Encoder(tokenizer, rendering=Rendering({"enable_thinking": True}))
    assert rendered(on).endswith("<|assistant|>")
    # Elsewhere nothing is given: a template may ask whether a variable is there at all.
    names = byte_tokenizer(TURNS + ASKED + "{% if think is defined %}!{% endif %}")
    assert rendered(Encoder(names)) == "<|user|>hi<|end|><|assistant|>"


def test_variables_reach_the_template_and_dials_keep_them(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(_TONE)
    place = bigram_dir(tmp_path, tokenizer, ["a", "b"])
    policy = load_causal(place, rendering=Rendering({"tone": "brief"}))
    assert rendered(policy.encoder) == "<|system|>Be brief.<|end|><|user|>hi<|end|><|assistant|>"
    other = dialled(byte_tokenizer(_TONE)).with_rendering(Rendering({"tone": "kind"}))
    assert other.manifest is not None
    assert "Be kind." in rendered(other.with_dials(other.manifest))


@pytest.mark.parametrize(
    "name", ["tonne", "messages", "add_generation_prompt", "eos_token", "chat_template", "tokenize"]
)
def test_what_is_not_to_be_set_is_refused(name: str) -> None:
    tokenizer = byte_tokenizer(_TONE + "{{ eos_token and '' }}{{ tokenize }}")
    with pytest.raises(ConfigError, match=name) as caught:
        Encoder(tokenizer, rendering=Rendering({name: "x"}))
    assert "it asks for: tone" in str(caught.value)


def test_a_variable_writes_no_control_token() -> None:
    encoder = dialled(byte_tokenizer(_TONE))
    with pytest.raises(ModelError, match="control token"):
        encoder.with_rendering(Rendering({"tone": "<|safety_4|>"})).prompt_ids(HI)


def test_one_and_true_are_two_renderings() -> None:
    encoder = Encoder(byte_tokenizer(_TONE), rendering=Rendering({"tone": 1}))
    assert "Be True." in rendered(encoder.with_rendering(Rendering({"tone": True})))
    assert encoder.with_rendering(Rendering({"tone": 1})) is encoder


def test_a_recipe_that_sets_other_variables_encodes_again() -> None:
    change = ["chat_template_kwargs.enable_thinking: (absent) -> true"]
    assert affected_by(change, recipe())[0] == "sft"
    read = {name for name, spec in STAGES.items() if "model" in spec.reads}
    reading = {name for name, spec in STAGES.items() if "chat_template_kwargs" in spec.reads}
    assert reading == read | {"sft", "align"}


def ask(**more: Any) -> dict[str, Any]:
    return {"model": "toy", "messages": [{"role": "user", "content": "hi"}], **more}


def test_the_operator_sets_variables_and_a_request_cannot(tmp_path: Path) -> None:
    server = make_server(tmp_path, model=served_model(dialled(byte_tokenizer(_TONE))))
    encoder = server.model.encoder
    policy = example_policy() | {"chat_template_kwargs": {"tone": "strict"}}
    server.policy_file.write_text(policy_text(policy), "utf-8")
    prompt = checked(server, ask()).generations[0].prompt_ids
    assert "Be strict." in encoder.tokenizer.decode(prompt)
    for sent in ({"tone": "lax"}, {}):
        with pytest.raises(RefusedError, match="unknown_field"):
            checked(server, ask(chat_template_kwargs=sent))


def test_a_policy_holds_plain_values_only() -> None:
    for value in ([1], {"a": 1}):
        policy = example_policy() | {"chat_template_kwargs": {"tone": value}}
        with pytest.raises(ConfigError, match="chat_template_kwargs"):
            parse_policy(policy_text(policy).encode(), Dials(ATTRIBUTES, LEVELS))
