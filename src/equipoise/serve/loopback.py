"""An application on a free loopback port of this process, to be measured through the door."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from equipoise.errors import ServingError
from equipoise.serve.connection import door_config

_START_SECONDS = 30.0


@contextmanager
def on_loopback(app: Any) -> Iterator[int]:
    """Run an application in a thread while the block runs; yields its port.

    Raises:
        ServingError: It does not start.
    """
    server = uvicorn.Server(door_config(app))
    thread = threading.Thread(target=server.run, name="equipoise-door", daemon=True)
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
