"""The content log: prompts and completions, only if the operator switches it on."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from equipoise.errors import ConfigError

if TYPE_CHECKING:
    from equipoise.serve.chat import Job
    from equipoise.serve.wire import Choice


class ContentLog:
    """Appends one JSON line per answer to a file that only its owner reads.

    Args:
        path: The file; made with mode 600 if it is not there.

    Raises:
        ConfigError: It cannot be opened, or others may read it.
    """

    def __init__(self, path: Path) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
        try:
            self._descriptor = os.open(path, flags, 0o600)
        except OSError as error:
            raise ConfigError(
                f"the content log {path} cannot be opened",
                why=error.strerror or type(error).__name__,
                fix="name a file in a folder that this user may write to",
            ) from error
        mode = os.fstat(self._descriptor).st_mode
        if mode & 0o077:
            os.close(self._descriptor)
            raise ConfigError(
                f"the content log {path} can be read by others",
                why=f"its mode is {mode & 0o777:o}, and it holds what users write",
                fix=f"chmod 600 {path}",
            )

    def write(self, job: Job, choices: Sequence[Choice]) -> None:
        """Append one answer."""
        row = {
            "id": job.envelope.id,
            "created": job.envelope.created,
            "key": job.key_id,
            **job.envelope.applied.fields(),
            "messages": [{"role": m.role, "content": m.content} for m in job.messages],
            "completions": [choice.text for choice in choices],
        }
        os.write(self._descriptor, json.dumps(row).encode("ascii") + b"\n")

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)
