"""CLM and ExMATE: pure functions of log-likelihoods (docs/tune.md).

ExMATE is the Exponential Maximum Average Treatment Effect objective of CausalDialogue, whose code
takes the exponential of a *batch* mean with weight .05; ours takes it per example by default.

Throughout, column 0 of a (B, N) tensor is the asked setting ζ, the others are counterfactual ζ'.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor


class Loss(NamedTuple):
    """A loss and what it was made of; all are scalars, and all but the loss are detached."""

    loss: Tensor
    asked: Tensor
    """Mean m(y | x, ζ) over the batch."""
    counterfactual: Tensor
    """Mean m(y | x, ζ') over branches that exist; nan without any."""
    pull: Tensor
    """The second term; for ExMATE w·exp(m(y | x, ζ')), the weight of its gradient."""


def token_log_likelihoods(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the log-likelihood of each label: (n, V) logits and (n,) ids to (n,) in nats."""
    return -torch.nn.functional.cross_entropy(logits.float(), labels, reduction="none")


def mean_of(sums: Tensor, counts: Tensor) -> Tensor:
    """Return ``m``, the mean log-likelihood per completion token; 0 where there is no token."""
    return sums / counts.clamp(min=1)


def preferred(sums: Tensor, exists: Tensor) -> Tensor:
    """Return the share of counterfactual branches that the asked one is likelier than; ties ½.

    On examples that the model has not been trained on this says whether it listens: 1/2 is deaf.

    Args:
        sums: (B, N) log-likelihoods.
        exists: (B, N - 1) true where the counterfactual branch exists.

    Returns:
        A scalar in [0, 1]; nan without any counterfactual.
    """
    gaps = sums[:, :1] - sums[:, 1:]
    wins = (gaps > 0).float() + 0.5 * (gaps == 0).float()
    return (wins * exists).sum() / exists.sum()


def clm(m: Tensor, weights: Tensor, exists: Tensor) -> Loss:
    """Likelihood given the control: ``-m(y | x, ζ)``.

    Args:
        m: (B, N) mean log-likelihoods; counterfactual branches are looked at, not learnt from.
        weights: (B,) example weights.
        exists: (B, N - 1) true where the counterfactual branch exists.
    """
    asked = _weighted_mean(m[:, 0], weights)
    return _loss(-asked, torch.zeros_like(asked), m, weights, exists)


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
        m: (B, N) mean log-likelihoods.
        weights: (B,) example weights.
        exists: (B, N - 1) true where the counterfactual branch exists (none does if all
            attributes are on auto).
        weight: ``w`` >= 0.
        exp_of: exp of each example's mean log-likelihood (ours), or of the batch mean (the
            source's code).
    """
    counted = _counted(weights, exists)
    total = counted.sum().clamp(min=1e-12)
    if exp_of == "example":
        effect = (m[:, 1:].exp() * counted).sum() / total
    else:
        effect = ((m[:, 1:] * counted).sum() / total).exp() * (counted.sum() > 0)
    pull = weight * effect
    return _loss(pull - _weighted_mean(m[:, 0], weights), pull, m, weights, exists)


def _loss(loss: Tensor, pull: Tensor, m: Tensor, weights: Tensor, exists: Tensor) -> Loss:
    with torch.no_grad():
        counted = _counted(weights, exists)
        total = counted.sum()  # 0 gives nan: there was nothing to look at
        return Loss(
            loss,
            _weighted_mean(m[:, 0], weights),
            (m[:, 1:] * counted).sum() / total,
            pull.detach(),
        )


def _counted(weights: Tensor, exists: Tensor) -> Tensor:
    return exists.float() * weights[:, None]  # (B, N - 1)


def _weighted_mean(values: Tensor, weights: Tensor) -> Tensor:
    return (values * weights).sum() / weights.sum().clamp(min=1e-12)
