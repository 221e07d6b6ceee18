"""One token per row by inverse CDF, each row from its own random stream.

A row's draw depends on its own logits and its own number only, so a completion does not depend on
the rows around it beyond the rounding of the forward pass.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

_BELOW_ONE = 1 - 2**-24
"""The largest float32 below 1."""


def uniform_stream(seed: int, n: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Return the row's own stream of n numbers in [0, 1)."""
    return np.random.Generator(np.random.Philox(seed)).random(n)


def draw(
    logits: torch.Tensor,
    uniforms: torch.Tensor,
    *,
    temperature: float | torch.Tensor,
    top_p: float | torch.Tensor,
    top_k: int,
) -> torch.Tensor:
    """Draw one token per row by inverse CDF; one at minus infinity is never drawn.

    Args:
        logits: Shape (R, V), float32; ids that must not be drawn are at minus infinity.
        uniforms: Shape (R,), in [0, 1).
        temperature: > 0; one for all rows, or shape (R, 1).
        top_p: In (0, 1]; one for all rows, or shape (R, 1).
        top_k: Candidates per row; 0 is the whole vocabulary.

    Returns:
        Token ids, shape (R,).
    """
    scores = logits / temperature
    candidates: torch.Tensor | None = None
    if 0 < top_k < scores.shape[1]:
        scores, candidates = scores.topk(top_k, dim=1)
    elif bool((torch.as_tensor(top_p) < 1.0).any()):
        scores, candidates = scores.sort(dim=1, descending=True)
    probabilities = scores.softmax(dim=1)
    cumulative = probabilities.cumsum(dim=1)  # (R, k), rising
    # Nucleus: a candidate stays if the mass before it is under top_p; the first always stays.
    kept = (cumulative - probabilities < top_p).sum(dim=1, keepdim=True)  # (R, 1)
    # The mass before the last candidates may round up to 1, and without a nucleus all stay.
    kept = torch.where(torch.as_tensor(top_p, device=kept.device) < 1.0, kept, scores.shape[1])
    kept = kept.clamp(min=1)  # top_p may round to 0
    # A number just below 1 may round to 1, beyond the end of the distribution.
    threshold = uniforms.clamp(max=_BELOW_ONE)[:, None] * cumulative.gather(1, kept - 1)
    index = torch.searchsorted(cumulative, threshold, right=True)
    index = torch.minimum(index, kept - 1)
    # Whatever the sums have rounded to: what has no probability is not drawn.
    index = torch.where(
        probabilities.gather(1, index) > 0, index, scores.argmax(dim=1, keepdim=True)
    )
    return (candidates.gather(1, index) if candidates is not None else index)[:, 0]
