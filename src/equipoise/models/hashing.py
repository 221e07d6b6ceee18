"""Hashes of files and model directories."""

from __future__ import annotations

import hashlib
from functools import lru_cache
from pathlib import Path

from equipoise.errors import ModelError

_HASHED = ("*.safetensors", "*config.json", "tokenizer*", "vocab*", "merges.txt", "*.model")
_HASHED_TOO = ("special_tokens_map.json", "added_tokens.json", "chat_template.jinja", "dials.json")


@lru_cache(maxsize=512)
def _file_hash(path: str, size: int, mtime_ns: int) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file; asked again for an unchanged file, it is not read again."""
    stat = path.stat()
    return _file_hash(str(path.resolve()), stat.st_size, stat.st_mtime_ns)


def model_hash(directory_or_hub_id: str) -> str:
    """SHA-256 over the sorted (file name, SHA-256) of config, weights and tokenizer files.

    Args:
        directory_or_hub_id: A model directory, or the id of a hub model that is in the local cache.

    Returns:
        64 hex digits; the same files give the same hash wherever they lie.

    Raises:
        ModelError: There are no such files.
    """
    directory = Path(directory_or_hub_id)
    if not directory.is_dir():
        from huggingface_hub import snapshot_download
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            directory = Path(snapshot_download(directory_or_hub_id, local_files_only=True))
        except (LocalEntryNotFoundError, HfHubHTTPError, ValueError) as error:
            raise cannot_load(directory_or_hub_id, error) from error
    patterns = (*_HASHED, *_HASHED_TOO)
    files = sorted({file for pattern in patterns for file in directory.glob(pattern)})
    if not files:
        raise ModelError(
            f"{directory_or_hub_id} is no model directory",
            why="It holds neither config.json nor safetensors.",
            fix="Give the folder that `save_pretrained` wrote.",
        )
    digest = hashlib.sha256()
    for file in files:
        digest.update(f"{file.name}\0{file_sha256(file)}\n".encode())
    return digest.hexdigest()


def cannot_load(name: str, error: Exception) -> ModelError:
    """The error for a model that the library could not load."""
    reason = str(error).strip().splitlines() or [type(error).__name__]
    return ModelError(
        f"Cannot load {name}",
        why=reason[0],
        fix="Check the name, the network if it is a hub id, and that the weights are safetensors.",
    )
