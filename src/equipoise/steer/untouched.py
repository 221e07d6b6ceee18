"""The untouched model as a responder: deaf to the setting, so it is the zero of the bench."""

from __future__ import annotations

from equipoise.dials.encode import Encoder
from equipoise.steer.branches import BranchSampler
from equipoise.types import DialSetting, Engine, Sampling


class Untouched(BranchSampler):
    """Samples a fresh completion per prompt and setting and ignores the setting."""

    def __init__(
        self, engine: Engine, encoder: Encoder, *, sampling: Sampling, name: str = "start"
    ) -> None:
        super().__init__(engine, encoder, sampling=sampling, name=name)

    def head_of(self, setting: DialSetting) -> tuple[int, ...]:
        """Return no ids, whatever the setting."""
        return ()
