"""API keys: 256 random bits, shown once, kept as a SHA-256 in a file that only its owner reads.

A plain hash is enough because the secret is random: nothing about it can be guessed faster than by
trying 2^256 keys. It is compared in constant time with every stored hash.
"""

from __future__ import annotations

import fcntl
import hashlib
import hmac
import json
import os
import secrets
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError, model_validator

from equipoise.config import Config
from equipoise.errors import ConfigError
from equipoise.policy.file import validation_fault
from equipoise.policy.rules import Key

PREFIX = "eqp-"
"""Lets secret scanners find a key that was published by mistake."""
VARIABLE = "EQUIPOISE_KEYS"
_MAX_SECRET = 512


class KeyFile(Config):
    """What the keys file holds."""

    version: Literal[1] = 1
    keys: Annotated[tuple[Key, ...], Field(max_length=10_000)] = ()

    @model_validator(mode="after")
    def _distinct(self) -> KeyFile:
        if len({key.id for key in self.keys}) != len(self.keys):
            raise ValueError("two keys have the same id")
        return self


def new_secret() -> str:
    """Return a fresh key as the client sends it."""
    return PREFIX + secrets.token_urlsafe(32)


def digest(secret: str) -> str:
    """Return what is stored of a key."""
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).hexdigest()


def find(keys: Sequence[Key], secret: str) -> Key | None:
    """Return the key that a client has shown, or ``None``; takes as long wherever it stands."""
    shown = digest(secret[:_MAX_SECRET])
    found = None
    for key in keys:
        if hmac.compare_digest(key.sha256, shown):
            found = key
    return None if found is None or found.revoked or len(secret) > _MAX_SECRET else found


def parse_keys(data: bytes) -> tuple[Key, ...]:
    """Return the keys of a keys file.

    Raises:
        ConfigError: The bytes are no usable keys file; they are not quoted.
    """
    try:
        return KeyFile.model_validate_json(data).keys
    except ValidationError as error:
        faults = [validation_fault(item) for item in error.errors(include_url=False)]
        raise ConfigError(
            "the keys file cannot be used",
            why="; ".join(faults[:5]),
            fix="restore it, or make new keys: `equipoise keys new`",
        ) from None


def read_keys(path: Path) -> tuple[Key, ...]:
    """Read a keys file.

    Raises:
        ConfigError: It is missing, unreadable, damaged, or others than its owner may read it.
    """
    try:
        mode = path.stat().st_mode
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"no keys file at {path}",
            why=error.strerror or type(error).__name__,
            fix="make one: `equipoise keys new NAME --keys FILE`",
        ) from error
    if mode & 0o077:
        raise ConfigError(
            f"{path} can be read or written by others",
            why=f"its mode is {mode & 0o777:o}; who can write it can make keys",
            fix=f"chmod 600 {path}",
        )
    return parse_keys(data)


def environment_keys() -> tuple[Key, ...]:
    """Return the keys in the variable ``EQUIPOISE_KEYS``: the text of a keys file, so only hashes.

    Raises:
        ConfigError: It is set, and its text is no usable keys file or holds no keys.
    """
    text = os.environ.get(VARIABLE)
    if text is None:
        return ()
    found = parse_keys(text.encode("utf-8", "surrogateescape"))
    if not found:
        raise ConfigError(
            f"{VARIABLE} holds no keys",
            why="nobody could use the server",
            fix=f"set it to the text of a keys file, or unset it: `unset {VARIABLE}`",
        )
    return found


def add_key(path: Path, key: Key) -> None:
    """Add a key to the file, which is made if it is not there."""
    with _exclusive(path):
        keys = read_keys(path) if path.exists() else ()
        _write(path, KeyFile(keys=(*keys, key)))


def revoke_key(path: Path, key_id: str) -> Key:
    """Mark a key as revoked and return it; a running server refuses it from its next request on.

    Raises:
        ConfigError: No key has this id.
    """
    with _exclusive(path):
        keys = read_keys(path)
        if key_id not in {key.id for key in keys}:
            raise ConfigError(
                f"no key has the id {key_id}",
                why=f"{path} holds {len(keys)} keys",
                fix="`equipoise keys list` prints their ids",
            )
        changed = tuple(
            key.model_copy(update={"revoked": True}) if key.id == key_id else key for key in keys
        )
        _write(path, KeyFile(keys=changed))
    return next(key for key in changed if key.id == key_id)


@contextmanager
def _exclusive(path: Path) -> Iterator[None]:
    # A lock file of its own: the keys file is replaced, and with it any lock on it.
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path.with_name(f".{path.name}.lock"), os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _write(path: Path, content: KeyFile) -> None:
    data = json.dumps(content.model_dump(mode="json"), indent=1).encode() + b"\n"
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
