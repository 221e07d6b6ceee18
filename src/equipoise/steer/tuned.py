"""Control tokens on a tuned policy: the setting goes in at the head of the assistant's turn."""

from __future__ import annotations

from collections.abc import Sequence

from equipoise.dials.encode import Encoder
from equipoise.steer.branches import BranchSampler, headed_request
from equipoise.types import DialSetting, Engine, GenerationRequest, Sampling


class Tuned(BranchSampler):
    """A policy whose dials were trained; its encoder holds the dial manifest."""

    def __init__(
        self, engine: Engine, encoder: Encoder, *, sampling: Sampling, name: str = "tuned"
    ) -> None:
        super().__init__(engine, encoder, sampling=sampling, name=name)

    def request(
        self, prompt_ids: list[int], settings: Sequence[DialSetting], seeds: Sequence[int]
    ) -> GenerationRequest:
        """Return one branch per setting, headed by the control tokens of its setting."""
        return headed_request(
            prompt_ids, [self._encoder.control_ids(setting) for setting in settings], seeds
        )
