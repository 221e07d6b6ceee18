"""Steered self-generation: per prompt completions that lean towards cells that are rare.

Unlike prompting, a vector can push a completion out of what the model would ever say, so a steered
completion is only worth learning from while the untouched model still finds it likely. Its cell is
a wish; what it became is for the reward models to say, on the scale of the model's own pool.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from equipoise.config import GenerateConfig, RegenerateConfig, Sampling
from equipoise.dials.dials import Dials
from equipoise.encoding.encode import Encoder
from equipoise.engine.seam import Engine
from equipoise.seeds import derive_seed
from equipoise.steer.responders import steered_request
from equipoise.types import Completion, DialSetting, Prompt

Wish = tuple[DialSetting, tuple[float, ...]]
"""A control cell and one strength per attribute."""


def wishes(prompt: Prompt, config: RegenerateConfig, *, dials: Dials, seed: int) -> list[Wish]:
    """Return the cells of one prompt's steered completions, as different as they can be.

    Level ``l`` of L gets the strength ``f·(2l/(L-1) - 1)`` for the factor ``f`` whose turn it is.
    """
    grid = [
        cell
        for cell in dials.cells()
        if any(_lean(level, dials.levels) for level in cell.levels)
        and (config.over == "cells" or all(abs(_lean(lv, dials.levels)) == 1 for lv in cell.levels))
    ]
    rng = np.random.default_rng(derive_seed(seed, "steered cells", prompt.id))
    first = int(rng.integers(len(config.factors)))
    found: list[Wish] = []
    while len(found) < config.steered_per_prompt:
        for index in rng.permutation(len(grid)).tolist():
            factor = config.factors[(first + len(found)) % len(config.factors)]
            cell = grid[index]
            found.append(
                (cell, tuple(factor * _lean(level, dials.levels) for level in cell.levels))
            )
    return found[: config.steered_per_prompt]


def regenerate_batch(
    batch: Sequence[Prompt],
    wanted: Sequence[Sequence[Wish]],
    engine: Engine,
    encoder: Encoder,
    sampling: Sampling,
    *,
    seed: int,
) -> list[tuple[Completion, tuple[float, ...]]]:
    """Return the steered completions of one batch, with the strengths they were sampled under.

    Args:
        batch: One of :func:`batches_of`.
        wanted: The :func:`wishes` of each of its prompts.
        engine: Samples from the untouched model, with directions in the attributes' order.
        encoder: The model's encoder.
        sampling: That of the own pool.
        seed: The recipe's seed.
    """
    requests = [
        steered_request(
            encoder.prompt_ids(prompt.messages),
            [strengths for _, strengths in drawn],
            [derive_seed(seed, "steered", prompt.id, i) for i in range(len(drawn))],
        )
        for prompt, drawn in zip(batch, wanted, strict=True)
    ]
    sampled = engine.generate(requests, sampling)
    return [
        (
            item.as_completion(prompt.id, i, model_hash=engine.model_hash, setting=cell, round=1),
            strengths,
        )
        for prompt, drawn, items in zip(batch, wanted, sampled, strict=True)
        for i, ((cell, strengths), item) in enumerate(zip(drawn, items, strict=True))
    ]


def batches_of(
    prompts: Sequence[Prompt],
    encoder: Encoder,
    config: RegenerateConfig,
    sampled_as: GenerateConfig,
) -> list[list[Prompt]]:
    """Return the prompts that are sampled together: by length, then by id.

    They are the same whatever is sampled already: so a resumed run computes, and writes, the same.
    """
    order = sorted(prompts, key=lambda p: (len(encoder.prompt_ids(p.messages)), p.id))
    size = max(1, sampled_as.batch_size // config.steered_per_prompt)
    return [order[start : start + size] for start in range(0, len(order), size)]


def _lean(level: int | None, levels: int) -> float:
    return 0.0 if level is None else 2 * level / (levels - 1) - 1
