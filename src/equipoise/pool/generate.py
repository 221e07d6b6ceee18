"""Self-generation: K completions per prompt from the untouched aligned model."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

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
    done: Collection[str] = (),
    cells: Sequence[DialSetting] = (),
    ask: Ask | None = None,
) -> Iterator[list[Completion]]:
    """Yield the K completions of one prompt after the other, and its prompted ones behind them.

    Prompts are grouped into batches by length over *all* prompts, whatever is done already, and a
    batch with a missing prompt is sampled whole: so a resumed run computes the same batches, and
    writes the same bytes, as one that was never stopped.

    Args:
        prompts: All prompts of the pool.
        engine: Samples from the untouched model.
        encoder: The model's encoder; prompts get no control ids.
        config: K, sampling and batch size.
        seed: The recipe's seed; row (prompt, k) draws from ``derive_seed(seed, id, k)``.
        done: Ids of prompts whose completions exist; they are not yielded again.
        cells: The cells that prompted completions are drawn for.
        ask: Puts a cell into words, for prompted completions.

    Yields:
        Lists of completions, in a deterministic order of prompts. A prompted completion carries
        the cell it was asked for; that is a wish, its scores say what it became.
    """
    k = config.completions_per_prompt
    encoded = {prompt.id: tuple(encoder.prompt_ids(prompt.messages)) for prompt in prompts}
    order = sorted(prompts, key=lambda prompt: (len(encoded[prompt.id]), prompt.id))
    size = max(1, config.batch_size // k)
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        if all(prompt.id in done for prompt in batch):
            continue
        requests, asked_cells = [], []
        for prompt in batch:
            seeds = [derive_seed(seed, "generate", prompt.id, i) for i in range(k)]
            own = tuple(Branch((), one) for one in seeds)
            requests.append(GenerationRequest(encoded[prompt.id], own))
            drawn = _draw_cells(prompt, cells, config, seed) if ask is not None else []
            asked_cells.append(drawn)
            for i, cell in enumerate(drawn):
                words = tuple(encoder.prompt_ids(ask(prompt, cell))) if ask is not None else ()
                branch = Branch((), derive_seed(seed, "prompted", prompt.id, i))
                requests.append(GenerationRequest(words, (branch,)))
        sampled = iter(engine.generate(requests, config.sampling))
        for prompt, drawn in zip(batch, asked_cells, strict=True):
            rows = [(one, None) for one in next(sampled)]
            rows += [(next(sampled)[0], cell) for cell in drawn]  # type: ignore[misc]
            if prompt.id not in done:
                yield [
                    one.as_completion(prompt.id, i, model_hash=engine.model_hash, setting=cell)
                    for i, (one, cell) in enumerate(rows)
                ]


def _draw_cells(
    prompt: Prompt, cells: Sequence[DialSetting], config: GenerateConfig, seed: int
) -> list[DialSetting]:
    """Draw the cells of the prompted completions: as different as they can be."""
    rng = np.random.default_rng(derive_seed(seed, "prompted cells", prompt.id))
    order: list[int] = []
    while len(order) < config.prompted_per_prompt:
        order += rng.permutation(len(cells)).tolist()
    return [cells[i] for i in order[: config.prompted_per_prompt]]
