"""A request on its way through the model's thread, and how items get back to its event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from equipoise.engine.draw import Row
from equipoise.engine.seam import Generation, Token
from equipoise.errors import ServingError

Item = Token | Exception


@dataclass(eq=False)
class Ticket:
    """One request; its reader lives on ``loop``."""

    generation: Generation
    loop: asyncio.AbstractEventLoop
    items: asyncio.Queue[Item] = field(default_factory=asyncio.Queue)
    cancelled: bool = False
    row: Row | None = None


def post(items: Sequence[tuple[Ticket, Item]]) -> None:
    """Hand items to their event loops, waking each loop once."""
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
