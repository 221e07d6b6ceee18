"""The untouched model as a responder: deaf to the setting, so it is the zero of the bench."""

from __future__ import annotations

from collections.abc import Sequence

from equipoise.dials.encode import Encoder
from equipoise.steer.branches import BranchSampler, headed_request
from equipoise.types import DialSetting, Engine, GenerationRequest, Sampling


class Untouched(BranchSampler):
    """Samples a fresh completion per prompt and setting and ignores the setting."""

    def __init__(
        self, engine: Engine, encoder: Encoder, *, sampling: Sampling, name: str = "start"
    ) -> None:
        super().__init__(engine, encoder, sampling=sampling, name=name)

    def request(
        self, prompt_ids: list[int], settings: Sequence[DialSetting], seeds: Sequence[int]
    ) -> GenerationRequest:
        """Return one branch per setting, headed by nothing, whatever the setting."""
        return headed_request(prompt_ids, [()] * len(settings), seeds)
