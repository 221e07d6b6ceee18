"""The hash of a model directory."""

from __future__ import annotations

import hashlib
from pathlib import Path

from equipoise.dials.files import file_hashes
from equipoise.errors import ModelError
from equipoise.models.hub import snapshot


def model_hash(directory_or_hub_id: str, *, revision: str | None = None) -> str:
    """SHA-256 over the sorted (file name, SHA-256) of config, weights and tokenizer files.

    Args:
        directory_or_hub_id: A model directory, or a hub id, whose files are brought into the cache.
        revision: Of a hub id; by default its newest commit.

    Returns:
        64 hex digits; the same files give the same hash wherever they lie.

    Raises:
        ModelError: There are no such files, or the hub does not give them.
    """
    directory = Path(directory_or_hub_id)
    if not directory.is_dir():
        directory = snapshot(directory_or_hub_id, revision=revision)
    hashes = file_hashes(directory)
    if not hashes:
        raise ModelError(
            f"{directory_or_hub_id} is no model directory",
            why="It holds neither config.json nor safetensors.",
            fix="Give the folder that `save_pretrained` wrote.",
        )
    digest = hashlib.sha256()
    for name, found in hashes.items():
        digest.update(f"{name}\0{found}\n".encode())
    return digest.hexdigest()
