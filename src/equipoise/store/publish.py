"""Crash-safe publishing: a file or directory is there whole, with its hash known, or not at all.

Every byte that a run keeps goes through :func:`publish_bytes` or :func:`publish_directory`: written
under a temporary name, flushed to the disk, renamed, and the folder flushed. A kill at any point
leaves either the old state or the new one, beside temporary names that :func:`remove_orphans`
deletes (docs/runs.md).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from equipoise.errors import RunError

TEMPORARY = ".tmp-"
"""Prefix of every temporary name; such names are never read."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def sha256_bytes(data: bytes) -> str:
    """Return the SHA-256 of the bytes, in hex."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sync_directory(path: Path) -> None:
    """Flush a folder, so that a rename in it survives a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def publish_bytes(path: Path, data: bytes) -> str:
    """Publish one file and return its SHA-256.

    Raises:
        OSError: The disk is full or failing; nothing is published and no temporary file stays.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    try:
        _write_all(temporary, data)
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    sync_directory(path.parent)
    return sha256_bytes(data)


def publish_directory(path: Path, build: Callable[[Path], object]) -> dict[str, str]:
    """Publish a folder that ``build`` fills, replacing an older one.

    Args:
        path: Final place of the folder.
        build: Called with an empty folder to write into.

    Returns:
        Relative file name to SHA-256.

    Raises:
        OSError: The disk is full or failing; the folder is not published.
    """
    temporary = path.with_name(f"{TEMPORARY}{path.name}")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        build(temporary)
        hashes = hash_directory(temporary)
        for name in hashes:
            _sync_file(temporary / name)
        for folder in sorted({(temporary / name).parent for name in hashes} | {temporary}):
            sync_directory(folder)
        if path.exists():
            # A folder cannot be replaced in one step: without the old one the stage is merely
            # incomplete, which a new run repairs.
            shutil.rmtree(path)
        temporary.replace(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_directory(path.parent)
    return hashes


def hash_directory(path: Path) -> dict[str, str]:
    """Return relative POSIX file name to SHA-256 for all files below a folder, sorted."""
    files = sorted(item for item in path.rglob("*") if item.is_file())
    return {item.relative_to(path).as_posix(): sha256_file(item) for item in files}


def remove_orphans(root: Path) -> list[Path]:
    """Delete temporary files and folders that a killed process left below ``root``."""
    orphans = sorted(root.rglob(f"{TEMPORARY}*"))
    for orphan in orphans:
        if orphan.is_dir():
            shutil.rmtree(orphan, ignore_errors=True)
        else:
            orphan.unlink(missing_ok=True)
    return orphans


def json_bytes(value: Any) -> bytes:
    """Return plain data as readable JSON, keys in the order given."""
    return (json.dumps(value, indent=1, ensure_ascii=False) + "\n").encode()


def read_json(path: Path) -> Any:
    """Return the content of a JSON file.

    Raises:
        RunError: It is damaged.
        FileNotFoundError: It is not there.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(
            f"{path} is damaged", why=str(error), fix="delete that file and run again"
        ) from error


def read_json_or_none(path: Path) -> Any:
    """Return the content of a JSON file, or ``None`` if it is not there."""
    return read_json(path) if path.exists() else None


def is_full(error: BaseException) -> bool:
    """True if an error, or one that caused it, says that the disk (or quota) is full.

    safetensors and Arrow report the operating system's error as text only.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.errno in FULL:
            return True
        if "No space left on device" in str(cause) or "os error 28" in str(cause):
            return True
        cause = cause.__cause__ or cause.__context__
    return False


def _write_all(path: Path, data: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    try:
        view = memoryview(data)
        while view:
            # write() may take fewer bytes than given without an error (a nearly full disk).
            written = os.write(descriptor, view)
            if written <= 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
            view = view[written:]
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
