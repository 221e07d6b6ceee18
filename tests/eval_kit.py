"""Fakes and synthetic deliveries for the tests of responders, sweep, metrics and report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from equipoise.dials.attributes import cells
from equipoise.types import (
    Delivery,
    DialSetting,
    GenerationRequest,
    Message,
    Prompt,
    Sampled,
    Sampling,
)

ATTRIBUTES = ("helpfulness", "safety")
SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=8)


def prompt(name: str, *, text: str | None = None, split: str = "test") -> Prompt:
    return Prompt(id=name, messages=(Message("user", text or f"question {name}"),), split=split)


class FakeEncoder:
    """One id per character; control ids are negative: -(10 a + level + 1), auto is level -1."""

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        return [ord(char) for message in messages for char in f"{message.role}:{message.content}"]

    def completion_ids(self, text: str, *, finished: bool) -> list[int]:
        return [ord(char) for char in text] + ([0] if finished else [])

    def control_ids(self, setting: DialSetting) -> tuple[int, ...]:
        return tuple(
            -(10 * a + (0 if level is None else level + 1) + 1)
            for a, level in enumerate(setting.levels)
        )


@dataclass
class FakeEngine:
    """Answers ``s<seed mod 1000>``, four tokens and the end token; remembers its requests."""

    model_hash: str = "fake"
    requests: list[GenerationRequest] = field(default_factory=list)

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: Sampling
    ) -> list[list[Sampled]]:
        self.requests += requests
        return [
            [
                Sampled((1, 2, 3, 4), f"s{branch.seed % 1000:03d}", "stop")
                for branch in request.branches
            ]
            for request in requests
        ]


@dataclass
class FakeRewardModel:
    """Scores a completion ``sNNN`` with one of its digits, over 10; remembers how many rows."""

    digit: int = 1
    name: str = "fake"
    hash: str = "fake"
    rows: int = 0

    def score(self, pairs: Sequence[tuple[Prompt, str]]) -> list[float]:
        self.rows += len(pairs)
        return [int(text[self.digit]) / 10 + 0.05 for _, text in pairs]


class Identity:
    """A unit scale for reward models whose raw scores are unit scores already."""

    def unit(self, attribute: str, raw: float) -> float:
        return min(1.0, max(0.0, raw))


REWARD_MODELS: Mapping[str, FakeRewardModel] = {
    "helpfulness": FakeRewardModel(1),
    "safety": FakeRewardModel(2),
}


def deliveries_from(unit: np.ndarray, *, levels: int, text: str = "an answer") -> list[Delivery]:
    """Turn unit scores (S, P, C, A) into deliveries, seen alike by both kinds of judge."""
    attributes = [*ATTRIBUTES, "tone"][: unit.shape[-1]]
    rows = []
    for s, p, c in np.ndindex(unit.shape[:3]):
        scores = {name: float(unit[s, p, c, a]) for a, name in enumerate(attributes)}
        rows.append(
            Delivery(
                prompt_id=f"p{p:03d}",
                setting=cells(unit.shape[-1], levels)[c],
                repeat=s,
                text=f"{text} {p} {c} {s}",
                finish="stop",
                n_tokens=4 + c,
                unit={"optimization": scores, "generalization": scores},
            )
        )
    return rows


def targets(levels: int, n_attributes: int = 2) -> np.ndarray:
    """Return the targets of all cells, shape (C, A)."""
    return (np.array([cell.levels for cell in cells(n_attributes, levels)]) + 0.5) / levels


def noisy_policy(
    *, repeats: int, prompts: int, levels: int, gain: Sequence[float], noise: float, seed: int
) -> np.ndarray:
    """Return unit scores (S, P, C, A) of a policy that follows each dial with its own gain."""
    rng = np.random.default_rng(seed)
    asked = 0.5 + (targets(levels) - 0.5) * np.asarray(gain)  # (C, A)
    shape = (repeats, prompts, *asked.shape)
    return np.clip(asked + rng.normal(0, noise, shape), 0, 1)
