"""Control tokens on a tuned policy: the setting goes in at the head of the assistant's turn."""

from __future__ import annotations

from equipoise.dials.encode import Encoder
from equipoise.steer.branches import BranchSampler
from equipoise.types import DialSetting, Engine, Sampling


class Tuned(BranchSampler):
    """A policy whose dials were trained; its encoder holds the dial manifest."""

    def __init__(
        self, engine: Engine, encoder: Encoder, *, sampling: Sampling, name: str = "tuned"
    ) -> None:
        super().__init__(engine, encoder, sampling=sampling, name=name)

    def head_of(self, setting: DialSetting) -> tuple[int, ...]:
        """Return the ids of the setting's control tokens."""
        return self._encoder.control_ids(setting)
