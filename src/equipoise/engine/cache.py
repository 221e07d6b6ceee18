"""The keys and values of rows that stand left-padded in one cache: begin, stack, keep.

Every layer keeps all positions, also a sliding one, so that rows can be laid side by side; the
model's own mask still makes a sliding layer look at its window only.

Prompts whose keys and values are kept, so that one that begins alike is not computed again.

A prefix is shared only under one salt, which the server derives from the key: how fast an answer
comes would otherwise tell one client what another has asked (CVE-2025-46570 in another server).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

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


State = TypeVar("State")

MIN_SHARED = 8
"""Shorter prefixes are not worth copying: every chat begins with the same few markers."""


@dataclass
class Counters:
    """What the cache has done so far."""

    lookups: int = 0
    hits: int = 0
    tokens_saved: int = 0


class PrefixCache(Generic[State]):
    """Least recently used prompts with what the model computed of them.

    Not safe for threads: the model's thread is its only user.

    Args:
        max_tokens: Prompt tokens kept over all entries; 0 switches the cache off.
    """

    def __init__(self, max_tokens: int) -> None:
        self.max_tokens = max_tokens
        self.tokens = 0
        """Tokens held now."""
        self.counters = Counters()
        self._entries: OrderedDict[tuple[str, tuple[int, ...]], State] = OrderedDict()
        self._arrays: dict[tuple[str, tuple[int, ...]], NDArray[np.int64]] = {}

    def match(self, salt: str, ids: tuple[int, ...]) -> tuple[int, State | None]:
        """Return the longest shared prefix: its length, and the state of the entry that has it.

        The state belongs to the whole entry; its first ``length`` positions are good for ``ids``.
        """
        if not self.max_tokens:
            return 0, None
        self.counters.lookups += 1
        length, key = self._longest(salt, ids)
        if key is None:
            return 0, None
        self._entries.move_to_end(key)
        self.counters.hits += 1
        self.counters.tokens_saved += length
        return length, self._entries[key]

    def shared(self, salt: str, ids: tuple[int, ...]) -> int:
        """Return how much of a prompt :meth:`match` would find, and count nothing."""
        return self._longest(salt, ids)[0]

    def put(self, salt: str, ids: tuple[int, ...], state: State) -> None:
        """Keep the state of a prompt; entries that it extends, and the oldest ones, make room."""
        if len(ids) > self.max_tokens or len(ids) < MIN_SHARED:
            return
        for key in [k for k in self._entries if k[0] == salt]:
            held = key[1]
            if held[: len(ids)] == ids:
                return  # an entry that is as long or longer holds it already
            if held == ids[: len(held)]:
                self._drop(key)
        while self.tokens + len(ids) > self.max_tokens:
            self._drop(next(iter(self._entries)))
        self._entries[salt, ids] = state
        self._arrays[salt, ids] = np.asarray(ids, np.int64)
        self.tokens += len(ids)

    def _longest(
        self, salt: str, ids: tuple[int, ...]
    ) -> tuple[int, tuple[str, tuple[int, ...]] | None]:
        wanted = np.asarray(ids, np.int64)
        best, found = 0, None
        for key, held in self._arrays.items():
            # Only an entry that agrees where the best so far ends can be better: most are not.
            if key[0] != salt or key[1][best : best + 1] != ids[best : best + 1]:
                continue
            if (length := _shared(held, wanted)) > best:
                best, found = length, key
        return (best, found) if best >= MIN_SHARED else (0, None)

    def _drop(self, key: tuple[str, tuple[int, ...]]) -> None:
        del self._entries[key], self._arrays[key]
        self.tokens -= len(key[1])


def _shared(first: NDArray[np.int64], second: NDArray[np.int64]) -> int:
    length = min(len(first), len(second))
    differ = first[:length] != second[:length]
    return int(differ.argmax()) if differ.any() else length
