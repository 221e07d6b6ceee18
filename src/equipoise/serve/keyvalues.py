"""The keys and values of rows that stand left-padded in one cache: begin, stack, keep.

Every layer keeps all positions, also a sliding one, so that rows can be laid side by side; the
model's own mask still makes a sliding layer look at its window only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING:
    from transformers import DynamicCache

Item = TypeVar("Item")
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
        parts = [_layers(cache)[number] for cache in caches]
        layer.keys = _stacked([part.keys for part in parts], lead)
        layer.values = _stacked([part.values for part in parts], lead)
    return merged


def _stacked(parts: Sequence[torch.Tensor], lead: Sequence[int]) -> torch.Tensor:
    _, heads, n, width = parts[0].shape
    whole = parts[0].new_zeros(sum(map(len, parts)), heads, lead[0] + n, width)
    at = 0
    for part, empty in zip(parts, lead, strict=True):
        whole[at : at + len(part), :, empty:] = part
        at += len(part)
    return whole


@dataclass(frozen=True)
class Move:
    """Rows from the end take the places of those that leave: cheaper than copying all that stay."""

    n: int
    """Rows that stay."""
    rows: tuple[int, ...]
    """Those of them that stand behind the first n."""
    places: tuple[int, ...]
    """Where they go."""

    @classmethod
    def keeping(cls, kept: Sequence[int]) -> Move:
        """Return the move after which the kept rows, in some order, are all there are."""
        n = len(kept)
        return cls(n, tuple(i for i in kept if i >= n), tuple(sorted({*range(n)} - {*kept})))

    def of_list(self, items: Sequence[Item]) -> list[Item]:
        """Return the items that stay, in their new order."""
        moved = list(items)
        for place, row in zip(self.places, self.rows, strict=True):
            moved[place] = moved[row]
        return moved[: self.n]

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the rows that stay; the tensor is overwritten."""
        if self.places:
            tensor[list(self.places)] = tensor[list(self.rows)]
        return tensor[: self.n]


def keep(cache: DynamicCache | None, move: Move, lead: int) -> None:
    """Keep some rows, and drop the first ``lead`` positions, which none of them uses."""
    for layer in _layers(cache):
        layer.keys = move.of(layer.keys)[:, :, lead:]
        layer.values = move.of(layer.values)[:, :, lead:]


def _layers(cache: Any) -> list[Any]:
    layers: list[Any] = cache.layers
    return layers
