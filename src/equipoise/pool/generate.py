"""Self-generation: K completions per prompt from the untouched aligned model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from equipoise.config import GenerateConfig
from equipoise.encoding.encode import Encoder
from equipoise.engine.seam import Engine
from equipoise.seeds import derive_seed
from equipoise.types import Branch, Completion, DialSetting, GenerationRequest, Message, Prompt

Ask = Callable[[Prompt, DialSetting], tuple[Message, ...]]


def generate(
    prompts: Sequence[Prompt],
    engine: Engine,
    encoder: Encoder,
    config: GenerateConfig,
    *,
    seed: int,
    cells: Sequence[DialSetting] = (),
    ask: Ask | None = None,
) -> Iterator[list[Completion]]:
    """Yield the completions of one prompt after the other, in the order of :func:`batches_of`.

    Args:
        prompts: All prompts of the pool.
        engine: See :func:`generate_batch`, also for the rest.
        encoder: The model's encoder.
        config: K, sampling and batch size.
        seed: The recipe's seed.
        cells: The cells that prompted completions are drawn for.
        ask: Puts a cell into words.
    """
    for batch in batches_of(prompts, encoder, config):
        yield from generate_batch(batch, engine, encoder, config, seed=seed, cells=cells, ask=ask)


def batches_of(
    prompts: Sequence[Prompt], encoder: Encoder, config: GenerateConfig
) -> list[list[Prompt]]:
    """Return the prompts that are sampled together: by length, then by id.

    They are the same whatever is sampled already: so a resumed run samples the same batches, and
    writes the same bytes, as one that was never stopped.
    """
    order = sorted(prompts, key=lambda p: (len(encoder.prompt_ids(p.messages)), p.id))
    size = max(1, config.batch_size // config.completions_per_prompt)
    return [order[start : start + size] for start in range(0, len(order), size)]


def generate_batch(
    batch: Sequence[Prompt],
    engine: Engine,
    encoder: Encoder,
    config: GenerateConfig,
    *,
    seed: int,
    cells: Sequence[DialSetting] = (),
    ask: Ask | None = None,
) -> list[list[Completion]]:
    """Return the K completions of each prompt of a batch, and its prompted ones behind them.

    Args:
        batch: One of :func:`batches_of`.
        engine: Samples from the untouched model.
        encoder: The model's encoder; prompts get no control ids.
        config: K and sampling.
        seed: The recipe's seed; row (prompt, k) draws from ``derive_seed(seed, id, k)``.
        cells: The cells that prompted completions are drawn for.
        ask: Puts a cell into words, for prompted completions.

    Returns:
        One list per prompt. A prompted completion carries the cell it was asked for; that is a
        wish, its scores say what it became.
    """
    requests, asked_cells = [], []
    for prompt in batch:
        count = config.completions_per_prompt
        seeds = [derive_seed(seed, "generate", prompt.id, i) for i in range(count)]
        own = tuple(Branch((), one) for one in seeds)
        requests.append(GenerationRequest(tuple(encoder.prompt_ids(prompt.messages)), own))
        drawn = _draw_cells(prompt, cells, config, seed) if ask is not None else []
        asked_cells.append(drawn)
        for i, cell in enumerate(drawn):
            words = tuple(encoder.prompt_ids(ask(prompt, cell))) if ask is not None else ()
            branch = Branch((), derive_seed(seed, "prompted", prompt.id, i))
            requests.append(GenerationRequest(words, (branch,)))
    sampled = iter(engine.generate(requests, config.sampling))
    found = []
    for prompt, drawn in zip(batch, asked_cells, strict=True):
        rows = [(one, None) for one in next(sampled)]
        rows += [(next(sampled)[0], cell) for cell in drawn]  # type: ignore[misc]
        found.append(
            [
                one.as_completion(prompt.id, i, model_hash=engine.model_hash, setting=cell)
                for i, (one, cell) in enumerate(rows)
            ]
        )
    return found


def _draw_cells(
    prompt: Prompt, cells: Sequence[DialSetting], config: GenerateConfig, seed: int
) -> list[DialSetting]:
    """Draw the cells of the prompted completions: as different as they can be."""
    rng = np.random.default_rng(derive_seed(seed, "prompted cells", prompt.id))
    order: list[int] = []
    while len(order) < config.prompted_per_prompt:
        order += rng.permutation(len(cells)).tolist()
    return [cells[i] for i in order[: config.prompted_per_prompt]]
