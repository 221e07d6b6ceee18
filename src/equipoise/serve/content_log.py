"""The content log: prompts and completions, only if the operator switches it on, and not for ever.

Two files take turns, so that nothing is rewritten: at half the greatest age ``FILE`` becomes
``FILE.old``, and ``FILE.old`` is deleted when the first row in it has reached that age.

The rotating handlers of :mod:`logging` cannot promise an age: they look at a file only when a row
is written, and after a restart they count from its last change, so that a server which starts anew
every day would keep its rows for ever.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from equipoise.errors import ConfigError

if TYPE_CHECKING:
    from equipoise.protocol.replies import Choice
    from equipoise.serve.prepare import CheckedChat

_log = logging.getLogger("equipoise.serve")

_DAY = 86_400.0
_BETWEEN_LOOKS = 3600.0
_MAX_ROW = 16 << 20


class ContentLog:
    """Appends one JSON line per answer to a file that only its owner reads.

    Args:
        path: The file; made with mode 600 if it is not there.
        days: Greatest age of a row.
        now: Clock, Unix seconds.

    Raises:
        ConfigError: It cannot be opened, others may read it, or it holds something else.
    """

    def __init__(self, path: Path, *, days: float, now: Callable[[], float] = time.time) -> None:
        self._path, self._age, self._now = path, days * _DAY, now
        self._descriptor = _opened(path)
        if self._age_of(path) is None:
            # Such a file must not be deleted when it is old.
            raise ConfigError(
                f"{path} is no content log",
                why="its first line is no row of one",
                fix="name another file",
            )
        self.expire()

    def write(self, chat: CheckedChat, choices: Sequence[Choice]) -> None:
        """Append one answer."""
        row = {
            "created": chat.envelope.created,
            "id": chat.envelope.id,
            "key": chat.key_id,
            **chat.envelope.applied(),
            "messages": [{"role": m.role, "content": m.content} for m in chat.messages],
            "completions": [choice.text for choice in choices],
        }
        size = os.fstat(self._descriptor).st_size
        left = json.dumps(row).encode("ascii") + b"\n"
        try:
            while left:  # a full disk takes a part
                left = left[os.write(self._descriptor, left) :]
        except OSError:
            os.ftruncate(self._descriptor, size)  # else the next row would join this part
            raise

    def expire(self) -> None:
        """Put the file aside, and delete the one put aside, where they are due."""
        old = self._path.with_name(f"{self._path.name}.old")
        if (self._age_of(old) or 0.0) >= self._age:
            old.unlink(missing_ok=True)
        if (self._age_of(self._path) or 0.0) >= self._age / 2:
            self._path.replace(old)
            fresh = _opened(self._path)
            os.close(self._descriptor)
            self._descriptor = fresh

    async def keep_young(self) -> None:
        """Call :meth:`expire` every hour until cancelled, also where nobody asks anything."""
        while True:
            await asyncio.sleep(_BETWEEN_LOOKS)
            try:
                self.expire()
            except (OSError, ConfigError) as error:
                _log.error("the content log could not be put aside: %s", type(error).__name__)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)

    def _age_of(self, path: Path) -> float | None:
        """Return the age of a file's first row in seconds; ``None`` if that is no row of ours."""
        try:
            with path.open("rb") as file:
                line = file.readline(_MAX_ROW)
            return self._now() - float(json.loads(line)["created"]) if line else 0.0
        except FileNotFoundError:
            return 0.0
        except (OSError, ValueError, KeyError, TypeError):
            return None


def _opened(path: Path) -> int:
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
    try:
        descriptor = os.open(path, flags, 0o600)
    except OSError as error:
        raise ConfigError(
            f"the content log {path} cannot be opened",
            why=error.strerror or type(error).__name__,
            fix="name a file in a folder that this user may write to",
        ) from error
    mode = os.fstat(descriptor).st_mode
    if mode & 0o077:
        os.close(descriptor)
        raise ConfigError(
            f"the content log {path} can be read by others",
            why=f"its mode is {mode & 0o777:o}, and it holds what users write",
            fix=f"chmod 600 {path}",
        )
    return descriptor
