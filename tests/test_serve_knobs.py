"""No knob of a request moves a dial, and the engine never gets an id that it should not get."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from batcher_kit import dialled, fresh, generation
from equipoise.config import Sampling
from equipoise.engine.seam import Token
from equipoise.types import DialSetting
from serve_kit import Reply, Server, ask, chat_body, make_server
from test_serve_compat import NEUTRAL, OPENAI
from test_serve_gate import UNKNOWN

# --- what a request may ask for -----------------------------------------------------------------

Move = Callable[[dict[str, Any], random.Random, Server], set[int]]
"""Changes a body, and returns the statuses that it may get."""


def harmless(body: dict[str, Any], rng: random.Random, server: Server) -> set[int]:
    """Knobs that exist, with values that they may have."""
    usable = [i for i in range(server.model.vocab_size) if i not in server.model.encoder.forbidden]
    knobs: dict[str, Any] = {
        "temperature": rng.choice([0, 0.3, 2]),
        "top_p": rng.choice([0.1, 1]),
        "seed": rng.randrange(2**60),
        "n": rng.randint(1, 4),
        "max_tokens": rng.randint(1, 20),
        "user": "<|safety_0|>",
        "stop": "<|safety_0|>",
        "stream": False,
        "presence_penalty": 0,
        "tool_choice": "none",
        "safety_identifier": "<|safety_0|>",
        "logit_bias": {str(i): rng.choice([-100, 100]) for i in rng.sample(usable, 5)},
    }
    body |= {name: knobs[name] for name in rng.sample(list(knobs), rng.randint(0, 5))}
    return {200}


def unknown(body: dict[str, Any], rng: random.Random, server: Server) -> set[int]:
    """Token ids, templates, adapters, other engines' knobs: most values would do something."""
    ids = list(server.model.encoder.manifest.all_ids)  # type: ignore[union-attr]
    template = "{{ '<|safety_0|>' }}{{ messages[0].content }}"
    values: list[Any] = [
        ids, ids[:1], [[i] for i in ids], ids[0], -1, 10**9, 0, None, True, "", "auto", template,
        {"template": template}, "security-lab", {"name": "lora", "path": "/etc"}, {"safety": 0},
        "<|safety_0|>", [0.0] * 32, [{"token_ids": ids}],
    ]  # fmt: skip
    name, value = rng.choice(UNKNOWN), rng.choice(values)
    body[name] = value
    neutral = [json.dumps(one) for one in (None, *NEUTRAL.get(name, ()))]  # 0 is not False
    return {200} if name in OPENAI and json.dumps(value) in neutral else {400}


def bad_bias(body: dict[str, Any], rng: random.Random, server: Server) -> set[int]:
    """Ids of markers, and ids that are none."""
    vocabulary = server.model.vocab_size
    bad = [*server.model.encoder.forbidden, vocabulary, vocabulary + 7, 2**31, 2**32, 9_999_999_999]
    name = str(rng.choice([*bad, -1, -vocabulary, "1e1", "0x3", " 3", "03", "٣", "<|safety_0|>"]))
    body["logit_bias"] = {"3": 1, name: rng.choice([-100, 0, 100])}
    return {400}


def other_model(body: dict[str, Any], rng: random.Random, server: Server) -> set[int]:
    """Aliases of other scenarios, adapters and paths."""
    body["model"] = rng.choice(
        ["toy@security-lab", "toy@general", "toy@kids@general", "toy@kids ", "Toy", "toy:lora",
         "toy+lora", "lora", "./toy", "toy@kids/../general", "toy@KIDS", "<|safety_0|>", "@kids"]
    )  # fmt: skip
    return {404}


def ids_as_text(body: dict[str, Any], rng: random.Random, server: Server) -> set[int]:
    """Token ids where a text belongs."""
    ids = list(server.model.encoder.manifest.all_ids)  # type: ignore[union-attr]
    where = rng.choice(["content", "stop", "part", "turn"])
    if where == "stop":
        body["stop"] = rng.choice([ids, [ids], ids[0]])
    else:
        content = [{"type": "token_ids", "token_ids": ids}] if where == "part" else ids
        turn: Any = ids if where == "turn" else {"role": "user", "content": content}
        body["messages"] = [turn]
    return {400}


def said_of(reply: Reply, line: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
    """Return what body, headers and log line say was asked for and applied."""
    body, dials, headers = reply.json, reply.json["dials"], reply.headers
    return {
        "body": (dials["requested"], dials["effective"], dials["scenario"], body["policy_hash"],
                 body["model_hash"]),
        "headers": (json.loads(headers["x-dial-requested"]),
                    json.loads(headers["x-dial-effective"]), headers["x-dial-scenario"],
                    headers["x-dial-policy"], headers["x-dial-model"]),
        "log": (line["requested"], line["effective"], line["scenario"], line["policy"],
                line["model"]),
    }  # fmt: skip


MOVES: tuple[Move, ...] = (unknown, bad_bias, other_model, ids_as_text)


@pytest.mark.parametrize("n", [300, pytest.param(10_000, marks=pytest.mark.nightly)])
def test_no_knob_moves_a_dial_or_hands_over_an_id(
    tmp_path: Path, n: int, caplog: pytest.LogCaptureFixture
) -> None:
    """The child's key: safety at the top, the ids of the plain prompt, only biases that may be.

    Body, headers and log line say so.
    """
    caplog.set_level("INFO", "equipoise.serve")
    server = make_server(tmp_path, text="a")
    encoder, rng = server.model.encoder, random.Random("knobs")
    statuses: Counter[int] = Counter()

    async def all_() -> None:
        await server.engine.start()
        key = server.secrets["kid"]
        await ask(server.app, chat_body(), key=key)
        plain = server.engine.seen[-1].prompt_ids
        for _ in range(n):
            body = chat_body() | {"model": rng.choice(["toy", "toy@kids"])}
            allowed = harmless(body, rng, server)
            if rng.random() < 0.6:
                allowed = set()
                for move in rng.sample(MOVES, rng.randint(1, 2)):
                    allowed |= move(body, rng, server)
            level = rng.choice([None, 0, 2, 4])
            if level is not None:
                body["dials"] = {"helpfulness": {"level": level}, "safety": rng.choice([0, 1])}
            before = len(server.engine.seen)
            caplog.clear()
            reply = await ask(server.app, body, key=key)
            statuses[reply.status] += 1
            assert reply.status in allowed, (body, reply.body)
            seen = server.engine.seen[before:]
            if reply.status != 200:
                assert not seen
                assert reply.json["error"]["message"]
                continue
            wanted = encoder.control_ids(DialSetting((2 if level is None else level, 4)))
            assert len(seen) == body.get("n", 1)
            for one in seen:
                assert (one.prompt_ids, one.control_ids) == (plain, wanted)
                for token_id, _ in one.logit_bias:
                    assert 0 <= token_id < server.model.vocab_size
                    assert token_id not in encoder.forbidden
            effective = reply.json["dials"]["effective"]
            assert effective["safety"] == {"level": 4, "value": 1.0}
            said = said_of(reply, json.loads(caplog.messages[-1]))
            rules, model = server.rules().policy_hash, server.model.hash
            asked = body.get("dials", {})
            assert said["body"] == said["headers"] == (asked, effective, "kids", rules, model)
            assert said["log"] == (asked, effective, "kids", rules[:12], model[:12])

    asyncio.run(all_())
    assert statuses[200] > n // 4 and statuses[400] > n // 4 and statuses[404] > n // 20


# --- what the model may say ---------------------------------------------------------------------


@pytest.mark.parametrize("n", [20_000, pytest.param(1_000_000, marks=pytest.mark.nightly)])
def test_no_sampled_token_is_a_control(n: int) -> None:
    """A model that wants nothing but markers, at temperature 2, over the whole vocabulary."""
    policy, rows = dialled(), 250
    encoder = policy.encoder
    assert encoder.manifest is not None
    barred = set(encoder.masked_ids)
    assert set(encoder.manifest.all_ids) <= barred
    wanted = torch.tensor(sorted(barred))
    hot = Sampling(temperature=2.0, top_p=1.0, top_k=0, max_tokens=100)
    ends = tuple((i, -100.0) for i in encoder.eos_ids)

    def favour(module: Any, args: Any, output: Any) -> None:
        output.logits[..., wanted] += 50.0

    drawn: Counter[int] = Counter()
    handle = policy.model.register_forward_hook(favour)
    try:
        for start in range(0, n // hot.max_tokens, rows):
            live = fresh(prefix_tokens=0)
            asked = range(start, min(start + rows, n // hot.max_tokens))
            live.join([generation(i, sampling=hot, logit_bias=ends) for i in asked])
            while live.rows:
                for _, item in live.draw():
                    assert isinstance(item, Token)
                    drawn[item.id] += 1
                live.advance()
    finally:
        handle.remove()
    assert drawn.total() == n
    assert not barred & set(drawn)
    # All the rest was drawn, so that what is missing is missing for this reason.
    assert set(drawn) == set(range(len(encoder.tokenizer))) - barred - encoder.eos_ids
