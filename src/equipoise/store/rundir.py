"""A locked directory of stages: whole or absent files, and one process at a time.

    DIR/
    ├── .lock                   flock of the process at work: pid, host, start time
    └── STAGE/
        ├── started.json        fingerprint, written first
        ├── published.json      files published so far, with hashes and seconds
        ├── shard-00000.parquet ...
        ├── work/               scratch that survives a kill (checkpoints); deleted at the end
        └── stage.json          hashes of every output, minutes; written last

A stage is *complete* if its ``stage.json`` is there. Which stages there are, and what they depend
on, is none of the store's affairs: :mod:`equipoise.pipeline.rundir` knows.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from equipoise.errors import RunError
from equipoise.store.publish import TEMPORARY, is_full, json_bytes, publish_bytes, remove_orphans
from equipoise.store.stagefiles import RunFile, StageFiles

BROKEN = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ENOTDIR)
"""Errors of a disk or its rights, as opposed to mistakes in this program."""


class LockedDir:
    """A directory of stages.

    Args:
        path: Where it is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def held(self, *, mark: str, ours: Iterable[str]) -> Iterator[None]:
        """Hold the directory (made if missing) while the block runs.

        Args:
            mark: A file that says whose directory it is.
            ours: What may lie in a directory without it.

        Raises:
            RunError: Another process holds it, it is not ours, or the disk is full.
        """
        path = self.path
        if path.exists() and not path.is_dir():
            raise RunError(f"{path} is not a directory", why="a file is there", fix="name another")
        with self.writing():
            path.mkdir(parents=True, exist_ok=True)
            foreign = [
                item.name
                for item in path.iterdir()
                if not item.name.startswith((".lock", TEMPORARY))
            ]
        if foreign and not (path / mark).exists() and not set(foreign) <= {*ours}:
            raise RunError(
                f"{path} is not a run directory",
                why=f"it holds other files ({', '.join(sorted(foreign)[:3])}) and no {mark}",
                fix="name a new or empty directory with --dir",
            )
        with locked(path), self.writing():
            remove_orphans(path)
            yield

    @property
    def resume_command(self) -> str:
        """The command that goes on with this run."""
        return f"equipoise run {self.path}"

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turn a full or failing disk into a :class:`RunError` with the resume command."""
        try:
            yield
        except RunError:
            raise
        except Exception as error:
            if is_full(error):
                free = shutil.disk_usage(_existing(self.path)).free
                raise RunError(
                    f"no space left on the disk of {self.path}",
                    why=f"{free / 2**20:.1f} MiB are free ({error}); what was being written was "
                    "dropped, all that was published before is kept",
                    fix=f"free some space, then resume with: {self.resume_command}",
                ) from error
            if isinstance(error, OSError) and error.errno in BROKEN:
                raise RunError(
                    f"cannot write to {self.path}",
                    why=str(error),
                    fix=f"repair the disk or its rights, then resume with: {self.resume_command}",
                ) from error
            raise

    def write_json(self, name: str, value: Any) -> None:
        """Publish a small file of the directory itself."""
        with self.writing():
            publish_bytes(self.path / name, json_bytes(value))

    def is_done(self, name: str) -> bool:
        """True if the stage is complete."""
        return StageFiles(self.path / name).complete

    def has_begun(self, name: str) -> bool:
        """True if a stage holds anything that was made, be it a checkpoint."""
        made = (file for file in (self.path / name).rglob("*") if file.is_file())
        return any(file.name != RunFile.STARTED for file in made)

    def drop(self, names: Iterable[str]) -> None:
        """Delete stages."""
        for name in names:
            shutil.rmtree(self.path / name, ignore_errors=True)


def diff(old: Any, new: Any, path: str = "") -> list[str]:
    """Return one line ``dotted.path: old -> new`` per differing leaf."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        lines = [
            diff(
                old.get(key, "(absent)"), new.get(key, "(absent)"), f"{path}.{key}" if path else key
            )
            for key in keys
        ]
        return [line for group in lines for line in group]
    return [] if old == new else [f"{path}: {_short(old)} -> {_short(new)}"]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _existing(path: Path) -> Path:
    return next(item for item in (path, *path.absolute().parents) if item.exists())


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
