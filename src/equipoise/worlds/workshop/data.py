"""Seeded Workshop data: prompts, base text, aligned text and noisy preference pairs.

Test prompts use objects and actions that no tuning prompt and no preference pair has: most of them
a held-out object, some a held-out action, some a pair of the two that is kept back. All of these
occur in base and aligned text, as a user's model also knows the words of a new prompt.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator
from typing import Literal

from equipoise.errors import DataError
from equipoise.seeds import derive_seed
from equipoise.types import Message, PreferencePair, Prompt
from equipoise.worlds.workshop.grammar import (
    Intensities,
    Request,
    aligned_intensities,
    base_intensities,
    plan,
    write,
)
from equipoise.worlds.workshop.oracle import judge
from equipoise.worlds.workshop.tables import (
    ACTIONS,
    FOLLOW_UP_FRAMES,
    FRAMES,
    HELD_OUT_ACTIONS,
    HELD_OUT_OBJECTS,
    KIND_OF,
)

Attribute = Literal["helpfulness", "safety"]
REFUSAL_SEEMS_SAFER = 1.0
SHARPNESS = 4.0
"""Slope of the Bradley-Terry noise: P(prefer a to b) = sigmoid(SHARPNESS * (score_a - score_b))."""
_FOLLOW_UP_RATE = 0.15


def is_kept_back(request: Request) -> bool:
    """Whether a seen object and a seen action form a pair that only test prompts have."""
    digest = hashlib.sha256(f"{request.object}|{request.action}".encode()).digest()
    return digest[0] < 32  # one in eight


def is_training(request: Request) -> bool:
    """Whether a request may occur in training prompts and preference pairs."""
    return (
        request.object not in HELD_OUT_OBJECTS
        and request.action not in HELD_OUT_ACTIONS
        and not is_kept_back(request)
    )


def draw_request(rng: random.Random, split: Literal["base", "train", "test"]) -> Request:
    """Draw a request of a split; ``base`` draws from everything."""
    objects, actions = list(KIND_OF), list(ACTIONS)
    if split == "test":
        novelty = rng.choices(("object", "action", "pair"), weights=(7, 1, 2))[0]
        if novelty == "object":
            objects = sorted(HELD_OUT_OBJECTS)
        elif novelty == "action":
            actions = list(HELD_OUT_ACTIONS)
    while True:
        action = rng.choice(actions)
        request = Request(rng.choice(objects), action, rng.randrange(len(ACTIONS[action].wordings)))
        if split == "base" or is_training(request) == (split == "train"):
            return request


def messages_for(rng: random.Random, request: Request, words: str = "") -> tuple[Message, ...]:
    """Put a request into chat messages; some are follow-ups that say "it" for the object."""
    wording = ACTIONS[request.action].wordings[request.wording]
    tail = f" {words}" if words else ""
    if rng.random() >= _FOLLOW_UP_RATE:
        asked = rng.choice(FRAMES).format(vp=wording.format(o=request.object))
        return (Message("user", asked + tail),)
    earlier_action = rng.choice([a for a in ACTIONS if a not in HELD_OUT_ACTIONS])
    earlier = Request(request.object, earlier_action, 0)
    first = rng.choice(FRAMES).format(
        vp=ACTIONS[earlier_action].wordings[0].format(o=request.object)
    )
    answer = write(rng, earlier, plan(rng, 0.6, 0.4))
    asked = rng.choice(FOLLOW_UP_FRAMES).format(vp=wording.replace("the {o}", "it"))
    return (Message("user", first), Message("assistant", answer), Message("user", asked + tail))


def prompts(split: str, *, limit: int | None = None, seed: int = 0) -> list[Prompt]:
    """Return ``limit`` (default 240) distinct prompts of ``train`` or ``test``.

    Raises:
        DataError: If the split is neither.
    """
    if split not in ("train", "test"):
        raise DataError(
            f"The Workshop has no split {split!r}",
            why="it has train and test prompts only",
            fix="use workshop://train or workshop://test",
        )
    part: Literal["train", "test"] = "train" if split == "train" else "test"
    rng = random.Random(derive_seed("workshop-prompts", split, seed))
    found: dict[tuple[Message, ...], Prompt] = {}
    while len(found) < (limit or 240):
        request = draw_request(rng, part)
        messages = messages_for(rng, request)
        label = "unsafe" if ACTIONS[request.action].hazardous else "safe"
        digest = hashlib.sha256(repr(messages).encode()).hexdigest()[:12]
        found.setdefault(
            messages, Prompt(f"workshop-{split}-{digest}", messages, part, "workshop", label)
        )
    return list(found.values())


def dialogues(kind: Literal["base", "aligned"], *, seed: int) -> Iterator[tuple[Prompt, str]]:
    """Yield (prompt, completion) text without end: base text, or text that over-refuses."""
    rng = random.Random(derive_seed("workshop-dialogues", kind, seed))
    while True:
        request = draw_request(rng, "base")
        wanted = base_intensities(rng) if kind == "base" else aligned_intensities(rng, request)
        messages = messages_for(rng, request, wanted.words)
        yield Prompt("", messages, "train", "workshop"), _answer(rng, request, wanted)


def pairs(attribute: str, *, limit: int, seed: int = 0) -> list[PreferencePair]:
    """Return noisy preference pairs on training requests, labelled by Bradley-Terry choice.

    Args:
        attribute: ``helpfulness``, ``safety``, or ``caution``: safety as seen by those who take
            a refusal for the safest answer, the preference that makes a model over-refuse.
        limit: Number of pairs.
        seed: Of the draws.
    """
    rng = random.Random(derive_seed("workshop-pairs", attribute, seed))
    found: list[PreferencePair] = []
    while len(found) < limit:
        request = draw_request(rng, "train")
        prompt = Prompt(
            f"workshop-pair-{attribute}-{seed}-{len(found)}",
            messages_for(rng, request),
            "train",
            "workshop",
        )
        one, other = (_answer(rng, request, _pair_intensities(rng, request)) for _ in range(2))
        gap = _score(request, one, attribute) - _score(request, other, attribute)
        if rng.random() >= 1.0 / (1.0 + math.exp(-SHARPNESS * gap)):
            one, other = other, one
        if one != other:
            found.append(PreferencePair(prompt, chosen=one, rejected=other))
    return found


def _pair_intensities(rng: random.Random, request: Request) -> Intensities:
    # Half of the answers look like the policy's own, so that the reward model is good there.
    return base_intensities(rng) if rng.random() < 0.5 else aligned_intensities(rng, request)


def _answer(rng: random.Random, request: Request, wanted: Intensities) -> str:
    return write(rng, request, plan(rng, wanted.care, wanted.help))


def _score(request: Request, text: str, attribute: str) -> float:
    judged = judge(request, text)
    if attribute == "caution":
        return judged.safety + REFUSAL_SEEMS_SAFER * judged.refused
    return float(getattr(judged, attribute))
