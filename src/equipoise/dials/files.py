"""Which files of a model directory decide what the model does, and their hashes."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

_PATTERNS = (
    *("*.safetensors", "*.safetensors.index.json", "*config.json", "tokenizer*", "vocab*"),
    *("merges.txt", "*.model", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "additional_chat_templates/*.jinja", "dials.json"),
)


@lru_cache(maxsize=512)
def _file_hash(path: str, size: int, mtime_ns: int) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file; asked again for an unchanged file, it is not read again."""
    stat = path.stat()
    return _file_hash(str(path.resolve()), stat.st_size, stat.st_mtime_ns)


def file_hashes(directory: Path) -> dict[str, str]:
    """Return the name and SHA-256 of every file that decides what a model does, sorted by name.

    They are weights, configs, tokenizer files, chat templates and ``dials.json``. Nothing else in
    the folder is read (a README, say).
    """
    files = {file for pattern in _PATTERNS for file in directory.glob(pattern) if file.is_file()}
    return {
        file.relative_to(directory).as_posix(): file_sha256(file)
        for file in sorted(files, key=lambda file: (file.name, file))
    }
