"""The next token of many rows at once, each with its own sampling, biases and random stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from equipoise.dials.thoughts import Follower
from equipoise.models.drawing import draw
from equipoise.serve.engine import Generation


@dataclass(eq=False)
class Row:
    """One generation while it is being sampled."""

    generation: Generation
    follower: Follower
    uniforms: np.ndarray[Any, np.dtype[np.float64]]  # one per token at most
    position: int
    """Tokens of this row in the cache."""
    bias: tuple[torch.Tensor, torch.Tensor] | None = None
    """Ids and what is added to each; as tensors, since a step of all rows waits for the sum."""
    n_sampled: int = 0
    last_id: int = -1
    """The token drawn last, to be fed next."""

    @property
    def top_k(self) -> int:
        """Candidates per token; temperature 0 leaves one."""
        sampling = self.generation.sampling
        return sampling.top_k if sampling.temperature > 0 else 1


def bias_of(
    generation: Generation, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return the biases of a generation as :class:`Row` keeps them."""
    if not generation.logit_bias:
        return None
    ids, values = zip(*generation.logit_bias, strict=True)
    return torch.tensor(ids, device=device), torch.tensor(
        values, dtype=torch.float32, device=device
    )


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
        if row.bias is not None:
            logits[i].index_add_(0, *row.bias)
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
