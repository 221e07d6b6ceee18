"""Model names of a recipe to directories or hub ids, and these to folders and hashes.

Of a model of the hub the folder is one commit of its repository in the local cache.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from equipoise.dials.manifest import file_hashes
from equipoise.errors import ModelError

_HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def cache_root() -> Path:
    """Folder of fetched models: ``$EQUIPOISE_CACHE``, else ``~/.cache/equipoise``."""
    override = os.environ.get("EQUIPOISE_CACHE")
    return Path(override).expanduser() if override else Path.home() / ".cache" / "equipoise"


def resolve_model(name: str, *, fitted_root: Path | None = None) -> str:
    """Turn a model name of a recipe into a directory, or into a hub id.

    Args:
        name: An existing directory, ``workshop://NAME``, ``cache://NAME``, ``fitted://NAME`` or a
            hub id (``owner/name``).
        fitted_root: Folder of the reward models that this run has trained.

    Returns:
        The path of an existing directory, or the hub id unchanged.

    Raises:
        ModelError: The name stands for a directory that does not exist.
    """
    scheme, separator, rest = name.partition("://")
    if separator:
        return str(_resolve_scheme(name, scheme, rest, fitted_root))
    path = Path(name).expanduser()
    if (path / "recipe.json").is_file() and not (path / "config.json").is_file():
        raise _is_a_run(path)
    if path.is_dir():
        return str(path)
    looks_like_path = (
        path.is_absolute()
        or name.startswith((".", "~"))
        or not _HUB_ID.fullmatch(name)
        or ("/" in name and path.parent.is_dir())
    )
    if looks_like_path:
        raise ModelError(
            f"No model directory at {name}",
            why="The name is a path, and there is no folder at that place.",
            fix="Correct the path, or give a hub id such as HuggingFaceTB/SmolLM2-135M-Instruct.",
        )
    return name


def _is_a_run(path: Path) -> ModelError:
    tuned = path / "tune" / "model"
    first = "" if tuned.is_dir() else f"Run `equipoise run {path}` to its end. "
    return ModelError(
        f"{path} is a run directory, not a model",
        why="The tuned model of a run lies deeper in it.",
        fix=f"{first}Give {tuned}.",
    )


def _resolve_scheme(name: str, scheme: str, rest: str, fitted_root: Path | None) -> Path:
    if scheme == "workshop":
        from equipoise.worlds.workshop import asset

        return asset(rest)
    if scheme == "cache":
        root, fix = cache_root(), "Run `equipoise fetch smollm2` once."
    elif scheme == "fitted" and fitted_root is not None:
        root, fix = fitted_root, f"Add `fit_reward.{rest}` to the recipe, or run `fit-reward`."
    elif scheme == "fitted":
        raise ModelError(
            f"{name} cannot be resolved here",
            why="fitted:// names a reward model of a run, and no run directory was given.",
            fix="Give the directory of the fitted model instead of its fitted:// name.",
        )
    else:
        raise ModelError(
            f"Unknown kind of model name: {name}",
            why=f"{scheme}:// is none of workshop://, cache:// and fitted://.",
            fix="Use one of these, a directory, or a hub id.",
        )
    path = root / rest
    if not rest or not path.is_dir() or not path.resolve().is_relative_to(root.resolve()):
        raise ModelError(f"No model called {name}", why=f"There is no folder {path}.", fix=fix)
    return path


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
    hashes = file_hashes(folder_of(directory_or_hub_id, revision=revision))
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
