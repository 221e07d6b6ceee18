"""Whether an architecture can be sampled and tuned here, tried on two random layers of it.

Two things are held against plain forwards of one row: decoding with a cache behind prompts padded
on the left, and reading several branches of a prompt at once. Nothing is taken on trust from names:
what gives other numbers is refused before its weights are read.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch

from equipoise.errors import EquipoiseError, ModelError
from equipoise.models.branches import branch_inputs, layer_windows
from equipoise.models.cut import VOCABULARY, cut_config, narrowest_model, refused

_TOLERANCE = 5e-3
"""Largest difference of a logit, in standard deviations of the logits: rounding gives 1e-6 (1e-4
where a model cannot be narrowed), a window that is one position too wide 1."""
_TRIED_BEFORE: dict[str, None] = {}


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
            try_architecture(small)
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


def try_architecture(config: Any) -> None:
    """Build a random model of a (small) config, and hold what we do with it against plain forwards.

    Raises:
        ModelError: It cannot be built, cached decoding or branches go wrong, or differ.
    """
    layer_windows(config)
    compare(narrowest_model(config))


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


def _plain(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """Return the logits (T, V) of one row, as the model itself computes it."""
    logits: torch.Tensor = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
    return logits.float()


def _apart(ours: torch.Tensor, plain: torch.Tensor) -> float:
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

    def step(fed: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -fed.shape[1] :]
        output = model(
            input_ids=fed, attention_mask=mask, position_ids=positions, past_key_values=cache,
            use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        logits: torch.Tensor = output.logits[:, -1].float()
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
