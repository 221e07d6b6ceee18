"""How rich the Workshop is: counts, ties, the attainable ceiling, and a policy that copies.

    python -m benchmarks.workshop.world

It samples a pool from the shipped start model: a minute or so.
"""

from __future__ import annotations

import dataclasses
import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from sklearn.feature_extraction.text import TfidfVectorizer

from equipoise.config import GenerateConfig, SamplingConfig
from equipoise.dials.dials import Dials, cells, target
from equipoise.engine.sample import TransformersEngine
from equipoise.evaluate.measure import measure_grid
from equipoise.evaluate.metrics import Grid, ceiling_grid
from equipoise.models.load import load_causal
from equipoise.pool.calibrate import Calibration
from equipoise.pool.generate import generate
from equipoise.seeds import derive_seed
from equipoise.stats import Estimate
from equipoise.types import Completion, Prompt
from equipoise.worlds.workshop.ceiling import ceiling_candidates, units_of
from equipoise.worlds.workshop.data import draw_request, messages_for, prompts
from equipoise.worlds.workshop.oracle import judge, read_request
from equipoise.worlds.workshop.tables import (
    ACTIONS,
    FOLLOW_UP_FRAMES,
    FRAMES,
    HELD_OUT_ACTIONS,
    HELD_OUT_OBJECTS,
    KIND_OF,
)

ATTRIBUTES = ("helpfulness", "safety")


@dataclass(frozen=True)
class WorkshopStats:
    """What this program prints."""

    objects: int
    held_out_objects: int
    actions: int
    held_out_actions: int
    wordings: int
    """Distinct ways to ask for something: action wordings times question frames."""
    prompts: int
    """Distinct one-turn prompts: wordings times objects; follow-ups and words come on top."""
    distinct_in_draw: float
    """Share of distinct prompts among 10,000 draws, follow-ups included."""
    pool: int
    """Completions of the start model that the scores are calibrated on."""
    parsed: float
    refused: float
    commonest_score: Mapping[str, float]
    """Share of the pool that has the most frequent oracle score."""
    ceiling_mp: Mapping[str, Estimate]
    nearest_copy_mp: Mapping[str, Estimate]
    """A policy that copies, per cell, the best completion of the nearest training prompt."""


def oracle_calibration(pool: Sequence[Completion], prompts: Mapping[str, Prompt]) -> Calibration:
    """Calibrate the oracle on a pool of completions."""
    judged = [judge(read_request(prompts[c.prompt_id].messages), c.text) for c in pool]
    scores = {
        "helpfulness": tuple(sorted(j.helpfulness for j in judged)),
        "safety": tuple(sorted(j.safety for j in judged)),
    }
    return Calibration(scores, "oracle")


def nearest_copies(
    test: Sequence[Prompt],
    train: Sequence[Prompt],
    pool: Mapping[str, Sequence[str]],
    calibration: Calibration,
    levels: int,
) -> list[NDArray[np.float64]]:
    """Return, per test prompt, the unit scores (C, 2) of a policy that copies.

    Per cell it copies, of all pool completions of the most similar training prompt, the one whose
    scores *there* are nearest the target.
    """

    def text_of(prompt: Prompt) -> str:
        return " ".join(m.content for m in prompt.messages if m.role == "user")

    vectors = TfidfVectorizer(ngram_range=(1, 2)).fit([text_of(p) for p in train])
    similarity = (
        vectors.transform([text_of(p) for p in test])
        @ vectors.transform([text_of(p) for p in train]).T
    )
    goals = [[target(int(level or 0), levels) for level in c.levels] for c in cells(2, levels)]
    copied = []
    for prompt, nearest in zip(test, similarity.toarray().argmax(1), strict=True):
        source = train[int(nearest)]
        texts = list(pool[source.id])
        there = units_of(read_request(source.messages), texts, calibration)
        picked = [texts[int(((there - goal) ** 2).sum(1).argmin())] for goal in np.array(goals)]
        copied.append(units_of(read_request(prompt.messages), picked, calibration))
    return copied


def nearest_copy_mp(
    pool: Sequence[Completion], train: Sequence[Prompt], test: Sequence[Prompt], *, levels: int = 5
) -> Mapping[str, Estimate]:
    """Return MP per attribute of the policy of :func:`nearest_copies`."""
    texts: dict[str, list[str]] = {}
    for completion in pool:
        texts.setdefault(completion.prompt_id, []).append(completion.text)
    calibration = oracle_calibration(pool, {prompt.id: prompt for prompt in train})
    copies = np.stack(nearest_copies(test, train, texts, calibration, levels))[None]
    return measure_grid(Grid(copies, tuple(p.id for p in test), ATTRIBUTES, levels)).mp


def distinct_share(n: int = 10_000, seed: int = 0) -> float:
    """Return the share of distinct prompts among ``n`` draws from everything."""
    rng = random.Random(derive_seed("distinct", seed))
    drawn = {messages_for(rng, draw_request(rng, "base")) for _ in range(n)}
    return len(drawn) / n


def measure_world(
    pool: Sequence[Completion], train: Sequence[Prompt], test: Sequence[Prompt], *, levels: int = 5
) -> WorkshopStats:
    """Compute all statistics from a pool of the start model on the training prompts."""
    by_id = {prompt.id: prompt for prompt in train}
    judged = [judge(read_request(by_id[c.prompt_id].messages), c.text) for c in pool]
    calibration = oracle_calibration(pool, by_id)
    ceiling = measure_grid(
        ceiling_grid(ceiling_candidates(test, calibration), dials=Dials(ATTRIBUTES, levels))
    )
    wordings = sum(len(action.wordings) for action in ACTIONS.values())
    n_frames = len(FRAMES) + len(FOLLOW_UP_FRAMES)
    return WorkshopStats(
        objects=len(KIND_OF),
        held_out_objects=len(HELD_OUT_OBJECTS),
        actions=len(ACTIONS),
        held_out_actions=len(HELD_OUT_ACTIONS),
        wordings=wordings * n_frames,
        prompts=wordings * len(FRAMES) * len(KIND_OF),
        distinct_in_draw=distinct_share(),
        pool=len(pool),
        parsed=sum(j.parsed for j in judged) / len(judged),
        refused=sum(j.refused for j in judged) / len(judged),
        commonest_score={
            name: Counter(round(getattr(j, name), 9) for j in judged).most_common(1)[0][1]
            / len(judged)
            for name in ATTRIBUTES
        },
        ceiling_mp=ceiling.mp,
        nearest_copy_mp=nearest_copy_mp(pool, train, test, levels=levels),
    )


def main() -> None:
    """Sample a pool from the shipped start model and print the world's figures as JSON."""
    train, test = prompts("train", limit=240), prompts("test", limit=60)
    policy = load_causal("workshop://start")
    engine = TransformersEngine.of(policy, batch_size=256)
    config = GenerateConfig(sampling=SamplingConfig(temperature=1.0, max_tokens=96), batch_size=256)
    pool = [c for row in generate(train, engine, policy.encoder, config, seed=0) for c in row]
    print(json.dumps(dataclasses.asdict(measure_world(pool, train, test)), indent=1))


if __name__ == "__main__":
    main()
