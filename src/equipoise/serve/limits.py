"""What the requests of a key, and of all keys, may cost: requests per minute, places under way."""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from equipoise.protocol.replies import RefusedError

if TYPE_CHECKING:
    from equipoise.policy.rules import Limits
    from equipoise.serve.prepare import CheckedChat

_MINUTE_NS = 60_000_000_000


class RateLimit:
    """Requests per minute and key, counted exactly: no minute, wherever it begins, holds more.

    Args:
        now_ns: Monotonic clock.
        max_keys: Keys whose requests are remembered; more come only of keys that are made and
            revoked.
    """

    def __init__(self, now_ns: Callable[[], int], *, max_keys: int = 100_000) -> None:
        self._now_ns, self._max_keys = now_ns, max_keys
        self._taken: dict[str, deque[int]] = {}
        """Key id to the moments of its requests within the last minute."""

    def __len__(self) -> int:
        """Return the number of keys that are remembered."""
        return len(self._taken)

    def take(self, key_id: str, per_minute: int) -> None:
        """Count one request; those that are refused do not count.

        Raises:
            RefusedError: 429 with ``Retry-After`` in whole seconds.
        """
        now = self._now_ns()
        if key_id not in self._taken and len(self._taken) >= self._max_keys:
            self._taken = {k: at for k, at in self._taken.items() if now - at[-1] < _MINUTE_NS}
        taken = self._taken.setdefault(key_id, deque())
        while taken and now - taken[0] >= _MINUTE_NS:
            taken.popleft()
        if len(taken) >= per_minute:
            seconds = math.ceil((taken[-per_minute] + _MINUTE_NS - now) / 1e9)
            message = f"this key may send {per_minute} requests per minute"
            raise _too_many(message, "rate_limit_exceeded", seconds)
        taken.append(now)


class Admission:
    """How much is under way: completions, their tokens, and each key's share."""

    def __init__(self) -> None:
        self.completions = 0
        self.tokens = 0
        self._of_key: Counter[str] = Counter()

    def check_room(
        self, key_id: str, limits: Limits, slots: int, completions: int = 1, tokens: int = 1
    ) -> None:
        """Refuse what does not fit; asked with the least before any work is done for a request.

        Args:
            key_id: Whose request it is.
            limits: The policy's.
            slots: Completions that the engine samples at once.
            completions: ``n``, or ``best_of``.
            tokens: Prompt and completion tokens they may take in all.

        Raises:
            RefusedError: 429.
        """
        if self._of_key[key_id] + completions > limits.per_key:
            raise _too_many("this key has too much under way", "key_busy", 1)
        too_many = self.completions + completions > slots + limits.waiting
        if too_many or self.tokens + tokens > limits.waiting_tokens:
            raise _too_many("the server is busy", "server_busy", 1)

    @contextmanager
    def admitted(self, chat: CheckedChat, slots: int) -> Iterator[None]:
        """Hold places for a chat while the block runs; see :meth:`check_room`."""
        completions, tokens = len(chat.generations), chat.tokens
        self.check_room(chat.key_id, chat.limits, slots, completions, tokens)
        self._add(chat.key_id, completions, tokens)
        try:
            yield
        finally:
            self._add(chat.key_id, -completions, -tokens)

    def _add(self, key_id: str, completions: int, tokens: int) -> None:
        self.completions += completions
        self.tokens += tokens
        self._of_key[key_id] += completions
        if not self._of_key[key_id]:
            del self._of_key[key_id]


def _too_many(message: str, code: str, seconds: int) -> RefusedError:
    return RefusedError(429, message, code=code, headers={"retry-after": str(seconds)})
