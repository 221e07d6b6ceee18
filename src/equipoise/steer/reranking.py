"""N samples of the untouched model, keep the one nearest the target (docs/evaluate.md).

Departs from the textbook in one point: the N candidates are drawn afresh for every prompt *and*
cell. Candidates shared between cells would make the cells' deliveries depend on each other and the
method look steadier than a user, who asks once, would find it. Where that is too dear (a real model
on a CPU), every cell draws its N, without replacement, from a stock of a few times N.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from equipoise.config import Sampling
from equipoise.dials.dials import target
from equipoise.encoding.encode import Encoder
from equipoise.engine.seam import Engine, Sampled
from equipoise.rewards.scorer import Scorer
from equipoise.seeds import derive_seed
from equipoise.steer.responders import setting_key
from equipoise.types import Branch, Completion, DialSetting, GenerationRequest, Prompt

_Key = tuple[int, str, str]  # seed, prompt id, setting


@dataclass
class Candidates:
    """Samples and their unit scores, shared by rerankers of different N.

    The seed of a sample depends on its index only, so N = 8 uses the first 8 of N = 16's samples
    and both cost one sampling pass together. Each reranker still *counts* its own N in full.

    Args:
        engine: Samples from the untouched model.
        encoder: The untouched model's encoder.
        scorer: Of the training reward models.
        sampling: How to sample.
        n_max: Samples drawn at once: the largest N of all rerankers that share this object.
        stock: Samples per prompt, of which every setting draws its ``n_max``; ``None`` = fresh
            samples per setting.
    """

    engine: Engine
    encoder: Encoder
    scorer: Scorer
    sampling: Sampling
    n_max: int
    stock: int | None = None
    _kept: dict[_Key, tuple[list[Sampled], list[tuple[float, ...]]]] = field(
        default_factory=dict, init=False, repr=False
    )

    def get(
        self, prompts: Sequence[Prompt], settings: Sequence[DialSetting], *, seed: int
    ) -> list[list[tuple[list[Sampled], list[tuple[float, ...]]]]]:
        """Return per prompt and setting (P, C) the n_max samples and their unit scores (A)."""
        missing = [
            prompt
            for prompt in prompts
            if any((seed, prompt.id, setting_key(s)) not in self._kept for s in settings)
        ]
        if missing:
            self._sample(missing, settings, seed=seed)
        return [
            [self._kept[seed, prompt.id, setting_key(setting)] for setting in settings]
            for prompt in prompts
        ]

    def _sample(
        self, prompts: Sequence[Prompt], settings: Sequence[DialSetting], *, seed: int
    ) -> None:
        drawn = {prompt.id: self._places(prompt, settings, seed=seed) for prompt in prompts}
        requests = [
            GenerationRequest(
                prompt_ids=tuple(self.encoder.prompt_ids(prompt.messages)),
                branches=tuple(Branch((), s) for s in dict.fromkeys(itertools.chain(*seeds))),
            )
            for prompt, seeds in ((prompt, drawn[prompt.id].values()) for prompt in prompts)
        ]
        sampled = [
            dict(zip((branch.seed for branch in request.branches), items, strict=True))
            for request, items in zip(
                requests, self.engine.generate(requests, self.sampling), strict=True
            )
        ]
        pairs = [
            (prompt, item.judged)
            for prompt, items in zip(prompts, sampled, strict=True)
            for item in items.values()
        ]
        scored = iter(self.scorer.units(pairs))
        for prompt, items in zip(prompts, sampled, strict=True):
            units = {one: tuple(next(scored).values()) for one in items}
            for key, seeds in drawn[prompt.id].items():
                chosen = [items[one] for one in seeds]
                self._kept[seed, prompt.id, key] = (chosen, [units[one] for one in seeds])

    def _places(
        self, prompt: Prompt, settings: Sequence[DialSetting], *, seed: int
    ) -> dict[str, list[int]]:
        """Return per setting the seeds of its n_max samples."""
        keys = [setting_key(setting) for setting in settings]
        if self.stock is None:
            return {
                key: [derive_seed(seed, prompt.id, key, i) for i in range(self.n_max)]
                for key in keys
            }
        seeds = [derive_seed(seed, prompt.id, "stock", i) for i in range(self.stock)]
        return {
            key: random.Random(derive_seed(seed, prompt.id, key)).sample(seeds, self.n_max)
            for key in keys
        }


class Reranking:
    """Keeps, of N fresh samples per prompt and cell, the one nearest the target.

    Distance is Euclidean on unit scores over the attributes that are not on auto; ties go to the
    lower sample index. With every attribute on auto the first sample is kept. Tokens of the reward
    models are not counted: they are no tokens of the policy.

    Args:
        candidates: The samples, shared with rerankers of other N.
        n: N, at most ``candidates.n_max``.
        levels: L.
        name: Row name in the report; ``rerank<N>`` by default.
    """

    def __init__(
        self, candidates: Candidates, *, n: int, levels: int, name: str | None = None
    ) -> None:
        if not 1 <= n <= candidates.n_max:
            raise ValueError(f"n must be in 1..{candidates.n_max}, got {n}")
        self.name = name or f"rerank{n}"
        self.tokens_through_model = 0
        self._candidates, self._n, self._levels = candidates, n, levels

    def respond(
        self, prompts: Sequence[Prompt], settings: Sequence[DialSetting], *, seed: int
    ) -> list[list[Completion]]:
        """Return completions shaped (P, C), each the best of its own N samples."""
        model_hash = self._candidates.engine.model_hash
        completions = []
        for prompt, row in zip(
            prompts, self._candidates.get(prompts, settings, seed=seed), strict=True
        ):
            self.tokens_through_model += len(self._candidates.encoder.prompt_ids(prompt.messages))
            kept = []
            for setting, (sampled, units) in zip(settings, row, strict=True):
                self.tokens_through_model += sum(s.n_tokens for s in sampled[: self._n])
                best = nearest(units[: self._n], setting, self._levels)
                kept.append(
                    sampled[best].as_completion(
                        prompt.id, best, model_hash=model_hash, setting=setting
                    )
                )
            completions.append(kept)
        return completions


def nearest(units: Sequence[Sequence[float]], setting: DialSetting, levels: int) -> int:
    """Return the index of the unit scores (N, A) nearest the setting's target; ties to the first.

    Attributes on auto do not count.
    """
    return nearest_first(units, setting, levels)[0]


def nearest_first(units: Sequence[Sequence[float]], setting: DialSetting, levels: int) -> list[int]:
    """Return the indices of unit scores (N, A) by distance from the target; see :func:`nearest`."""
    active = [a for a, level in enumerate(setting.levels) if level is not None]
    goal = np.array([target(level, levels) for level in setting.levels if level is not None])
    distance = ((np.asarray(units, float)[:, active] - goal) ** 2).sum(axis=1)  # (N,)
    # Rounded: two distances that differ only by float noise are a tie.
    return [int(index) for index in np.argsort(distance.round(12), kind="stable")]
