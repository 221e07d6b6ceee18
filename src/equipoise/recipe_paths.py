"""Relative paths of a recipe: from the recipe's own folder, then from the working directory.

They are settled once, when the recipe is read, so that ``recipe.json`` of a run means the same from
everywhere. Sources keep the names they were given, as draws and reports depend on them: it is the
folder ``data`` that is settled for them.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from equipoise.config import Recipe
from equipoise.recipe_check import Place

_MODEL_KEYS = ("model", "backbone")


def settled_paths(recipe: Recipe, folder: Path | None, typed: Sequence[Place] = ()) -> Recipe:
    """Return the recipe with absolute folders in place of relative ones.

    Args:
        recipe: As it was written.
        folder: Of the recipe's file; ``None`` for one without a place of its own (a shipped one).
        typed: Places whose values were typed at the command line: these are relative to the working
            directory alone.
    """

    def folders(place: Place) -> list[Path]:
        given = any(place[: len(one)] == one for one in typed)
        return [Path.cwd()] if given or folder is None else [folder.resolve(), Path.cwd()]

    plain = map_models(recipe.model_dump(), lambda place, name: _model(name, folders(place)))
    if recipe.data is not None:
        plain["data"] = str(_first(recipe.data, folders(("data",))))
    else:
        sources = [(place, name) for place, name in _sources(plain) if _is_relative(name)]
        # One folder serves all sources: the first that holds one of them.
        found = (one for place, name in sources for one in folders(place) if (one / name).is_file())
        plain["data"] = next((str(one) for one in found), None)
    return Recipe.model_validate(plain)


def map_models(
    plain: dict[str, Any], change: Callable[[Place, str], str], place: Place = ()
) -> dict[str, Any]:
    """Return a plain recipe with every model name changed."""
    result: dict[str, Any] = {}
    for key, value in plain.items():
        inner = (*place, key)
        if isinstance(value, dict) and key != "where":  # `where` holds names of fields of rows
            result[key] = map_models(value, change, inner)
        elif key in _MODEL_KEYS and isinstance(value, str):
            result[key] = change(inner, value)
        else:
            result[key] = value
    return result


def _sources(value: Any, place: Place = ()) -> Iterator[tuple[Place, str]]:
    if isinstance(value, Mapping):
        if isinstance(value.get("source"), str):
            yield (*place, "source"), value["source"]
            return
        for key, inner in value.items():
            yield from _sources(inner, (*place, key))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            yield from _sources(inner, (*place, index))


def shown_model(name: str) -> str:
    """Return a model's name as a report may show it: where a folder lies is the user's affair."""
    return Path(name).name if Path(name).is_absolute() else name


def home(name: str) -> Path:
    """Return a path with ``~`` as the home directory; as it stands where nobody has that name."""
    try:
        return Path(name).expanduser()
    except RuntimeError:
        return Path(name)


def _is_relative(name: str) -> bool:
    return "://" not in name and not home(name).is_absolute()


def _first(name: str, folders: Sequence[Path]) -> Path:
    """Return the place of a folder that is there, else the first place where it could be."""
    places = [Path(os.path.normpath(folder / home(name))) for folder in folders]
    return next((place for place in places if place.is_dir()), places[0])


def _model(name: str, folders: Sequence[Path]) -> str:
    """Return a folder's absolute path; what is no folder here stays, as it may be a hub id."""
    if "://" in name:
        return name
    is_path = name.startswith((".", "~")) or Path(name).is_absolute()
    in_folder = "/" in name and any((folder / name).parent.is_dir() for folder in folders)
    place = _first(name, folders)
    return str(place) if is_path or in_folder or place.is_dir() else name
