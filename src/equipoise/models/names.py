"""Model names of a recipe to directories or hub ids."""

from __future__ import annotations

import os
import re
from pathlib import Path

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
