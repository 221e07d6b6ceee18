"""HTTP/1.1 with limits: connections, size of headers, and the time that they may take."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from equipoise.errors import ConfigError
from equipoise.serve.limits import MAX_HEADER_BYTES

HEADER_SECONDS = 10.0
_MAX_CONNECTIONS = 2048


@contextmanager
def listening(host: str, port: int) -> Iterator[list[socket.socket]]:
    """Listen on every address of a host while the block runs; yields the sockets.

    Raises:
        ConfigError: An address is taken, not this machine's, or not for this user.
    """
    with ExitStack() as opened:
        try:
            found = socket.getaddrinfo(
                host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
            sockets = [
                opened.enter_context(
                    socket.create_server(address, family=family, backlog=_MAX_CONNECTIONS)
                )
                for family, address in dict.fromkeys((item[0], item[4]) for item in found)
            ]
        except OSError as error:
            why = error.strerror or type(error).__name__
            raise ConfigError(
                f"cannot listen on {host or 'any address'}, port {port}",
                why=why.partition(" (while")[0],
                fix="end what listens there, or pass another --port or --host",
            ) from error
        yield sockets


class ImpatientH11(H11Protocol):
    """uvicorn's protocol, which alone would let a client send a header byte an hour.

    The clock runs from the connection, or from the first byte after an answer, until the headers
    are whole. Bodies have a limit of their own (:func:`equipoise.serve.limits.read_body`), and
    silent connections uvicorn's.
    """

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Start the clock."""
        super().connection_made(transport)
        self._start()

    def data_received(self, data: bytes) -> None:
        """Stop the clock once a request has begun."""
        if self.cycle is None or self.cycle.response_complete:
            self._start()
        before = self.cycle
        super().data_received(data)
        if self.cycle is not before:
            self._stop()

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the clock."""
        self._stop()
        super().connection_lost(exc)

    def shutdown(self) -> None:
        """Finish what has begun, but wait for no body: nothing has been done for it yet."""
        super().shutdown()
        if self.cycle is not None and self.cycle.more_body:
            self.transport.close()

    def _start(self) -> None:
        if self._late is None:
            self._late = self.loop.call_later(HEADER_SECONDS, self._hang_up)

    def _stop(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None

    def _hang_up(self) -> None:
        self._late = None
        if not self.transport.is_closing():
            self.transport.close()


def door_config(app: Any, *, drain_seconds: int | None = None) -> uvicorn.Config:
    """Return how uvicorn runs a door, in production and on loopback alike.

    The address is a free port of 127.0.0.1, unless the server is given sockets.

    Args:
        app: The application.
        drain_seconds: How long requests may take to finish at the end; no limit by default.
    """
    return uvicorn.Config(
        app,
        host="127.0.0.1",
        port=0,
        log_config=None,
        access_log=False,  # paths and queries are the client's text
        server_header=False,
        proxy_headers=False,
        ws="none",
        lifespan="on",
        limit_concurrency=_MAX_CONNECTIONS,
        h11_max_incomplete_event_size=MAX_HEADER_BYTES,
        http=ImpatientH11,
        timeout_graceful_shutdown=drain_seconds,
    )
