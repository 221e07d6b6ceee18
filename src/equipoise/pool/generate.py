"""Self-generation: K completions per prompt from the untouched aligned model."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence

from equipoise.config import GenerateConfig
from equipoise.dials.encode import Encoder
from equipoise.seeds import derive_seed
from equipoise.types import (
    Branch,
    Completion,
    Engine,
    GenerationRequest,
    Prompt,
    Sampling,
)


def generate(
    prompts: Sequence[Prompt],
    engine: Engine,
    encoder: Encoder,
    config: GenerateConfig,
    *,
    seed: int,
    done: Collection[str] = (),
) -> Iterator[list[Completion]]:
    """Yield the K completions of one prompt after the other.

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

    Yields:
        Lists of K completions, in a deterministic order of prompts.
    """
    k = config.completions_per_prompt
    encoded = {prompt.id: tuple(encoder.prompt_ids(prompt.messages)) for prompt in prompts}
    order = sorted(prompts, key=lambda prompt: (len(encoded[prompt.id]), prompt.id))
    size = max(1, config.batch_size // k)
    sampling = Sampling(**config.sampling.model_dump())
    for start in range(0, len(order), size):
        batch = order[start : start + size]
        if all(prompt.id in done for prompt in batch):
            continue
        requests = [
            GenerationRequest(
                encoded[prompt.id],
                tuple(Branch((), derive_seed(seed, "generate", prompt.id, i)) for i in range(k)),
            )
            for prompt in batch
        ]
        for prompt, sampled in zip(batch, engine.generate(requests, sampling), strict=True):
            if prompt.id not in done:
                yield [
                    one.as_completion(prompt.id, index, model_hash=engine.model_hash)
                    for index, one in enumerate(sampled)
                ]
