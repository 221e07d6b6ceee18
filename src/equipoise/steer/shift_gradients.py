"""How each completion's likelihood answers to a vector that steering would add to the stream."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class ShiftGradient:
    """One completion as it answers to a shift."""

    gradient: torch.Tensor
    """(D,) float32: of its log-likelihood in nats, at zero, by a vector added behind one layer
    where steering adds it: at the prompt's last token and at every token of the completion."""
    mean: float
    """Mean log-likelihood per token, in nats."""


def shift_gradients(
    model: PreTrainedModel,
    prompt_ids: Sequence[int],
    completions: Sequence[Sequence[int]],
    *,
    layer: int,
    batch_size: int = 32,
) -> list[ShiftGradient]:
    """Return the gradients of completions of one prompt, in order.

    The prompt is computed once per batch and without gradients, as steering leaves it alone; the
    way back ends at ``layer``.

    Args:
        model: A causal language model.
        prompt_ids: Two ids or more.
        completions: Ids of each completion, none of them empty.
        layer: Index of the decoder layer behind which the vector would be added.
        batch_size: Completions per pass.
    """
    # By length, for little padding.
    order = sorted(range(len(completions)), key=lambda k: len(completions[k]))
    found: dict[int, ShiftGradient] = {}
    training = model.training
    model.train(False)
    try:
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            rows = [list(completions[k]) for k in chosen]
            found |= zip(chosen, _of_batch(model, list(prompt_ids), rows, layer), strict=True)
    finally:
        model.train(training)
    return [found[k] for k in range(len(completions))]


def _of_batch(
    model: PreTrainedModel, prompt_ids: list[int], rows: list[list[int]], layer: int
) -> list[ShiftGradient]:
    import torch

    from equipoise.models.layers import shifted

    device, longest = model.device, max(map(len, rows))
    with torch.no_grad():
        prefix = torch.tensor([prompt_ids[:-1]], device=device)
        cache: Any = model(input_ids=prefix, use_cache=True, logits_to_keep=1).past_key_values
        cache.batch_repeat_interleave(len(rows))
    # Right padding needs no mask in a causal model: no real token looks at what follows it.
    padded = [[prompt_ids[-1], *row, *[0] * (longest - len(row))] for row in rows]
    ids = torch.tensor(padded, device=device)  # (B, R + 1)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    real = torch.arange(longest, device=device) < lengths[:, None]  # (B, R)
    width = model.config.get_text_config().hidden_size
    shift = torch.zeros(len(rows), width, device=device, dtype=model.dtype, requires_grad=True)
    with torch.enable_grad(), shifted(model, layer, lambda: shift):
        output = model(input_ids=ids[:, :-1], past_key_values=cache, use_cache=True)
        chosen = output.logits.float().log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        sums = (chosen * real).sum(dim=1)  # (B,)
        (gradients,) = torch.autograd.grad(sums.sum(), shift)
    means = (sums.detach() / lengths).tolist()
    return [
        ShiftGradient(gradient, mean)
        for gradient, mean in zip(gradients.float().cpu(), means, strict=True)
    ]
