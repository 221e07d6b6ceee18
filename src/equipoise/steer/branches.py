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
    Sampled,
    Sampling,
)


def setting_key(setting: DialSetting) -> str:
    """Return a stable text for seeds, e.g. ``3,auto``."""
    return ",".join("auto" if level is None else str(level) for level in setting.levels)


def n_sampled(sampled: Sampled) -> int:
    """Return how many tokens were sampled, the end token included."""
    return len(sampled.token_ids) + (sampled.finish == "stop")


def as_completion(
    prompt: Prompt,
    setting: DialSetting,
    sampled: Sampled,
    *,
    sample_index: int,
    model_hash: str,
) -> Completion:
    """Return the completion of ``prompt`` that was asked for under ``setting``."""
    return Completion(
        prompt_id=prompt.id,
        sample_index=sample_index,
        text=sampled.text,
        finish=sampled.finish,
        n_tokens=n_sampled(sampled),
        model_hash=model_hash,
        setting=setting,
    )


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
            as_completion(prompt, setting, item, sample_index=c, model_hash=engine.model_hash)
            for c, (setting, item) in enumerate(zip(settings, items, strict=True))
        ]
        for prompt, items in zip(prompts, sampled, strict=True)
    ]
    tokens = sum(len(request.prompt_ids) for request in requests)
    tokens += len(prompts) * sum(map(len, control_ids))
    tokens += sum(completion.n_tokens for row in completions for completion in row)
    return completions, tokens
