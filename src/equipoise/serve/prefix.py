"""Prompts whose keys and values are kept, so that one that begins alike is not computed again.

A prefix is shared only under one salt, which the server derives from the key: how fast an answer
comes would otherwise tell one client what another has asked (CVE-2025-46570 in another server).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

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
