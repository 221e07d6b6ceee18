"""The keys and values of rows that stand left-padded in one cache: begin, stack, keep.

Every layer keeps all positions, also a sliding one, so that rows can be laid side by side; the
model's own mask still makes a sliding layer look at its window only. Tensors are never changed in
place, so a prefix may be shared by views.
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


def begin(held: KeysValues | None, length: int) -> DynamicCache:
    """Return a cache that starts with the first ``length`` positions of a kept prompt."""
    from transformers import DynamicCache

    cache = DynamicCache()
    if length:
        for number, (keys, values) in enumerate(held or ()):
            cache.update(keys[:, :, :length], values[:, :, :length], number)
    return cache


def head(cache: DynamicCache, length: int) -> KeysValues:
    """Return the first ``length`` positions of every layer."""
    return [(layer.keys[:, :, :length], layer.values[:, :, :length]) for layer in _layers(cache)]


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
