"""What rows keep between two tokens, and the prompts that are not computed again.

The keys and values of all rows stand left-padded in one cache. Every layer keeps all positions,
also a sliding one, so that rows can be laid side by side; the model's own mask still makes a
sliding layer look at its window only.

A prefix is shared only under one salt, which the server derives from the key: how fast an answer
comes would otherwise tell one client what another has asked (CVE-2025-46570 in another server).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import pad

if TYPE_CHECKING:
    from transformers import DynamicCache

Item = TypeVar("Item")
State = TypeVar("State")
KeysValues = list[tuple[torch.Tensor, torch.Tensor]]
"""Per layer, keys and values, each (R, heads, T, head width)."""


def keys_values(cache: Any) -> KeysValues:
    """Return the keys and values of every layer of a cache of ``transformers``."""
    return [(layer.keys, layer.values) for layer in _layers(cache)]


def _layers(cache: Any) -> list[Any]:
    layers: list[Any] = cache.layers
    return layers


def cache_of(layers: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> DynamicCache:
    """Return a cache of ``transformers`` that begins with these keys and values."""
    from transformers import DynamicCache

    cache = DynamicCache()
    for number, (keys, values) in enumerate(layers):
        cache.update(keys, values, number)
    return cache


def begin(held: Sequence[KeysValues | None], lengths: Sequence[int]) -> DynamicCache:
    """Return a cache whose rows start with kept prompts, padded on the left to the longest.

    Args:
        held: Per row the state of a kept prompt (one row each), or None.
        lengths: Per row how many of its positions to take; 0 where there is none.
    """
    width = max(lengths)
    taken = [(s, n) for s, n in zip(held, lengths, strict=True) if s is not None and n]
    pattern = taken[0][0] if width else []

    def rows(number: int, which: int) -> torch.Tensor:
        like = pattern[number][which]
        padded = like.new_zeros(len(held), like.shape[1], width, like.shape[3])  # (R, H, width, D)
        for row, (state, n) in enumerate(zip(held, lengths, strict=True)):
            if state is not None and n:
                padded[row, :, width - n :] = state[number][which][0, :, :n]
        return padded

    return cache_of((rows(number, 0), rows(number, 1)) for number in range(len(pattern)))


def cut(cache: DynamicCache, row: int, start: int, end: int) -> KeysValues:
    """Return some positions of one row of every layer, as tensors of their own."""
    span = (slice(row, row + 1), slice(None), slice(start, end))
    return [(keys[span].clone(), values[span].clone()) for keys, values in keys_values(cache)]


@dataclass
class Batch:
    """Rows side by side: what the model has computed of them, and what comes next."""

    cache: DynamicCache
    mask: torch.Tensor  # (R, T), 1 for a token; the padding is on the left
    logits: torch.Tensor | None  # (R, V), float32; None from a draw to the next step
    shift: torch.Tensor  # (R, D), what steering adds behind its layer; (R, 0) without steering

    def select(self, source: torch.Tensor, shift: torch.Tensor) -> Batch:
        """Return rows (N,) of these, as often as they are named; these stay as they are."""
        assert self.logits is not None, "what a step has computed is selected before it is drawn"
        cache: Any = copy(self.cache)
        cache.layers = [copy(layer) for layer in _layers(self.cache)]
        cache.batch_select_indices(source)  # keys and values (N, H, T, D), copied once
        return Batch(cache, self.mask[source], self.logits[source], shift)

    def stack(self, below: Batch) -> None:
        """Lay other rows below these, all padded on the left to one width."""
        assert self.logits is not None and below.logits is not None, "rows join before a draw"
        width = max(self.mask.shape[1], below.mask.shape[1])
        lead = [width - self.mask.shape[1], width - below.mask.shape[1]]
        self.mask = torch.cat([pad(self.mask, (lead[0], 0)), pad(below.mask, (lead[1], 0))])
        self.logits = torch.cat([self.logits, below.logits])
        self.shift = torch.cat([self.shift, below.shift])
        for layer, other in zip(_layers(self.cache), keys_values(below.cache), strict=True):
            layer.keys = _stacked([layer.keys, other[0]], lead)
            layer.values = _stacked([layer.values, other[1]], lead)

    def keep(self, kept: Sequence[int], rows: Sequence[Item]) -> list[Item]:
        """Keep some rows, in some order, and no column that none of them uses.

        Rows from the end take the places of those that leave: cheaper than copying all that stay.

        Returns:
            What belongs to the kept rows, in their new order.
        """
        n, device = len(kept), self.mask.device
        movers, places = [i for i in kept if i >= n], sorted({*range(n)} - {*kept})
        source, target = torch.tensor(movers, device=device), torch.tensor(places, device=device)

        def moved(tensor: torch.Tensor) -> torch.Tensor:
            if places:
                tensor[target] = tensor[source]
            return tensor[:n]

        self.mask, self.shift = moved(self.mask), moved(self.shift)
        lead = self.mask.shape[1] - int(self.mask.sum(1).max())
        self.mask = self.mask[:, lead:]
        self.logits = None if self.logits is None else moved(self.logits)
        for layer in _layers(self.cache):
            layer.keys = moved(layer.keys)[:, :, lead:]
            layer.values = moved(layer.values)[:, :, lead:]
        order = list(range(len(rows)))
        for place, mover in zip(places, movers, strict=True):
            order[place] = mover
        return [rows[i] for i in order[:n]]


def _stacked(parts: Sequence[torch.Tensor], lead: Sequence[int]) -> torch.Tensor:
    _, heads, n, width = parts[0].shape
    whole = parts[0].new_zeros(sum(map(len, parts)), heads, lead[0] + n, width)  # (R, H, T, D)
    at = 0
    for part, empty in zip(parts, lead, strict=True):
        whole[at : at + len(part), :, empty:] = part
        at += len(part)
    return whole


MIN_SHARED = 8
"""Shorter prefixes are not worth copying: every chat begins with the same few markers."""


@dataclass
class Counters:
    """What the cache has done so far."""

    lookups: int = 0
    hits: int = 0
    tokens_saved: int = 0


@dataclass
class PrefixCache(Generic[State]):
    """Least recently used prompts with what the model computed of them.

    Not safe for threads: the model's thread is its only user.
    """

    max_tokens: int
    """Prompt tokens kept over all entries; 0 switches the cache off."""
    tokens: int = 0
    """Tokens held now."""
    counters: Counters = field(default_factory=Counters)
    _entries: OrderedDict[tuple[str, tuple[int, ...]], tuple[NDArray[np.int64], State]] = field(
        default_factory=OrderedDict
    )

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
        return length, self._entries[key][1]

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
        self._entries[salt, ids] = np.asarray(ids, np.int64), state
        self.tokens += len(ids)

    def _longest(
        self, salt: str, ids: tuple[int, ...]
    ) -> tuple[int, tuple[str, tuple[int, ...]] | None]:
        wanted = np.asarray(ids, np.int64)
        best, found = 0, None
        for key, (held, _) in self._entries.items():
            # Only an entry that agrees where the best so far ends can be better: most are not.
            if key[0] != salt or key[1][best : best + 1] != ids[best : best + 1]:
                continue
            length = min(len(held), len(wanted))
            differ = held[:length] != wanted[:length]
            length = int(differ.argmax()) if differ.any() else length
            if length > best:
                best, found = length, key
        return (best, found) if best >= MIN_SHARED else (0, None)

    def _drop(self, key: tuple[str, tuple[int, ...]]) -> None:
        del self._entries[key]
        self.tokens -= len(key[1])
