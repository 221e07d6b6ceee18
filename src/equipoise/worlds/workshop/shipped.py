"""The models that ship with the package, as ordinary Hugging Face directories."""

from __future__ import annotations

import hashlib
from importlib.resources import files
from pathlib import Path

from equipoise.errors import ModelError

ASSETS = ("start", "rm_helpfulness", "rm_safety")


def asset(name: str) -> Path:
    """Return the directory of a packaged model: ``start``, ``rm_helpfulness`` or ``rm_safety``.

    Raises:
        ModelError: If there is no such model.
    """
    if name not in ASSETS:
        raise ModelError(
            f"The Workshop ships no model {name!r}",
            why=f"it has {', '.join(ASSETS)}",
            fix="use one of these, e.g. workshop://start",
        )
    return Path(str(files("equipoise.worlds.workshop") / "assets" / name))


def asset_hashes(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of the shipped models, by relative path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for name in ASSETS
        for path in sorted((folder / name).rglob("*"))
        if path.is_file()
    }
