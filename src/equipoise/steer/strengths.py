"""Steering the untouched model: how hard to push for a level, and the responder that pushes.

A monotone map from level to strength is fitted on dev prompts. While the model samples, directions
are added to its residual stream. The last token of the prompt is fed again for every branch, so
that the first sampled token is steered too; the rest of the prompt is shared. Cheap, strong, and
quick to babble: never without the fluency of what comes out (docs/steer.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from equipoise.config import Sampling
from equipoise.dials.dials import target
from equipoise.encoding.encode import Encoder
from equipoise.engine.seam import Engine
from equipoise.models.likelihood import read_completions
from equipoise.rewards.scorer import Scorer
from equipoise.seeds import derive_seed
from equipoise.steer.responders import BranchSampler, steered_request
from equipoise.types import DialSetting, GenerationRequest, Prompt

if TYPE_CHECKING:
    from equipoise.encoding.encode import Encoder
    from equipoise.engine.sample import TransformersEngine


@dataclass(frozen=True)
class Tried:
    """One strength as it came out on dev prompts, the other attributes left alone."""

    strength: float
    unit: float
    """Mean unit score of the attribute, in [0, 1]."""
    fluency: float
    """Mean log-likelihood per token of the outputs under the untouched model."""


@dataclass(frozen=True)
class Strengths:
    """Strength per attribute and level, in units of the direction's own length."""

    by_level: Mapping[str, tuple[float, ...]]
    """Attribute to L strengths, never falling with the level."""

    def of(self, setting: DialSetting) -> tuple[float, ...]:
        """Return one strength per attribute; 0 on auto."""
        return tuple(
            0.0 if level is None else levels[level]
            for level, levels in zip(setting.levels, self.by_level.values(), strict=True)
        )


def try_strength(
    prompts: Sequence[Prompt],
    engine: TransformersEngine,
    scorer: Scorer,
    *,
    attribute: str,
    strength: float,
    sampling: Sampling,
    seed: int,
) -> Tried:
    """Sample one completion per dev prompt with one direction at one strength, and look at it.

    Args:
        prompts: Dev prompts.
        engine: Samples from the untouched model, with directions in the reward models' order.
        scorer: Of the training reward models.
        attribute: The one that is pushed; all others have strength 0.
        strength: In units of the direction's length.
        sampling: How to sample.
        seed: The same seed for all strengths: they differ by the push alone.
    """
    strengths = tuple(strength if name == attribute else 0.0 for name in scorer.reward_models)
    encoder = engine.encoder
    encoded = [encoder.prompt_ids(prompt.messages) for prompt in prompts]
    requests = [
        steered_request(ids, [strengths], [derive_seed(seed, "strength", prompt.id)])
        for ids, prompt in zip(encoded, prompts, strict=True)
    ]
    sampled = [items[0] for items in engine.generate(requests, sampling)]
    texts = [item.judged for item in sampled]
    pairs = list(zip(prompts, texts, strict=True))
    units = scorer.only(attribute).units(pairs)
    means = [
        read_completions(
            engine.model, ids, [encoder.completion_ids(text, finished=item.finish == "stop")]
        )[0].mean
        for ids, text, item in zip(encoded, texts, sampled, strict=True)
    ]
    return Tried(
        strength,
        float(np.mean([unit[attribute] for unit in units])),
        float(np.nanmean(means)) if np.isfinite(means).any() else float("nan"),
    )


def strengths_for_levels(
    tried: Sequence[Tried], levels: int, *, max_fluency_drop: float | None
) -> tuple[float, ...]:
    """Return the strength that delivers each level's target, by the monotone map of what was tried.

    The mean unit score is made to rise with the strength (isotonic regression: neighbours that fall
    are averaged) and read backwards, straight between the strengths that were tried. Where several
    give the same, the mildest counts. A target out of reach gets the last strength in reach.

    Args:
        tried: Different strengths, 0 among them, in any order.
        levels: L.
        max_fluency_drop: Leave out strengths whose fluency lies more than this below that of
            strength 0, in nats per token; and all that are further out. ``None``: leave in all.

    Returns:
        L strengths, not falling.
    """
    ordered = sorted(tried, key=lambda one: one.strength)
    kept = ordered if max_fluency_drop is None else _fluent(ordered, max_fluency_drop)
    rising = _isotonic([one.unit for one in kept])
    mildest: dict[float, float] = {}
    for unit, one in zip(rising, kept, strict=True):
        if unit not in mildest or abs(one.strength) < abs(mildest[unit]):
            mildest[unit] = one.strength
    goals = [target(level, levels) for level in range(levels)]
    found = np.interp(goals, list(mildest), list(mildest.values()))
    return tuple(float(value) for value in found)


def _fluent(ordered: Sequence[Tried], max_drop: float) -> list[Tried]:
    """Return the run of strengths around 0 that do not babble."""
    own = next(one.fluency for one in ordered if one.strength == 0)

    def run(side: Sequence[Tried]) -> list[Tried]:
        found = []
        for one in side:
            if not one.fluency >= own - max_drop:
                break
            found.append(one)
        return found

    down = run([one for one in reversed(ordered) if one.strength <= 0])
    up = run([one for one in ordered if one.strength > 0])
    return [*reversed(down), *up]


def _isotonic(values: Sequence[float]) -> list[float]:
    """Return the nearest not falling sequence (least squares): pool adjacent violators."""
    blocks: list[tuple[float, int]] = []  # mean, size
    for value in values:
        mean, size = value, 1
        while blocks and blocks[-1][0] > mean:
            before, count = blocks.pop()
            mean, size = (before * count + mean * size) / (count + size), count + size
        blocks.append((mean, size))
    return [mean for mean, size in blocks for _ in range(size)]


class Steering(BranchSampler):
    """Adds each direction with the strength that the setting's level stands for.

    Args:
        engine: Samples from the untouched model, with directions in the attributes' order.
        encoder: The untouched model's encoder.
        sampling: How to sample.
        strengths: Level to strength, fitted on dev prompts; auto is strength 0.
        name: Row name in the report; by default the method's.
    """

    name = "steering"

    def __init__(
        self,
        engine: Engine,
        encoder: Encoder,
        *,
        sampling: Sampling,
        strengths: Strengths,
        name: str | None = None,
    ) -> None:
        super().__init__(engine, encoder, sampling=sampling, name=name)
        self._strengths = strengths

    def request(
        self, prompt_ids: list[int], settings: Sequence[DialSetting], seeds: Sequence[int]
    ) -> GenerationRequest:
        """Return one branch per setting; the prompt but its last token is shared."""
        return steered_request(prompt_ids, [self._strengths.of(s) for s in settings], seeds)
