"""Steering the untouched model: directions added to its residual stream while it samples.

The last token of the prompt is fed again for every branch, so that the first sampled token is
steered too; the rest of the prompt is shared. Cheap, strong, and quick to babble: never without the
fluency of what comes out (DESIGN section 1).
"""

from __future__ import annotations

from collections.abc import Sequence

from equipoise.dials.encode import Encoder
from equipoise.seeds import derive_seed
from equipoise.steer.branches import setting_key, steered_request
from equipoise.steer.strengths import Strengths
from equipoise.types import Completion, DialSetting, Engine, Prompt, Sampling


class Steering:
    """Adds each direction with the strength that the setting's level stands for.

    Args:
        engine: Samples from the untouched model, with directions in the attributes' order.
        encoder: The untouched model's encoder.
        sampling: How to sample.
        strengths: Level to strength, fitted on dev prompts; auto is strength 0.
        name: Row name in the report.
    """

    def __init__(
        self,
        engine: Engine,
        encoder: Encoder,
        *,
        sampling: Sampling,
        strengths: Strengths,
        name: str = "steering",
    ) -> None:
        self.name = name
        self.tokens_through_model = 0
        self._engine, self._encoder, self._sampling = engine, encoder, sampling
        self._strengths = strengths

    def respond(
        self, prompts: Sequence[Prompt], settings: Sequence[DialSetting], *, seed: int
    ) -> list[list[Completion]]:
        """Return completions shaped (P, C); the prompt but its last token is prefilled once."""
        wanted = [self._strengths.of(setting) for setting in settings]
        requests = [
            steered_request(
                self._encoder.prompt_ids(prompt.messages),
                wanted,
                [derive_seed(seed, prompt.id, setting_key(setting)) for setting in settings],
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
        self.tokens_through_model += sum(
            len(request.prompt_ids) + len(request.branches) for request in requests
        )
        self.tokens_through_model += sum(c.n_tokens for row in completions for c in row)
        return completions
