"""A tiny policy with dials, generations that differ in everything, and a step-by-step decoder."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cache
from typing import Any

from equipoise.config import Sampling
from equipoise.dials.dials import Dials
from equipoise.dials.tokens import install
from equipoise.encoding.encode import Encoder
from equipoise.engine.cache import PrefixCache
from equipoise.engine.decode import LiveRows
from equipoise.engine.draw import Row
from equipoise.engine.seam import Generation, Token
from equipoise.models.load import LoadedPolicy
from equipoise.seeds import derive_seed
from equipoise.types import DialSetting
from tuning_kit import ATTRIBUTES, prompt, tiny_policy

KINDS = [
    Sampling(temperature=1.0, top_p=1.0, top_k=50, max_tokens=12),
    Sampling(temperature=0.7, top_p=0.9, top_k=50, max_tokens=20),
    Sampling(temperature=1.5, top_p=0.8, top_k=0, max_tokens=5),
    Sampling(temperature=0.0, top_p=1.0, top_k=0, max_tokens=9),
]


@cache
def dialled(**config: Any) -> LoadedPolicy:
    """A tiny policy with dials, in float32, untied so that controls can be told apart."""
    policy = tiny_policy(tied=False, **config)
    manifest = install(policy.model, policy.tokenizer, dials=Dials(ATTRIBUTES, 5))
    encoder = Encoder(policy.tokenizer, manifest)
    return LoadedPolicy(policy.model, policy.tokenizer, encoder, manifest, policy.hash)


def generation(index: int, **changes: Any) -> Generation:
    encoder = dialled().encoder
    rng = random.Random(index)
    setting = DialSetting((rng.choice([None, 0, 4]), rng.randrange(5)))
    fields: dict[str, Any] = {
        "prompt_ids": tuple(encoder.prompt_ids(prompt(index % 7).messages)),
        "control_ids": encoder.control_ids(setting),
        "sampling": KINDS[index % len(KINDS)],
        "seed": derive_seed("batcher", index),
        "prefix_salt": f"key-{index % 3}",
        **changes,
    }
    return Generation(**fields)


def decode(
    live: LiveRows, arrivals: Sequence[tuple[int, Generation]], *, cancel: dict[int, int]
) -> dict[int, list[Token]]:
    """Decode generations that join at given steps; row i leaves after ``cancel[i]`` tokens."""
    found: dict[int, list[Token]] = {i: [] for i in range(len(arrivals))}
    owner: dict[int, int] = {}
    rows: dict[int, Row] = {}
    step = 0
    waiting = dict(enumerate(arrivals))
    while waiting or live.rows:
        due = [i for i, (when, _) in waiting.items() if when <= step]
        joined = live.join([waiting.pop(i)[1] for i in due])
        for i, row in zip(due, joined, strict=True):
            assert isinstance(row, Row)
            owner[id(row)], rows[i] = i, row
        for row, item in live.draw():
            assert isinstance(item, Token)
            found[owner[id(row)]].append(item)
        live.leave([rows[i] for i, n in cancel.items() if i in rows and len(found[i]) >= n])
        live.advance()
        step += 1
    return found


def fresh(*, prefix_tokens: int = 4096) -> LiveRows:
    policy = dialled()
    return LiveRows(policy.model, policy.encoder, PrefixCache(prefix_tokens))


@cache
def alone(index: int) -> list[Token]:
    return decode(fresh(prefix_tokens=0), [(0, generation(index))], cancel={})[0]
