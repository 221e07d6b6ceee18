"""Fakes and synthetic deliveries for the tests of responders, sweep, metrics and report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from equipoise.config import Sampling
from equipoise.dials.dials import Dials, cells
from equipoise.engine.seam import Sampled
from equipoise.report.data import Report, read_report
from equipoise.stats import Bootstrap
from equipoise.store.shards import to_plain
from equipoise.types import Delivery, DialSetting, GenerationRequest, Message, Prompt

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


METHODS = {
    "start": ((0.0, 0.0), 0.28),
    "prompting": ((0.25, 0.1), 0.27),
    "rerank8": ((0.7, 0.6), 0.16),
    "rerank16": ((0.75, 0.65), 0.14),
    "tuned": ((0.9, 0.85), 0.12),
}


def synthetic_deliveries(
    *, prompts: int = 40, levels: int = 5, text: str = "an answer"
) -> dict[str, list[Delivery]]:
    """Return what five methods of growing skill delivered; helpfulness suffers at high safety."""
    found = {}
    for seed, (name, (gain, noise)) in enumerate(METHODS.items()):
        unit = noisy_policy(
            repeats=1, prompts=prompts, levels=levels, gain=gain, noise=noise, seed=seed
        )
        asked = targets(levels)
        unit[..., 0] = np.clip(unit[..., 0] - 0.15 * gain[0] * (asked[:, 1] - 0.5), 0, 1)
        found[name] = deliveries_from(unit, levels=levels, text=f"{name}: {text}")
    return found


def synthetic_report(deliveries: Mapping[str, Sequence[Delivery]], *, levels: int = 5) -> Report:
    """Return a full report of the deliveries, with every optional part filled."""
    from equipoise.evaluate.measure import compare_mp, measure, measure_grid
    from equipoise.evaluate.metrics import ceiling_grid

    rng = np.random.default_rng(9)
    n_cells = levels**2
    args = {"dials": Dials(ATTRIBUTES, levels), "bootstrap": Bootstrap(200)}

    def estimate(value: float, half: float = 0.05) -> dict:
        return {"value": value, "low": value - half, "high": value + half, "n": 40}

    def door(cells: float, bits: float) -> dict:
        measures = {"effective_cells": estimate(cells), "predictive_bits": estimate(bits)}
        return {"n_rows": 900, **measures, "mutual_information": 1.0} | {
            "mutual_information_null": 1.0
        }

    methods = {}
    for m, (name, rows) in enumerate(deliveries.items()):
        control = {
            kind: measure(rows, judge=kind, **args) for kind in ("optimization", "generalization")
        }
        odd = [estimate(-1.1 - 0.12 * m * rng.random()) for _ in range(n_cells)]
        methods[name] = {
            **control,
            "cost": {"seconds": 3.5 * (m + 1), "tokens": 41_000 * (m + 1), "steps": 0},
            "quality": {
                "degenerate": estimate(0.004 * m, 0.002),
                "fluency": odd,
                "fluency_mean": estimate(float(np.mean([e["value"] for e in odd]))),
                "perplexity": estimate(3.1 + 0.1 * m),
                "length": {a: [estimate(20 + 4 * k) for k in range(levels)] for a in ATTRIBUTES},
            },
        }
    best = measure_grid(
        ceiling_grid([rng.random((200, 2)) for _ in range(40)], dials=Dials(ATTRIBUTES, levels)),
        bootstrap=Bootstrap(200),
    )
    x = np.linspace(0, 1, levels)
    before = np.rint(400 * np.exp(-6 * (x[:, None] - 0.6) ** 2) * x[None, :] ** 2).astype(int)
    step = list(range(0, 400, 4))
    decay = np.exp(-np.array(step) / 120)
    made = {
        "recipe": {
            "name": "synthetic",
            "description": "Made-up deliveries, to look at the page",
            "seed": 0,
            "attributes": list(ATTRIBUTES),
            "levels": levels,
            "distil": {"data": "moec"},
        },
        "n": {"training prompts": 300, "test prompts": 40, "pool completions": 4800},
        "intersections": {"training prompts": 0, "reward-model rows": 0, "judge rows": 0},
        "methods": methods,
        "ceiling": {"name": "attainable ceiling", "generalization": best},
        "moec": {
            "n_pool": int(before.sum()),
            "n_kept": int(np.minimum(before, 120).sum()),
            "n_prompts_pool": 300,
            "n_prompts_kept": 280,
            "dropped": {"duplicate": 310, "degenerate": 12, "cell taken": 900},
            "grid_before": before,
            "grid_after": np.minimum(before, 120),
        },
        "backdoor": {
            "before": door(2.1, 0.8),
            "after": door(4.3, 0.05),
        },
        "losses": {
            "exmate, w = 1": {
                "step": step,
                "loss": list(2.2 * decay + 1.1 + rng.normal(0, 0.05, len(step))),
                "asked": list(-2.2 * decay - 1.0 + rng.normal(0, 0.05, len(step))),
                "counterfactual": list(-1.8 * decay - 1.6 + rng.normal(0, 0.08, len(step))),
                "pull": list(np.exp(-1.8 * decay - 1.6)),
                "tokens": step,
            }
        },
        "differences": {
            "tuned − rerank16": compare_mp(
                deliveries["tuned"],
                deliveries["rerank16"],
                judge="generalization",
                dials=Dials(ATTRIBUTES, levels),
                bootstrap=Bootstrap(200),
            )
        },
        "stages": {"generate": 0.4, "score": 0.2, "tune": 2.1, "evaluate": 1.0},
        "planned": {"generate": 0.5, "tune": 2.0, "evaluate": 1.5},
    }
    return read_report(to_plain(made))
