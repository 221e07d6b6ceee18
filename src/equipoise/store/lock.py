"""One process per run directory."""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from equipoise.errors import RunError
from equipoise.store.stagefiles import RunFile


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold the directory's lock.

    Raises:
        RunError: Another process holds it; named by pid, host and start time.
    """
    # The lock belongs to the open descriptor: it dies with the process, so none is ever stale.
    descriptor = os.open(path / RunFile.LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise RunError(
                f"another process is at work in {path}",
                why=_holder(descriptor),
                fix="wait for it to end, stop it, or name another directory with --dir",
            ) from error
        started = time.strftime("%Y-%m-%d %H:%M:%S %z")
        note = {"pid": os.getpid(), "host": socket.gethostname(), "started": started}
        data = json.dumps(note).encode().ljust(256)
        os.pwrite(descriptor, data, 0)
        yield
    finally:
        os.close(descriptor)


def _holder(descriptor: int) -> str:
    try:
        note = json.loads(os.pread(descriptor, 256, 0))
        return f"pid {note['pid']} on {note['host']} holds it since {note['started']}"
    except (ValueError, KeyError, OSError):
        return "it is locked by a process that has just started"
