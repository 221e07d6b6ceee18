"""Steered self-generation: per prompt completions that lean towards cells that are rare.

Unlike prompting, a vector can push a completion out of what the model would ever say, so a steered
completion is only worth learning from while the untouched model still finds it likely. Its cell is
a wish; what it became is for the reward models to say, on the scale of the model's own pool.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

import numpy as np

from equipoise.config import GenerateConfig, RegenerateConfig
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


def regenerate(
    prompts: Sequence[Prompt],
    engine: Engine,
    encoder: Encoder,
    config: RegenerateConfig,
    sampled_as: GenerateConfig,
    *,
    dials: Dials,
    seed: int,
    done: Collection[int] = (),
) -> Iterator[tuple[int, list[tuple[Completion, tuple[float, ...]]]]]:
    """Yield the steered completions of one batch of prompts after the other.

    Batches are made of prompts of like length, over all prompts whatever is done: so a resumed run
    computes, and writes, the same.

    Args:
        prompts: All prompts of the pool.
        engine: Samples from the untouched model, with directions in the attributes' order.
        encoder: The model's encoder.
        config: How many, which cells, how strong.
        sampled_as: Sampling and batch size: those of the own pool.
        dials: Attributes and levels.
        seed: The recipe's seed.
        done: Numbers of the batches that exist; they are not yielded again.

    Yields:
        The batch's number, and its completions with the strengths they were sampled under.
    """
    encoded = {prompt.id: encoder.prompt_ids(prompt.messages) for prompt in prompts}
    batches = batches_of(prompts, encoder, config, sampled_as)
    for number, batch in enumerate(batches):
        if number in done:
            continue
        wanted = [wishes(prompt, config, dials=dials, seed=seed) for prompt in batch]
        requests = [
            steered_request(
                encoded[prompt.id],
                [strengths for _, strengths in drawn],
                [derive_seed(seed, "steered", prompt.id, i) for i in range(len(drawn))],
            )
            for prompt, drawn in zip(batch, wanted, strict=True)
        ]
        rows = []
        for prompt, drawn, items in zip(
            batch, wanted, engine.generate(requests, sampled_as.sampling), strict=True
        ):
            for i, ((cell, strengths), item) in enumerate(zip(drawn, items, strict=True)):
                completion = item.as_completion(
                    prompt.id, i, model_hash=engine.model_hash, setting=cell, round=1
                )
                rows.append((completion, strengths))
        yield number, rows


def batches_of(
    prompts: Sequence[Prompt],
    encoder: Encoder,
    config: RegenerateConfig,
    sampled_as: GenerateConfig,
) -> list[list[Prompt]]:
    """Return the batches of :func:`regenerate`: prompts by length, then by id."""
    order = sorted(prompts, key=lambda p: (len(encoder.prompt_ids(p.messages)), p.id))
    size = max(1, sampled_as.batch_size // config.steered_per_prompt)
    return [order[start : start + size] for start in range(0, len(order), size)]


def _lean(level: int | None, levels: int) -> float:
    return 0.0 if level is None else 2 * level / (levels - 1) - 1
