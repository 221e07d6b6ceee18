"""From settings to branches of a prompt and back to completions; tokens are counted here.

Two responders: the untouched model, which ignores the setting, and a tuned policy, whose setting
goes in as control tokens at the head of the assistant's turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

from equipoise.config import Sampling
from equipoise.encoding.encode import Encoder
from equipoise.engine.seam import Engine
from equipoise.seeds import derive_seed
from equipoise.types import Branch, Completion, DialSetting, GenerationRequest, Prompt


def setting_key(setting: DialSetting) -> str:
    """Return a stable text for seeds, e.g. ``3,auto``."""
    return ",".join("auto" if level is None else str(level) for level in setting.levels)


class BranchSampler:
    """A responder whose settings are branches of one prefilled prompt, one completion each.

    Args:
        engine: Samples from the policy.
        encoder: The policy's encoder.
        sampling: How to sample.
        name: Row name in the report; by default the method's.
    """

    name: str

    def __init__(
        self, engine: Engine, encoder: Encoder, *, sampling: Sampling, name: str | None = None
    ) -> None:
        self.name = name or self.name
        self.tokens_through_model = 0
        self._engine, self._encoder, self._sampling = engine, encoder, sampling

    def request(
        self, prompt_ids: list[int], settings: Sequence[DialSetting], seeds: Sequence[int]
    ) -> GenerationRequest:
        """Return the request for one prompt: a branch per (setting, seed)."""
        raise NotImplementedError

    def requests(
        self, prompt: Prompt, settings: Sequence[DialSetting], seeds: Sequence[int]
    ) -> list[GenerationRequest]:
        """Return the requests for one prompt, whose branches are the settings in order."""
        return [self.request(self._encoder.prompt_ids(prompt.messages), settings, seeds)]

    def respond(
        self, prompts: Sequence[Prompt], settings: Sequence[DialSetting], *, seed: int
    ) -> list[list[Completion]]:
        """Return completions shaped (P, C); what the C settings share is prefilled once."""
        requests = [
            request
            for prompt in prompts
            for request in self.requests(
                prompt,
                settings,
                [derive_seed(seed, prompt.id, setting_key(setting)) for setting in settings],
            )
        ]
        sampled = chain.from_iterable(self._engine.generate(requests, self._sampling))
        completions = [
            [
                next(sampled).as_completion(
                    prompt.id, c, model_hash=self._engine.model_hash, setting=setting
                )
                for c, setting in enumerate(settings)
            ]
            for prompt in prompts
        ]
        for request in requests:
            self.tokens_through_model += len(request.prompt_ids)
            self.tokens_through_model += sum(len(b.control_ids) for b in request.branches)
        self.tokens_through_model += sum(c.n_tokens for row in completions for c in row)
        return completions


def headed_request(
    prompt_ids: Sequence[int], heads: Sequence[tuple[int, ...]], seeds: Sequence[int]
) -> GenerationRequest:
    """Return the request for one prompt and one branch per (ids at its head, seed)."""
    branches = (Branch(head, seed) for head, seed in zip(heads, seeds, strict=True))
    return GenerationRequest(tuple(prompt_ids), tuple(branches))


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


class Untouched(BranchSampler):
    """Samples a fresh completion per prompt and setting and ignores the setting."""

    name = "start"

    def request(
        self, prompt_ids: list[int], settings: Sequence[DialSetting], seeds: Sequence[int]
    ) -> GenerationRequest:
        """Return one branch per setting, headed by nothing, whatever the setting."""
        return headed_request(prompt_ids, [()] * len(settings), seeds)


class Tuned(BranchSampler):
    """A policy whose dials were trained; its encoder holds the dial manifest."""

    name = "tuned"

    def request(
        self, prompt_ids: list[int], settings: Sequence[DialSetting], seeds: Sequence[int]
    ) -> GenerationRequest:
        """Return one branch per setting, headed by the control tokens of its setting."""
        return headed_request(
            prompt_ids, [self._encoder.control_ids(setting) for setting in settings], seeds
        )
