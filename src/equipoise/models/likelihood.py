"""What a model makes of given completions: their log-likelihood, and its hidden states on them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from equipoise.encoding.encode import Encoder
    from equipoise.types import Prompt


@dataclass(frozen=True)
class Reading:
    """One completion as a model read it."""

    log_likelihood: float
    """Summed over its tokens, in nats."""
    n_tokens: int
    state: torch.Tensor | None = None
    """(D,) float32: mean hidden state over its tokens; ``None`` if no layer was asked for, or if
    the completion has no token."""

    @property
    def mean(self) -> float:
        """Mean log-likelihood per token; NaN without a token."""
        return self.log_likelihood / self.n_tokens if self.n_tokens else float("nan")


@dataclass(frozen=True)
class Answer:
    """A completion by its text, and whose it is."""

    prompt_id: str
    text: str
    finished: bool
    """Whether the end token belongs to it."""


def read_answers(
    model: PreTrainedModel,
    encoder: Encoder,
    answers: Sequence[Answer],
    prompts: Mapping[str, Prompt],
    *,
    layer: int | None = None,
    batch_size: int = 32,
    on_prompt: Callable[[int], None] | None = None,
) -> list[Reading]:
    """Read answers to any prompts, in any order; a prompt is computed once for all of its own.

    Args:
        model: A causal language model.
        encoder: Its encoder.
        answers: N of them.
        prompts: Prompt id to prompt.
        layer: See :func:`read_completions`.
        batch_size: Completions per forward pass.
        on_prompt: Called with 1 after each prompt.

    Returns:
        N readings, in the order of the answers.
    """
    places: dict[str, list[int]] = defaultdict(list)
    for place, answer in enumerate(answers):
        places[answer.prompt_id].append(place)
    readings = [Reading(0.0, 0)] * len(answers)
    for prompt_id, found in places.items():
        prefix = encoder.prompt_ids(prompts[prompt_id].messages)
        chosen = [answers[place] for place in found]
        ids = [encoder.completion_ids(one.text, finished=one.finished) for one in chosen]
        read = read_completions(model, prefix, ids, layer=layer, batch_size=batch_size)
        for place, reading in zip(found, read, strict=True):
            readings[place] = reading
        if on_prompt is not None:
            on_prompt(1)
    return readings


def read_completions(
    model: PreTrainedModel,
    prefix_ids: Sequence[int],
    completions: Sequence[Sequence[int]],
    *,
    layer: int | None = None,
    batch_size: int = 32,
) -> list[Reading]:
    """Read the completions of one prompt, in order.

    The prefix is computed once per batch and its cache repeated: K completions cost P + K·R
    positions, and the vocabulary is computed at completion positions only.

    Args:
        model: A causal language model.
        prefix_ids: Ids of the prompt, control ids included.
        completions: Ids of each completion.
        layer: Index of the decoder layer whose output is averaged, see
            :func:`equipoise.models.layers.decoder_layers`.
        batch_size: Completions per forward pass.
    """
    import torch

    readings = [Reading(0.0, 0)] * len(completions)
    # Sorted by length: little padding, and the same batches for the same completions.
    order = sorted(
        (k for k, ids in enumerate(completions) if ids), key=lambda k: len(completions[k])
    )
    training = model.training
    model.train(False)
    try:
        with torch.inference_mode():
            for start in range(0, len(order), batch_size):
                chosen = order[start : start + batch_size]
                rows = [list(completions[k]) for k in chosen]
                for k, reading in zip(
                    chosen, _read_batch(model, prefix_ids, rows, layer), strict=True
                ):
                    readings[k] = reading
    finally:
        model.train(training)
    return readings


def _read_batch(
    model: PreTrainedModel, prefix_ids: Sequence[int], rows: list[list[int]], layer: int | None
) -> list[Reading]:
    import torch

    from equipoise.models.layers import watched

    device, longest = model.device, max(map(len, rows))
    prefix = torch.tensor([list(prefix_ids)], device=device)  # (1, P)
    first = model(input_ids=prefix, use_cache=True, logits_to_keep=1)
    cache: Any = first.past_key_values
    cache.batch_repeat_interleave(len(rows))
    # Right padding needs no mask in a causal model: no real token looks at what follows it.
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)  # (B, R)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    real = torch.arange(longest, device=device) < lengths[:, None]  # (B, R)
    logits = first.logits[:, -1:].expand(len(rows), -1, -1)  # (B, 1, V)
    states: list[torch.Tensor | None] = [None] * len(rows)
    # The last token's own logits are of no use; its hidden state is.
    fed = ids if layer is not None else ids[:, :-1]
    if fed.shape[1]:
        watching: AbstractContextManager[list[torch.Tensor]]
        watching = nullcontext([]) if layer is None else watched(model, layer)
        with watching as seen:
            keep = max(longest - 1, 1) if layer is None else longest
            output = model(
                input_ids=fed, past_key_values=cache, use_cache=True, logits_to_keep=keep
            )
        logits = torch.cat([logits, output.logits[:, : longest - 1]], dim=1)  # (B, R, V)
        for hidden in seen:
            mask = real[..., None].to(torch.float32)
            states = list(((hidden.float() * mask).sum(1) / mask.sum(1)).cpu())  # B of (D,)
    chosen = logits.float().log_softmax(-1).gather(-1, ids[..., None]).squeeze(-1)  # (B, R)
    sums = (chosen.double() * real).sum(dim=1).tolist()
    return [
        Reading(value, len(row), state)
        for value, row, state in zip(sums, rows, states, strict=True)
    ]
