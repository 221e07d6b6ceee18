"""Several continuations of one prompt in one forward, and whether an architecture takes that.

In our masks branches do not meet. A mask of our own replaces the model's, so a layer's sliding
window has to be part of it. Windows are counted in positions, which go on from the prompt's end in
every branch.

Two random layers of a model tell whether it can be sampled and tuned here. Two things are held
against plain forwards of one row: decoding with a cache behind prompts padded on the left, and
reading several branches of a prompt at once. Nothing is taken on trust from names: what gives other
numbers is refused before its weights are read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from equipoise.errors import EquipoiseError, ModelError
from equipoise.models.cut import VOCABULARY, cut_config, narrowest_model, refused

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FULL, SLIDING = "full_attention", "sliding_attention"
_TOLERANCE = 5e-3
"""Largest difference of a logit, in standard deviations of the logits: rounding gives 1e-6 (1e-4
where a model cannot be narrowed), a window that is one position too wide 1."""
_TRIED_BEFORE: dict[str, None] = {}


def layer_windows(config: Any) -> dict[str, int | None]:
    """Return the kinds of a model's layers, each with its window in positions (None: no window).

    Args:
        config: The model's config.

    Raises:
        ModelError: A kind of layer is neither full nor sliding attention.
    """
    text = config.get_text_config()
    window: int | None = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None) or [FULL if window is None else SLIDING]
    unknown = sorted(set(kinds) - {FULL, SLIDING})
    if unknown:
        raise refused(
            config.model_type,
            f"they have layers of kind {', '.join(unknown)}, and the branches of a prompt can "
            "be kept apart in full and sliding attention only",
        )
    return {kind: window if kind == SLIDING else None for kind in sorted(set(kinds))}


def branch_mask(branch_ids: Tensor, position_ids: Tensor, window: int | None = None) -> Tensor:
    """Return which key each query may see: a boolean (B, 1, T, T).

    A query sees earlier keys of the prompt and of its own branch, within the window. Padding sees
    itself only, since a row of the mask with nothing in it would be not-a-number.

    Args:
        branch_ids: (B, T): -1 padding, 0 prompt, 1.. branches.
        position_ids: (B, T).
        window: In positions; None for none.
    """
    query, key = branch_ids[:, :, None], branch_ids[:, None, :]
    length = branch_ids.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=branch_ids.device).tril()
    allowed = ((key == 0) | (key == query)) & (key >= 0) & earlier
    if window is not None:
        allowed &= position_ids[:, :, None] - position_ids[:, None, :] < window
    allowed |= torch.eye(length, dtype=torch.bool, device=branch_ids.device)
    return allowed[:, None]


def branch_inputs(
    model: PreTrainedModel, input_ids: Tensor, position_ids: Tensor, branch_ids: Tensor
) -> dict[str, Any]:
    """Return what ``model`` is called with to read all branches of a batch apart.

    Args:
        model: A causal language model.
        input_ids: (B, T).
        position_ids: (B, T).
        branch_ids: See :func:`branch_mask`.
    """
    masks = {
        kind: branch_mask(branch_ids, position_ids, window)
        for kind, window in layer_windows(model.config).items()
    }
    if getattr(model.config, "_attn_implementation", "sdpa") != "sdpa":
        lowest = torch.finfo(model.dtype).min
        masks = {
            kind: torch.zeros_like(mask, dtype=model.dtype).masked_fill(~mask, lowest)
            for kind, mask in masks.items()
        }
    # A model whose layers are of one kind takes one mask, one of several kinds a mask for each.
    mask: Any = masks if len(masks) > 1 else next(iter(masks.values()))
    return {"input_ids": input_ids, "position_ids": position_ids, "attention_mask": mask}


def check_architecture(config: Any, place: str) -> None:
    """Refuse a model that could not be sampled or tuned exactly; one try per process and config.

    Args:
        config: The model's config.
        place: Its name, for messages.

    Raises:
        ModelError: With the reason.
    """
    try:
        layer_windows(config)
        _refuse_distances(config)
        small = cut_config(config)
        key = type(config).__name__ + json.dumps(small.to_dict(), sort_keys=True, default=str)
        if key not in _TRIED_BEFORE:
            compare(narrowest_model(small))
            _TRIED_BEFORE[key] = None
    except EquipoiseError as error:
        raise ModelError(f"{place}: {error.what}", why=error.why, fix=error.fix) from error


def _refuse_distances(config: Any) -> None:
    """Refuse ALiBi: its bias counts places in the row, which are not those behind the prompt."""
    text = config.get_text_config()
    options = [vars(text), vars(getattr(text, "attn_config", text))]
    if text.model_type == "bloom" or any(option.get("alibi") for option in options):
        raise refused(
            text.model_type,
            "its attention is biased by the distance in the row (ALiBi), which is wrong for the "
            "second branch of a prompt",
        )


def compare(model: Any) -> None:
    """Hold cached decoding and branches against plain forwards.

    Raises:
        ModelError: One of them goes wrong, or gives other numbers.
    """
    kind = model.config.model_type
    for what, difference in (
        ("decoding with a cache", _cache_difference),
        ("reading branches of a prompt apart", _branch_difference),
    ):
        try:
            with torch.inference_mode():
                found = difference(model)
        except Exception as error:  # whatever a model of another build raises
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise refused(kind, f"{what} fails on two layers of it ({reason[:200]})") from error
        if not found < _TOLERANCE:
            why = f"{what} gives other numbers than plain forwards: on two random layers of it the "
            raise refused(kind, f"{why}logits differ by {found:.2g} times their spread")


@lru_cache(maxsize=1)
def _texts() -> tuple[list[int], list[int], list[list[int]]]:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(3, VOCABULARY, (64,), generator=generator).tolist()
    return drawn[:9], drawn[9:13], [drawn[13 + 7 * i : 20 + 7 * i] for i in range(4)]


def _plain(model: Any, ids: Sequence[int]) -> Tensor:
    """Return the logits (T, V) of one row, as the model itself computes it."""
    logits: Tensor = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
    return logits.float()


def _apart(ours: Tensor, plain: Tensor) -> float:
    return float((ours - plain).abs().max() / plain.std())


def _cache_difference(model: Any) -> float:
    """Two prompts, three branches: two ids at once (the controls), then one by one."""
    from transformers import DynamicCache

    long, short, branches = _texts()
    prompts, width = [long, short], len(long)
    ids = torch.zeros(2, width, dtype=torch.long)
    mask = torch.zeros(2, width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    cache = DynamicCache(config=model.config)

    def step(fed: Tensor, mask: Tensor) -> Tensor:
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -fed.shape[1] :]
        output = model(
            input_ids=fed, attention_mask=mask, position_ids=positions, past_key_values=cache,
            use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        logits: Tensor = output.logits[:, -1].float()
        return logits

    ours = [step(ids, mask)]
    cache.batch_select_indices(torch.tensor([1, 0, 1]))  # rows are repeated, and change places
    order, mask = [1, 0, 1], mask[[1, 0, 1]]
    texts = torch.tensor(branches[:3])
    for start, end in ((0, 2), *((i, i + 1) for i in range(2, texts.shape[1]))):
        mask = torch.cat([mask, mask.new_ones(3, end - start)], dim=1)
        ours.append(step(texts[:, start:end], mask))
    worst = max(_apart(ours[0][i], _plain(model, prompts[i])[-1]) for i in range(2))
    for row, source in enumerate(order):
        plain = _plain(model, [*prompts[source], *branches[row]])[len(prompts[source]) + 1 :]
        found = torch.stack([logits[row] for logits in ours[1:]])
        worst = max(worst, _apart(found, plain))
    return worst


def _branch_difference(model: Any) -> float:
    """Two prompts of two lengths, two branches behind each, in one forward."""
    long, short, branches = _texts()
    prompts, width, n = [long, short], len(long), len(branches[0])
    total = width + 2 * n
    ids = torch.zeros(2, total, dtype=torch.long)
    positions = torch.zeros(2, total, dtype=torch.long)
    owners = torch.full((2, total), -1)
    for row, prompt in enumerate(prompts):
        start = width - len(prompt)
        ids[row, start:width] = torch.tensor(prompt)
        positions[row, start:width] = torch.arange(len(prompt))
        owners[row, start:width] = 0
        for number in range(2):
            at = width + number * n
            ids[row, at : at + n] = torch.tensor(branches[2 * row + number])
            positions[row, at : at + n] = len(prompt) + torch.arange(n)
            owners[row, at : at + n] = number + 1
    logits = model(**branch_inputs(model, ids, positions, owners), use_cache=False).logits.float()
    worst = 0.0
    for row, prompt in enumerate(prompts):
        for number in range(2):
            at = width + number * n
            plain = _plain(model, [*prompt, *branches[2 * row + number]])[len(prompt) :]
            worst = max(worst, _apart(logits[row, at : at + n], plain))
    return worst
