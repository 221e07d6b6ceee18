"""What a client may cost: bytes, headers, time, requests per minute, places in the queue."""

from __future__ import annotations

import asyncio
import math
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from equipoise.protocol.failures import RefusedError

if TYPE_CHECKING:
    from starlette.types import Message, Receive, Scope

    from equipoise.policy.decide import Limits

MAX_BODY_BYTES = 1 << 20
MAX_HEADER_BYTES = 32 << 10
BODY_SECONDS = 30.0
_MINUTE_NS = 60_000_000_000
_MAX_RATED = 100_000
"""Keys whose requests are remembered; more come only of keys that are made and revoked."""


def check_headers(scope: Scope) -> None:
    """Refuse headers above 32 KiB in all (431) and request bodies that are packed (415)."""
    size = sum(len(name) + len(value) + 4 for name, value in scope["headers"])
    size += len(scope.get("raw_path") or b"") + len(scope["query_string"])
    if size > MAX_HEADER_BYTES:
        raise RefusedError(
            431, f"the headers hold more than {MAX_HEADER_BYTES} bytes", code="headers_too_large"
        )
    packed = [value for name, value in scope["headers"] if name == b"content-encoding"]
    if any(value.strip().lower() not in (b"", b"identity") for value in packed):
        raise RefusedError(
            415, "packed request bodies are not taken; send plain JSON", code="packed_body"
        )


async def read_body(
    receive: Receive, *, limit: int = MAX_BODY_BYTES, seconds: float = BODY_SECONDS
) -> bytes | None:
    """Return the request's body, counted while it is read; ``None`` if the client left.

    Raises:
        RefusedError: 413 at the first byte too many, 408 if it takes too long.
    """
    parts, size = [], 0
    try:
        async with asyncio.timeout(seconds):
            while True:
                message: Message = await receive()
                if message["type"] == "http.disconnect":
                    return None
                part = message.get("body", b"")
                size += len(part)
                if size > limit:
                    raise RefusedError(
                        413,
                        f"the body holds more than {limit} bytes",
                        code="body_too_large",
                        headers={"connection": "close"},
                    )
                parts.append(part)
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError:
        raise RefusedError(
            408, "the body took too long", code="body_timeout", headers={"connection": "close"}
        ) from None


class RateLimit:
    """Requests per minute and key, counted exactly: no minute, wherever it begins, holds more.

    Args:
        now_ns: Monotonic clock.
    """

    def __init__(self, now_ns: Callable[[], int]) -> None:
        self._now_ns = now_ns
        self._taken: dict[str, deque[int]] = {}
        """Key id to the moments of its requests within the last minute."""

    def take(self, key_id: str, per_minute: int) -> None:
        """Count one request; those that are refused do not count.

        Raises:
            RefusedError: 429 with ``Retry-After`` in whole seconds.
        """
        now = self._now_ns()
        if key_id not in self._taken and len(self._taken) >= _MAX_RATED:
            self._taken = {k: at for k, at in self._taken.items() if now - at[-1] < _MINUTE_NS}
        taken = self._taken.setdefault(key_id, deque())
        while taken and now - taken[0] >= _MINUTE_NS:
            taken.popleft()
        if len(taken) >= per_minute:
            wait = taken[-per_minute] + _MINUTE_NS - now
            raise RefusedError(
                429,
                f"this key may send {per_minute} requests per minute",
                code="rate_limit_exceeded",
                headers={"retry-after": str(math.ceil(wait / 1e9))},
            )
        taken.append(now)


class Admission:
    """How much is under way: completions, their tokens, and each key's share."""

    def __init__(self) -> None:
        self.completions = 0
        self.tokens = 0
        self._of_key: Counter[str] = Counter()

    def check_room(
        self, key_id: str, *, slots: int, limits: Limits, completions: int = 1, tokens: int = 1
    ) -> None:
        """Refuse what does not fit; asked with the least before any work is done for a request.

        Args:
            key_id: Whose request it is.
            slots: Completions that the engine samples at once.
            limits: The policy's.
            completions: ``n``, or ``best_of``.
            tokens: Prompt and completion tokens they may take in all.

        Raises:
            RefusedError: 429.
        """
        if self._of_key.get(key_id, 0) + completions > limits.per_key:
            raise _busy("this key has too much under way", "key_busy")
        too_many = self.completions + completions > slots + limits.waiting
        if too_many or self.tokens + tokens > limits.waiting_tokens:
            raise _busy("the server is busy", "server_busy")

    @contextmanager
    def admitted(
        self, key_id: str, completions: int, tokens: int, *, slots: int, limits: Limits
    ) -> Iterator[None]:
        """Hold places for a request's completions while the block runs; see :meth:`check_room`."""
        self.check_room(key_id, slots=slots, limits=limits, completions=completions, tokens=tokens)
        self.completions += completions
        self.tokens += tokens
        self._of_key[key_id] += completions
        try:
            yield
        finally:
            self.completions -= completions
            self.tokens -= tokens
            self._of_key[key_id] -= completions
            if not self._of_key[key_id]:
                del self._of_key[key_id]


def _busy(message: str, code: str) -> RefusedError:
    return RefusedError(429, message, code=code, headers={"retry-after": "1"})
