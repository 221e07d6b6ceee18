"""CLM and ExMATE: pure functions of mean log-likelihoods (DESIGN section 1, Objectives).

ExMATE is the Exponential Maximum Average Treatment Effect objective of CausalDialogue, whose code
takes the exponential of a *batch* mean with weight .05; ours takes it per example by default.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor


class Loss(NamedTuple):
    """A loss and what it was made of; all are scalars."""

    loss: Tensor
    asked: Tensor
    """Mean m(y | x, ζ) over the batch."""
    counterfactual: Tensor
    """Mean m(y | x, ζ') over branches that exist; nan without any."""
    pull: Tensor
    """w·exp(m(y | x, ζ')): the weight of the second term's gradient."""


def mean_log_likelihood(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    """Return ``m``, the mean log-likelihood per completion token.

    Args:
        logits: (..., R, V) at the positions of ``ids``.
        ids: (..., R) token ids of the branch: control ids, completion, padding.
        mask: (..., R) true where the token belongs to the completion; never true at position 0.

    Returns:
        (...) in (-inf, 0]; 0 where a branch has no completion token.
    """
    scored = logits[..., :-1, :].float()
    labels, counted = ids[..., 1:], mask[..., 1:].float()
    picked = scored.gather(-1, labels[..., None])[..., 0] - scored.logsumexp(-1)
    return (picked * counted).sum(-1) / counted.sum(-1).clamp(min=1.0)


def clm(m: Tensor, weights: Tensor) -> Loss:
    """Likelihood given the control: ``-m(y | x, ζ)``.

    Args:
        m: (B, N) mean log-likelihoods; column 0 is the asked setting.
        weights: (B,) example weights.
    """
    asked = _weighted_mean(m[:, 0], weights)
    nothing = torch.full_like(asked, torch.nan)
    return Loss(-asked, asked.detach(), nothing, torch.zeros_like(asked))


def exmate(
    m: Tensor,
    weights: Tensor,
    exists: Tensor,
    *,
    weight: float,
    exp_of: Literal["example", "batch"] = "example",
) -> Loss:
    """Likelihood plus counterfactual: ``-m(y | x, ζ) + w·exp(m(y | x, ζ'))``.

    Args:
        m: (B, N) mean log-likelihoods; column 0 asked, the others counterfactual.
        weights: (B,) example weights.
        exists: (B, N - 1) true where the counterfactual branch exists (none does if all
            attributes are on auto).
        weight: ``w`` >= 0.
        exp_of: exp of each example's mean log-likelihood (ours), or of the batch mean (the
            source's code).
    """
    asked = _weighted_mean(m[:, 0], weights)
    counted = exists.float() * weights[:, None]
    total = counted.sum().clamp(min=1e-12)
    mean = (m[:, 1:] * counted).sum() / total
    if exp_of == "example":
        effect = (m[:, 1:].exp() * counted).sum() / total
    else:
        effect = mean.exp() * (counted.sum() > 0)
    pull = weight * effect
    return Loss(-asked + pull, asked.detach(), mean.detach(), pull.detach())


def _weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    return (values * weights).sum() / weights.sum().clamp(min=1e-12)
