"""The next token of many rows by inverse CDF, each with its own sampling, biases and numbers.

A row's draw depends on its own logits and its own number only, so a completion does not depend on
the rows around it beyond the rounding of the forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from equipoise.engine.seam import Generation, Token

if TYPE_CHECKING:
    from equipoise.encoding.encode import Encoder
    from equipoise.encoding.thoughts import Follower

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


@dataclass(eq=False)
class Row:
    """One generation while it is being sampled."""

    generation: Generation
    follower: Follower
    uniforms: np.ndarray[Any, np.dtype[np.float64]]  # one per token at most
    bias: tuple[torch.Tensor, torch.Tensor] | None
    """Ids and what is added to each; as tensors, since a step of all rows waits for the sum."""
    ids: list[int] = field(default_factory=list)
    """Sampled so far, without the end token; the last is to be fed next."""

    @classmethod
    def begin(cls, generation: Generation, encoder: Encoder, device: torch.device) -> Row:
        """Return the row of a generation of which nothing has been sampled."""
        uniforms = uniform_stream(generation.seed, encoder.most_tokens(generation.sampling))
        bias = None
        if generation.logit_bias:
            ids, values = zip(*generation.logit_bias, strict=True)
            bias = (
                torch.tensor(ids, device=device),
                torch.tensor(values, dtype=torch.float32, device=device),
            )
        return cls(generation, encoder.follower(generation.prompt_ids), uniforms, bias)

    @property
    def top_k(self) -> int:
        """Candidates per token; temperature 0 leaves one."""
        sampling = self.generation.sampling
        return sampling.top_k if sampling.temperature > 0 else 1

    def take(self, token_id: int, ends: bool) -> Token:
        """Add one sampled id, and end the row where it or a limit does."""
        if ends:
            return Token(-1, "thought" if self.follower.within else "stop")
        self.ids.append(token_id)
        thought = not self.follower.take(token_id)
        return Token(token_id, self.follower.finish(self.generation.sampling), thought)


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
        ids[at] = draw(
            logits if len(counts) == 1 else logits[at],
            logits.new_tensor([row.uniforms[len(row.ids)] for row in chosen]),
            temperature=logits.new_tensor(heat)[:, None],
            top_p=logits.new_tensor([s.top_p for s in sampling])[:, None],
            top_k=top_k,
        )
    ids[~sound] = -1
    found: list[int] = ids.tolist()
    return found
