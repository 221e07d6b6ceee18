"""The requests on their way through the model's thread: who waits, who runs, who is next."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from equipoise.engine.draw import Row
from equipoise.engine.seam import Generation, Load, Token
from equipoise.errors import ServingError

Item = Token | Exception

_PREFILL_TOKENS = 512
"""Prompt tokens that may be computed between two steps: the rows in flight wait meanwhile."""
_GATHERED, _MAX_WAITED = 8, 4
"""Newcomers join once 1/8 of the slots is free, or after 4 steps: a join costs about a step,
whether one row joins or four."""


@dataclass(eq=False)
class Ticket:
    """One request; its reader lives on ``loop``."""

    generation: Generation
    loop: asyncio.AbstractEventLoop
    items: asyncio.Queue[Item] = field(default_factory=asyncio.Queue)
    cancelled: bool = False
    row: Row | None = None


class Line:
    """Tickets in line and tickets in slots; ``changed`` guards both and tells of any change."""

    def __init__(self, slots: int) -> None:
        self.changed = threading.Condition()
        self.waiting: deque[Ticket] = deque()
        self.running: list[Ticket] = []
        self._slots = slots
        self._waited = 0
        """Steps since rows joined."""

    def load(self) -> Load:
        """Return rows in flight, requests in line, and slots."""
        with self.changed:
            return Load(len(self.running), len(self.waiting), self._slots)

    def is_read(self) -> bool:
        """Whether anybody still waits for an answer."""
        with self.changed:
            return bool(self.waiting) or any(not ticket.cancelled for ticket in self.running)

    def cancel(self, ticket: Ticket) -> None:
        """Nobody reads this ticket any more."""
        with self.changed:
            ticket.cancelled = True
            if ticket in self.waiting:
                self.waiting.remove(ticket)
            self.changed.notify()

    def turn(self) -> tuple[list[Ticket], list[Ticket]]:
        """Begin a step; return who has left the slots, as nobody reads on, and who enters them."""
        with self.changed:
            gone = [ticket for ticket in self.running if ticket.cancelled]
            self.running = [ticket for ticket in self.running if not ticket.cancelled]
            newcomers: list[Ticket] = []
            free = self._slots - len(self.running)
            self._waited += 1
            due = free * _GATHERED >= self._slots or self._waited >= _MAX_WAITED
            budget = _PREFILL_TOKENS if due else 0
            while self.waiting and len(self.running) < self._slots and budget > 0:
                ticket = self._nearest_turn()
                self.waiting.remove(ticket)
                budget -= len(ticket.generation.prompt_ids)
                newcomers.append(ticket)
                self.running.append(ticket)
                self._waited = 0
            return gone, newcomers

    def _nearest_turn(self) -> Ticket:
        """Return who joins next: the key with the fewest rows, and of its requests the oldest."""
        rows = Counter(ticket.generation.prefix_salt for ticket in self.running)
        return min(self.waiting, key=lambda ticket: rows[ticket.generation.prefix_salt])

    def deliver(self, items: Sequence[tuple[Ticket, Item]]) -> None:
        """Hand items to their readers, waking each loop once; a last one frees the slot."""
        with self.changed:
            done = {t for t, item in items if isinstance(item, Exception) or item.finish}
            self.running = [ticket for ticket in self.running if ticket not in done]
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Ticket, Item]]] = {}
        for ticket, item in items:
            by_loop.setdefault(ticket.loop, []).append((ticket, item))
        for loop, batch in by_loop.items():
            with suppress(RuntimeError):  # the loop has been closed, and with it the reader
                loop.call_soon_threadsafe(_put, batch)


def _put(batch: list[tuple[Ticket, Item]]) -> None:
    for ticket, item in batch:
        ticket.items.put_nowait(item)


def stopped() -> ServingError:
    """The error for a request that the engine does not take."""
    return ServingError(
        "the engine takes no more requests",
        why="it is stopping, was not started, or its model's thread has died",
        fix="ask again later; if it stays so, restart the server and read its log",
    )


def step_failed(error: Exception) -> ServingError:
    """The error for a row that the library could not compute."""
    found = ServingError(
        "the model could not compute a step of this completion",
        why=f"the library raised {type(error).__name__}",
        fix="ask again; if it stays so, read the server's log",
    )
    found.__cause__ = error
    return found
