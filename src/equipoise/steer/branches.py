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


class BranchSampler:
    """A responder whose settings are branches of one prefilled prompt, one completion each.

    Args:
        engine: Samples from the policy.
        encoder: The policy's encoder.
        sampling: How to sample.
        name: Row name in the report.
    """

    def __init__(self, engine: Engine, encoder: Encoder, *, sampling: Sampling, name: str) -> None:
        self.name = name
        self.tokens_through_model = 0
        self._engine, self._encoder, self._sampling = engine, encoder, sampling

    def head_of(self, setting: DialSetting) -> tuple[int, ...]:
        """Return the ids that stand at the head of the assistant's turn under a setting."""
        raise NotImplementedError

    def respond(
        self, prompts: Sequence[Prompt], settings: Sequence[DialSetting], *, seed: int
    ) -> list[list[Completion]]:
        """Return completions shaped (P, C); each prompt is prefilled once for its C settings."""
        heads = [self.head_of(setting) for setting in settings]
        requests = [
            GenerationRequest(
                prompt_ids=tuple(self._encoder.prompt_ids(prompt.messages)),
                branches=tuple(
                    Branch(head, derive_seed(seed, prompt.id, setting_key(setting)))
                    for setting, head in zip(settings, heads, strict=True)
                ),
            )
            for prompt in prompts
        ]
        sampled = self._engine.generate(requests, self._sampling)
        completions = [
            [
                item.as_completion(
                    prompt.id, c, model_hash=self._engine.model_hash, setting=setting
                )
                for c, (setting, item) in enumerate(zip(settings, items, strict=True))
            ]
            for prompt, items in zip(prompts, sampled, strict=True)
        ]
        self.tokens_through_model += sum(len(request.prompt_ids) for request in requests)
        self.tokens_through_model += len(prompts) * sum(map(len, heads))
        self.tokens_through_model += sum(c.n_tokens for row in completions for c in row)
        return completions


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
