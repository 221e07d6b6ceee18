"""Models of the hub: one commit of a repository in the local cache."""

from __future__ import annotations

from pathlib import Path

from equipoise.errors import ModelError

_WEIGHTS = "*.safetensors"
_WANTED = ("*.json", _WEIGHTS, "*.jinja", "tokenizer*", "vocab*", "merges.txt", "*.model")
_UNWANTED = tuple(f"*/{pattern}" for pattern in _WANTED if pattern != "*.jinja")
"""Folders hold the same model in other forms; chat templates may lie in one of their own."""


def folder_of(place: str, *, revision: str | None = None, weights: bool = True) -> Path:
    """Return the folder that a model lies in: a directory itself, or the snapshot of a hub id.

    Libraries are given folders only: from a hub id they would follow whatever else lies there.

    Args:
        place: Directory or hub id.
        revision: Of a hub id.
        weights: Whether those of a hub id are brought into the cache too.

    Raises:
        ModelError: See :func:`snapshot`.
    """
    folder = Path(place)
    return folder if folder.is_dir() else snapshot(place, revision=revision, weights=weights)


def is_snapshot(folder: Path) -> bool:
    """True for a folder of the hub's cache: what it says of other places was said by a stranger."""
    return folder.parent.name == "snapshots"


def snapshot(hub_id: str, *, revision: str | None = None, weights: bool = True) -> Path:
    """Return the folder of a commit, named by the commit; what the cache lacks is downloaded.

    Args:
        hub_id: ``owner/name``.
        revision: A commit, branch or tag; by default the newest commit, where the hub does not
            answer the one in the cache.
        weights: Whether the weights are wanted.

    Raises:
        ModelError: It is neither on the hub nor whole in the cache.
    """
    from huggingface_hub import snapshot_download

    try:
        # What is on the hub besides is not missed: asked without patterns, the library calls a
        # snapshot without it incomplete.
        found = snapshot_download(
            hub_id,
            revision=revision,
            allow_patterns=list(_WANTED),
            ignore_patterns=[*_UNWANTED, *([] if weights else [_WEIGHTS])],
        )
    except Exception as error:  # the client raises many kinds; none of them is ours
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        at = f" at revision {revision}" if revision is not None else ""
        raise ModelError(
            f"cannot load {hub_id}{at}",
            why=f"it is no local directory, and the model hub says: {reason}",
            fix="check the spelling and the network, or give the path of a model directory",
        ) from error
    return Path(found)
