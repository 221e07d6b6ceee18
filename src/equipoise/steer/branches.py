"""From settings to branches of a prompt and back to completions; tokens are counted here."""

from __future__ import annotations

from collections.abc import Sequence

from equipoise.dials.encode import Encoder
from equipoise.seeds import derive_seed
from equipoise.types import (
    Branch,
    Completion,
    DialSetting,
    Engine,
    GenerationRequest,
    Prompt,
    Sampling,
)


def setting_key(setting: DialSetting) -> str:
    """Return a stable text for seeds, e.g. ``3,auto``."""
    return ",".join("auto" if level is None else str(level) for level in setting.levels)


def sample_branches(
    engine: Engine,
    encoder: Encoder,
    sampling: Sampling,
    prompts: Sequence[Prompt],
    settings: Sequence[DialSetting],
    control_ids: Sequence[tuple[int, ...]],
    *,
    seed: int,
) -> tuple[list[list[Completion]], int]:
    """Sample one completion per prompt and setting with one prefill per prompt.

    Args:
        engine: Samples the branches.
        encoder: Turns messages into ids.
        sampling: How to sample.
        prompts: P prompts.
        settings: C settings.
        control_ids: Per setting the ids at the head of the assistant's turn; empty for none.
        seed: Every (prompt, setting) derives its own seed from it.

    Returns:
        Completions shaped (P, C), and the tokens that went through the model.
    """
    requests = [
        GenerationRequest(
            prompt_ids=tuple(encoder.prompt_ids(prompt.messages)),
            branches=tuple(
                Branch(ids, derive_seed(seed, prompt.id, setting_key(setting)))
                for setting, ids in zip(settings, control_ids, strict=True)
            ),
        )
        for prompt in prompts
    ]
    sampled = engine.generate(requests, sampling)
    completions = [
        [
            item.as_completion(prompt.id, c, model_hash=engine.model_hash, setting=setting)
            for c, (setting, item) in enumerate(zip(settings, items, strict=True))
        ]
        for prompt, items in zip(prompts, sampled, strict=True)
    ]
    tokens = sum(len(request.prompt_ids) for request in requests)
    tokens += len(prompts) * sum(map(len, control_ids))
    tokens += sum(completion.n_tokens for row in completions for completion in row)
    return completions, tokens


def steered_request(
    prompt_ids: Sequence[int], strengths: Sequence[tuple[float, ...]], seeds: Sequence[int]
) -> GenerationRequest:
    """Return the request for one prompt and one branch per (strengths, seed).

    Args:
        prompt_ids: Two ids or more; the last one becomes the head of every branch.
        strengths: Per branch one strength per attribute.
        seeds: Per branch.
    """
    head = tuple(prompt_ids[-1:])
    return GenerationRequest(
        tuple(prompt_ids[:-1]),
        tuple(Branch(head, seed, one) for one, seed in zip(strengths, seeds, strict=True)),
    )
