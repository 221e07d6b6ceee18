"""The keys and values of rows that stand left-padded in one cache: begin, stack, keep.

Every layer keeps all positions, also a sliding one, so that rows can be laid side by side; the
model's own mask still makes a sliding layer look at its window only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad

if TYPE_CHECKING:
    from transformers import DynamicCache

KeysValues = list[tuple[torch.Tensor, torch.Tensor]]
"""Per layer, each (R, heads, T, head width)."""


def begin(held: Sequence[KeysValues | None], lengths: Sequence[int]) -> DynamicCache:
    """Return a cache whose rows start with kept prompts, padded on the left to the longest.

    Args:
        held: Per row the state of a kept prompt (one row each), or None.
        lengths: Per row how many of its positions to take; 0 where there is none.
    """
    from transformers import DynamicCache

    cache, width = DynamicCache(), max(lengths)
    if not width:
        return cache
    pattern = next(state for state in held if state is not None)
    for number, kinds in enumerate(pattern):
        both = []
        for which, like in enumerate(kinds):
            rows = like.new_zeros(len(held), like.shape[1], width, like.shape[3])
            for row, (state, length) in enumerate(zip(held, lengths, strict=True)):
                if state is not None and length:
                    rows[row, :, width - length :] = state[number][which][0, :, :length]
            both.append(rows)
        cache.update(both[0], both[1], number)
    return cache


def cut(cache: DynamicCache, row: int, start: int, end: int) -> KeysValues:
    """Return some positions of one row of every layer, as tensors of their own."""
    return [
        (
            layer.keys[row : row + 1, :, start:end].clone(),
            layer.values[row : row + 1, :, start:end].clone(),
        )
        for layer in _layers(cache)
    ]


def stack(caches: Sequence[DynamicCache], lead: Sequence[int]) -> DynamicCache:
    """Lay the rows of several caches below each other, each behind ``lead`` empty positions."""
    merged = caches[0]
    for number, layer in enumerate(_layers(merged)):
        parts = [
            (_layers(cache)[number], (0, 0, n, 0)) for cache, n in zip(caches, lead, strict=True)
        ]
        layer.keys, layer.values = (
            torch.cat([pad(part.keys, room) for part, room in parts]),
            torch.cat([pad(part.values, room) for part, room in parts]),
        )
    return merged


def keep(cache: DynamicCache | None, rows: torch.Tensor, lead: int) -> None:
    """Keep some rows, and drop the first ``lead`` positions, which none of them uses."""
    for layer in _layers(cache):
        layer.keys = layer.keys[rows, :, lead:]
        layer.values = layer.values[rows, :, lead:]


def _layers(cache: Any) -> list[Any]:
    layers: list[Any] = cache.layers
    return layers
