"""An engine that can steer, on the tiny policy."""

from __future__ import annotations

import torch

from equipoise.engine.sample import TransformersEngine
from tuning_kit import tiny_policy

SHIFT = torch.randn(2, 32, generator=torch.Generator().manual_seed(3))


def steered_engine(vectors: torch.Tensor = SHIFT, batch_size: int = 32) -> TransformersEngine:
    """Two random directions behind the first layer."""
    policy = tiny_policy()
    return TransformersEngine(
        policy.model, policy.encoder, model_hash="h", batch_size=batch_size, steering=(vectors, 0)
    )
