"""The next token of many rows at once, each with its own sampling, biases and random stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from equipoise.models.drawing import draw
from equipoise.serve.engine import Generation


@dataclass(eq=False)
class Row:
    """One generation while it is being sampled."""

    generation: Generation
    uniforms: np.ndarray[Any, np.dtype[np.float64]]  # (max_tokens,)
    position: int
    """Tokens of this row in the cache."""
    n_sampled: int = 0
    last_id: int = -1
    """The token drawn last, to be fed next."""

    @property
    def top_k(self) -> int:
        """Candidates per token; temperature 0 leaves one."""
        sampling = self.generation.sampling
        return sampling.top_k if sampling.temperature > 0 else 1


def pick(logits: torch.Tensor, rows: Sequence[Row], masked: torch.Tensor) -> list[int]:
    """Return one id per row; -1 where the model's numbers are not finite.

    Args:
        logits: Shape (R, V), float32; overwritten.
        rows: R rows.
        masked: Ids that must not be sampled.
    """
    sound = torch.isfinite(logits.sum(dim=1))  # (R,); a sum is as finite as all of its terms
    if not bool(sound.all()):
        logits = torch.where(sound[:, None], logits, 0.0)
    for i, row in enumerate(rows):
        for token_id, bias in row.generation.logit_bias:
            logits[i, token_id] += bias
    if len(masked):
        logits[:, masked] = -torch.inf  # after the biases, which cannot lift it
    counts = {row.top_k for row in rows}
    ids = torch.empty(len(rows), dtype=torch.long, device=logits.device)
    for top_k in counts:  # all rows together, unless they differ in the number of candidates
        at = [i for i, row in enumerate(rows) if row.top_k == top_k]
        chosen = [rows[i] for i in at]
        sampling = [row.generation.sampling for row in chosen]
        heat = [s.temperature if s.temperature > 0 else 1.0 for s in sampling]
        drawn = draw(
            logits if len(counts) == 1 else logits[at],
            logits.new_tensor([row.uniforms[row.n_sampled] for row in chosen]),
            temperature=logits.new_tensor(heat)[:, None],
            top_p=logits.new_tensor([s.top_p for s in sampling])[:, None],
            top_k=top_k,
        )
        ids[at] = drawn
    ids[~sound] = -1
    found: list[int] = ids.tolist()
    return found
