"""Steering the untouched model: directions added to its residual stream while it samples.

The last token of the prompt is fed again for every branch, so that the first sampled token is
steered too; the rest of the prompt is shared. Cheap, strong, and quick to babble: never without the
fluency of what comes out (DESIGN section 1).
"""

from __future__ import annotations

from collections.abc import Sequence

from equipoise.dials.encode import Encoder
from equipoise.steer.branches import BranchSampler, steered_request
from equipoise.steer.strengths import Strengths
from equipoise.types import DialSetting, Engine, GenerationRequest, Sampling


class Steering(BranchSampler):
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
        super().__init__(engine, encoder, sampling=sampling, name=name)
        self._strengths = strengths

    def request(
        self, prompt_ids: list[int], settings: Sequence[DialSetting], seeds: Sequence[int]
    ) -> GenerationRequest:
        """Return one branch per setting; the prompt but its last token is shared."""
        return steered_request(prompt_ids, [self._strengths.of(s) for s in settings], seeds)
