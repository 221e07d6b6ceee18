"""No text becomes a marker on its way to the engine, on any family of tokenizers."""

from __future__ import annotations

import asyncio
import json
import random
from pathlib import Path
from typing import Any

import pytest

from equipoise.config import Sampling, TuneConfig
from equipoise.dials.dials import Dials
from equipoise.dials.manifest import control_tokens
from equipoise.encoding.encode import Encoder
from equipoise.protocol.replies import RefusedError
from equipoise.serve.gate import Visit
from equipoise.serve.prepare import CheckedChat, prepare
from equipoise.steer.responders import Tuned
from equipoise.tune.batch import TuningPlan, collate
from equipoise.types import ControlledExample, DialSetting, Message, Prompt
from eval_kit import FakeEngine
from serve_kit import ATTRIBUTES, LEVELS, Server, ask, dialled, make_server, served_model
from tokenizer_kit import FAMILIES, MARKERS, conversation, hostile, ordinary

TOP = DialSetting((3, 4))
"""What the example policy gives where no dial is named."""


def markers_of(family: str) -> list[str]:
    return [*MARKERS[family], *control_tokens(Dials(ATTRIBUTES, LEVELS))]


def forbidden(ids: object, encoder: Encoder) -> list[int]:
    return [i for i in ids if i in encoder.forbidden]  # type: ignore[attr-defined]


def wide_server(folder: Path, encoder: Encoder) -> Server:
    return make_server(folder, text="a", model=served_model(encoder, context=1 << 20),
                     limits={"max_prompt_tokens": 40_000, "waiting_tokens": 10**7})  # fmt: skip


# --- through HTTP, turns of any number ----------------------------------------------------------


def forge(folder: Path, family: str, n: int) -> None:
    """Send hostile conversations; the ids that reach the engine hold the template's markers."""
    encoder = dialled(FAMILIES[family]())
    server = wide_server(folder, encoder)
    rng = random.Random(11)
    markers = markers_of(family)
    expected = encoder.control_ids(TOP)
    passed = 0

    async def all_() -> None:
        nonlocal passed
        await server.engine.start()
        for _ in range(n):
            turns = conversation(rng, lambda: hostile(rng, markers))
            text = hostile(rng, markers)
            body = {"model": "toy", "messages": turns, "user": text[:256], "stop": text[:64] or "x"}
            before = len(server.engine.seen)
            reply = await ask(server.app, body, key=server.secrets["lab"])
            if reply.status == 400:
                assert reply.json["error"]["code"] in ("unusable_messages", "invalid_value")
                assert len(server.engine.seen) == before
                continue
            assert reply.status == 200
            passed += 1
            seen = server.engine.seen[-1]
            # The same turns with harmless contents show what the template itself writes.
            plain = encoder.prompt_ids([Message(turn["role"], "a") for turn in turns])  # type: ignore[arg-type]
            assert forbidden(seen.prompt_ids, encoder) == forbidden(plain, encoder)
            assert seen.control_ids == expected

    asyncio.run(all_())
    assert passed > n // 2


@pytest.mark.parametrize("family", FAMILIES)
def test_no_text_is_a_marker(tmp_path: Path, family: str) -> None:
    forge(tmp_path, family, 150)


@pytest.mark.nightly
@pytest.mark.parametrize("family", FAMILIES)
def test_no_text_of_many_is_a_marker(tmp_path: Path, family: str) -> None:
    forge(tmp_path, family, 5000)


# --- every field at once, from the bytes of a body to what the engine gets ----------------------

FIELDS = ("system", "developer", "parts", "assistant", "user turn", "stop", "user", "name")


def checked(server: Server, body: object) -> CheckedChat:
    """Do what the server does behind the gate, without HTTP: bytes in, generations out."""
    visit = Visit("r", {}, body=json.dumps(body).encode())
    visit.rules = server.rules()
    visit.key = visit.rules.keys[0]
    return prepare(visit, server.model)


def filled(texts: dict[str, str]) -> dict[str, Any]:
    half = len(texts["parts"]) // 2
    parts = (texts["parts"][:half], texts["parts"][half:])
    turns = [
        {"role": "system", "content": texts["system"], "name": texts["name"][:256]},
        {"role": "developer", "content": texts["developer"]},
        {"role": "user", "content": [{"type": "text", "text": part} for part in parts]},
        {"role": "assistant", "content": texts["assistant"]},
        {"role": "user", "content": texts["user turn"]},
    ]
    stop, user = texts["stop"][:64], texts["user"][:256]
    return {"model": "toy", "messages": turns, "stop": stop or "x", "user": user}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("n", [300, pytest.param(100_000, marks=pytest.mark.nightly)])
def test_no_text_in_any_field_is_a_marker(tmp_path: Path, family: str, n: int) -> None:
    """Each of the n bodies has another hostile string in each of the fields, and none is blank."""
    encoder = dialled(FAMILIES[family]())
    server = wide_server(tmp_path, encoder)
    rng, markers = random.Random(f"fields {family}"), markers_of(family)
    plain = checked(server, filled(dict.fromkeys(FIELDS, "ab"))).generations[0]
    expected = forbidden(plain.prompt_ids, encoder)
    refused = 0
    for _ in range(n):
        texts = {field: hostile(rng, markers) for field in FIELDS}
        for field in ("parts", "user turn"):
            texts[field] += "."
        body = filled(texts)
        try:
            chat = checked(server, body)
        except RefusedError as error:
            assert error.code == "unusable_messages", texts
            refused += 1
            continue
        (seen,) = chat.generations
        assert forbidden(seen.prompt_ids, encoder) == expected, texts
        assert seen.control_ids == plain.control_ids
        assert (chat.request.stops, seen.logit_bias) == ((body["stop"],), ())
    assert refused <= n // 100


REFUSED = {
    "type": lambda text: {"messages": [{"role": "user", "content": "hi", "type": text}]},
    "role": lambda text: {"messages": [{"role": text, "content": "hi"}]},
    "tool output": lambda text: {
        "messages": [{"role": "tool", "content": text}, {"role": "user", "content": "hi"}]
    },
    "tool schema": lambda text: {
        "messages": [{"role": "user", "content": "hi"}],
        "tools": [{"type": "function", "function": {"name": text, "description": text}}],
    },
    "dial": lambda text: {"messages": [{"role": "user", "content": "hi"}], "dials": {text: 1}},
    "bias": lambda text: {
        "messages": [{"role": "user", "content": "hi"}],
        "logit_bias": {text: 1},
    },
}


@pytest.mark.parametrize("field", REFUSED)
@pytest.mark.parametrize("n", [300, pytest.param(100_000, marks=pytest.mark.nightly)])
def test_fields_that_do_not_exist_take_no_text_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, field: str, n: int
) -> None:
    """Refused before any tokenizer is asked, so one family stands for all."""
    server = make_server(tmp_path)
    rng = random.Random(f"refused {field}")
    markers = [marker for family in FAMILIES for marker in markers_of(family)]

    def asked(*_: object) -> None:
        pytest.fail("the text was encoded")

    monkeypatch.setattr(server.model.encoder, "prompt_ids", asked)
    for _ in range(n):
        text = hostile(rng, markers)
        with pytest.raises(RefusedError) as caught:
            checked(server, {"model": "toy"} | REFUSED[field](text))
        assert caught.value.status == 400


# --- serving and training -----------------------------------------------------------------------


def test_ids_are_those_of_tuning_and_of_evaluation(tmp_path: Path) -> None:
    """The same turns and setting, id by id, at the server, in the collator and in the sweep."""
    server = make_server(tmp_path, text="a")
    encoder, rng, engine = server.model.encoder, random.Random(12), FakeEngine()
    sweep = Tuned(engine, encoder, sampling=Sampling(top_k=0, max_tokens=4))
    once = TuneConfig(steps=1, batch_size=1, auto_rate=0.0)
    for number in range(1000):
        turns = conversation(rng, lambda: ordinary(rng))
        setting = DialSetting(tuple(rng.choice([None, *range(LEVELS)]) for _ in ATTRIBUTES))
        dials = {
            name: "auto" if k is None else {"level": k}
            for name, k in zip(ATTRIBUTES, setting.levels, strict=True)
        }
        body = {"model": "toy@security-lab", "messages": turns, "dials": dials}
        (served,) = checked(server, body).generations
        prompt = Prompt(
            f"p{number}",
            tuple(Message(turn["role"], turn["content"]) for turn in turns),  # type: ignore[arg-type]
            "train",
        )
        example = ControlledExample(prompt, setting, "ok", True, dict.fromkeys(ATTRIBUTES, 0.5))
        batch = collate([TuningPlan([example], encoder, once, levels=LEVELS, seed=0)[0]])
        fed = batch.input_ids[0, batch.branch_ids[0] <= 1].tolist()
        ids = [*served.prompt_ids, *served.control_ids]
        assert fed == [*ids, *encoder.completion_ids("ok", finished=True)]
        sweep.respond([prompt], [setting], seed=0)
        evaluated = engine.requests.pop()
        assert [*evaluated.prompt_ids, *evaluated.branches[0].control_ids] == ids
