"""HTTP/1.1 by uvicorn: where it listens, its limits, how it starts and how it stops."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from equipoise.errors import ConfigError, ServingError
from equipoise.serve.gate import MAX_HEADER_BYTES

if TYPE_CHECKING:
    from starlette.types import ASGIApp

HEADER_SECONDS = 10.0
_MAX_CONNECTIONS = 2048
_START_SECONDS = 30.0


@contextmanager
def listening(host: str, port: int) -> Iterator[list[socket.socket]]:
    """Listen on every address of a host while the block runs; yields the sockets.

    Raises:
        ConfigError: An address is taken, not this machine's, or not for this user.
    """
    kind, any_ = socket.SOCK_STREAM, socket.AI_PASSIVE
    with ExitStack() as opened:
        try:
            found = socket.getaddrinfo(host or None, port, type=kind, flags=any_)
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

    No setting of uvicorn's bounds the time of headers, so this reads its ``cycle``. The clock runs
    from the connection, or from the first byte after an answer, until the headers are whole. Bodies
    have a limit of their own (:func:`equipoise.serve.gate.read_body`), and silent connections
    uvicorn's.
    """

    _late: asyncio.TimerHandle | None = None

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
            self._late = self.loop.call_later(HEADER_SECONDS, self.transport.close)

    def _stop(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


def server_config(app: Any, *, drain_seconds: int | None = None) -> uvicorn.Config:
    """Return how uvicorn runs an application, in production and on loopback alike.

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


def run_app(
    app: ASGIApp,
    *,
    sockets: list[socket.socket],
    drain_seconds: int,
    on_stop: Callable[[], None],
    on_reload: Callable[[], None],
) -> None:
    """Run an application on sockets that listen, until SIGTERM or Ctrl-C.

    Args:
        app: The application.
        sockets: See :func:`listening`.
        drain_seconds: How long requests may take to finish then; a second Ctrl-C does not wait.
        on_stop: Called when the signal comes.
        on_reload: Called at SIGHUP.
    """

    async def until_stopped() -> None:
        loop = asyncio.get_running_loop()
        # Beside uvicorn's own handlers, which it sets later and which make it drain. At its end it
        # raises the signal again; these take it, so that a server that has drained exits with 0.
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, on_stop)
        loop.add_signal_handler(signal.SIGHUP, on_reload)
        await uvicorn.Server(server_config(app, drain_seconds=drain_seconds)).serve(sockets)

    asyncio.run(until_stopped())


@contextmanager
def on_loopback(app: ASGIApp) -> Iterator[int]:
    """Run an application in a thread of this process while the block runs; yields its port.

    Raises:
        ServingError: It does not start.
    """
    server = uvicorn.Server(server_config(app))
    thread = threading.Thread(target=server.run, name="equipoise-server", daemon=True)
    thread.start()
    deadline = time.monotonic() + _START_SECONDS
    while not server.started:
        if not thread.is_alive() or time.monotonic() > deadline:
            raise ServingError(
                "the server did not start",
                why="its thread ended or took too long",
                fix="run again with --debug and report what it prints",
            )
        time.sleep(0.01)
    try:
        yield server.servers[0].sockets[0].getsockname()[1]
    finally:
        server.should_exit = True
        thread.join()
