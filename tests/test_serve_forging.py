"""Through the HTTP door no text becomes a marker, on any family of tokenizers."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from equipoise.dials.manifest import control_tokens
from equipoise.types import DialSetting, Message
from serve_kit import ATTRIBUTES, LEVELS, ask, dialled, make_door, served_model
from tokenizer_kit import FAMILIES, MARKERS, conversation, hostile, ordinary


def forge(folder: Path, family: str, n: int) -> None:
    """Send hostile conversations; the ids that reach the engine hold the template's markers."""
    encoder = dialled(FAMILIES[family]())
    door = make_door(folder, text="a", model=served_model(encoder, context=1 << 20),
                     limits={"max_prompt_tokens": 40_000, "waiting_tokens": 10**7})  # fmt: skip
    rng = random.Random(11)
    markers = [*MARKERS[family], *control_tokens(ATTRIBUTES, LEVELS)]
    expected = encoder.control_ids(DialSetting((3, 4)))
    passed = 0

    async def all_() -> None:
        nonlocal passed
        await door.engine.start()
        for _ in range(n):
            turns = conversation(rng, lambda: hostile(rng, markers))
            text = hostile(rng, markers)
            body = {"model": "toy", "messages": turns, "user": text[:256], "stop": text[:64] or "x"}
            before = len(door.engine.seen)
            reply = await ask(door.app, body, key=door.secrets["lab"])
            if reply.status == 400:
                assert reply.json["error"]["code"] in ("unusable_messages", "invalid_value")
                assert len(door.engine.seen) == before
                continue
            assert reply.status == 200
            passed += 1
            seen = door.engine.seen[-1]
            # The same turns with harmless contents show what the template itself writes.
            plain = encoder.prompt_ids([Message(turn["role"], "a") for turn in turns])  # type: ignore[arg-type]
            assert [i for i in seen.prompt_ids if i in encoder.forbidden] == [
                i for i in plain if i in encoder.forbidden
            ]
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


def test_ids_are_those_of_training(tmp_path: Path) -> None:
    """What tuning and evaluation would feed for the same turns and setting, id by id."""
    door = make_door(tmp_path, text="a")
    encoder, rng = door.model.encoder, random.Random(12)

    async def all_() -> None:
        await door.engine.start()
        for _ in range(200):
            turns = conversation(rng, lambda: ordinary(rng))
            levels = (rng.randrange(LEVELS), rng.randrange(LEVELS))
            dials = {name: {"level": k} for name, k in zip(ATTRIBUTES, levels, strict=True)}
            body = {"model": "toy@security-lab", "messages": turns, "dials": dials}
            assert (await ask(door.app, body, key=door.secrets["lab"])).status == 200
            seen = door.engine.seen[-1]
            messages = [Message(turn["role"], turn["content"]) for turn in turns]  # type: ignore[arg-type]
            assert list(seen.prompt_ids) == encoder.prompt_ids(messages)
            assert seen.control_ids == encoder.control_ids(DialSetting(levels))

    asyncio.run(all_())
