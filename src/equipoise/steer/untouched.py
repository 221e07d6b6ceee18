"""The untouched model as a responder: deaf to the setting, so it is the zero of the bench."""

from __future__ import annotations

from collections.abc import Sequence

from equipoise.dials.encode import Encoder
from equipoise.steer.branches import sample_branches
from equipoise.types import Completion, DialSetting, Engine, Prompt, Sampling


class Untouched:
    """Samples a fresh completion per prompt and setting and ignores the setting.

    Args:
        engine: Samples from the untouched model.
        encoder: The untouched model's encoder.
        sampling: How to sample.
        name: Row name in the report.
    """

    def __init__(
        self, engine: Engine, encoder: Encoder, *, sampling: Sampling, name: str = "start"
    ) -> None:
        self.name = name
        self.tokens_through_model = 0
        self._engine, self._encoder, self._sampling = engine, encoder, sampling

    def respond(
        self, prompts: Sequence[Prompt], settings: Sequence[DialSetting], *, seed: int
    ) -> list[list[Completion]]:
        """Return completions shaped (P, C); each prompt is prefilled once."""
        completions, tokens = sample_branches(
            self._engine,
            self._encoder,
            self._sampling,
            prompts,
            settings,
            [()] * len(settings),
            seed=seed,
        )
        self.tokens_through_model += tokens
        return completions
