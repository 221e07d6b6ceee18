"""The shared prefix: one forward over ``prompt ‖ ζ y ‖ ζ' y`` with branches that do not meet.

Costs (P + 2R)/(P + R) of CLM instead of 2, and equals separate forwards (docs/tune.md).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from equipoise.models.architecture import branch_inputs
from equipoise.tune.batch import ControlledBatch
from equipoise.tune.objectives import token_log_likelihoods

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def read_apart(model: PreTrainedModel, batch: ControlledBatch) -> dict[str, Any]:
    """Return what ``model`` is called with to read all branches of a batch apart."""
    return branch_inputs(model, batch.input_ids, batch.position_ids, batch.branch_ids)


def before_labels(batch: ControlledBatch) -> Tensor:
    """Return where completion tokens are predicted, one position earlier: (B, T)."""
    labelled = batch.completion_mask
    n_rows, n_branches, length = labelled.shape
    before = torch.zeros_like(labelled)
    before[..., :-1] = labelled[..., 1:]
    places = torch.zeros_like(batch.branch_ids, dtype=torch.bool)
    places[:, -n_branches * length :] = before.reshape(n_rows, -1)
    return places


def branch_log_likelihoods(model: PreTrainedModel, batch: ControlledBatch) -> tuple[Tensor, Tensor]:
    """Return the log-likelihood of every branch's completion, and its number of tokens.

    The output head is applied where a label stands and nowhere else: not on the prompt, not on
    control tokens, not on padding. On a real model the vocabulary is a fifth of the compute, and
    its logits are most of the memory.

    Args:
        model: A causal language model, also one that peft has wrapped.
        batch: See :class:`ControlledBatch`.

    Returns:
        Sums (B, N) in nats, and counts (B, N); both 0 where a branch has no completion.
    """
    labelled = batch.completion_mask  # (B, N, R); never true at position 0
    n_rows, n_branches, length = labelled.shape
    with _head_at(model, before_labels(batch)):
        output = model(**read_apart(model, batch), use_cache=False)
    ids = batch.input_ids[:, -n_branches * length :].reshape(labelled.shape)
    tokens = token_log_likelihoods(output.logits, ids[labelled])  # (n labels,)
    sums = tokens.new_zeros(n_rows * n_branches)
    place = labelled.reshape(-1, length).nonzero()[:, 0]  # branch of each label
    return sums.index_add(0, place, tokens).reshape(n_rows, n_branches), labelled.sum(-1)


@contextmanager
def _head_at(model: PreTrainedModel, read: Tensor) -> Iterator[None]:
    """Let the output head see the hidden states at true positions of ``read`` (B, T) only."""

    def hook(_module: Any, arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        return (arguments[0][read], *arguments[1:])  # (n labels, D)

    # Through the head's own hook, since what a model does to its logits (scale, cap) must stay.
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call, unused-ignore]
    handle = head.register_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()
