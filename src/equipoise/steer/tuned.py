"""Control tokens on a tuned policy: every setting is a branch of one prefilled prompt."""

from __future__ import annotations

from collections.abc import Sequence

from equipoise.dials.encode import Encoder
from equipoise.steer.branches import sample_branches
from equipoise.types import Completion, DialSetting, Engine, Prompt, Sampling


class Tuned:
    """A policy whose dials were trained: the setting goes in as control tokens.

    Args:
        engine: Samples from the tuned policy.
        encoder: The tuned policy's encoder; it holds the dial manifest.
        sampling: How to sample.
        name: Row name in the report.
    """

    def __init__(
        self, engine: Engine, encoder: Encoder, *, sampling: Sampling, name: str = "tuned"
    ) -> None:
        self.name = name
        self.tokens_through_model = 0
        self._engine, self._encoder, self._sampling = engine, encoder, sampling

    def respond(
        self, prompts: Sequence[Prompt], settings: Sequence[DialSetting], *, seed: int
    ) -> list[list[Completion]]:
        """Return completions shaped (P, C); each prompt is prefilled once for its C settings."""
        control_ids = [self._encoder.control_ids(setting) for setting in settings]
        completions, tokens = sample_branches(
            self._engine,
            self._encoder,
            self._sampling,
            prompts,
            settings,
            control_ids,
            seed=seed,
        )
        self.tokens_through_model += tokens
        return completions
