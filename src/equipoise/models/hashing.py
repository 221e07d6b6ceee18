"""The hash of a model directory."""

from __future__ import annotations

import hashlib
from pathlib import Path

from equipoise.dials.files import file_hashes
from equipoise.errors import ModelError
from equipoise.models.read import cannot_load


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
