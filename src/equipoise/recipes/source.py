"""What a recipe's file says: its YAML as it looks, and its relative paths.

The YAML is the core schema of YAML 1.2, in which 010 is ten and ``yes`` is a word. PyYAML by
itself reads YAML 1.1: ``yes`` and ``on`` as true, 010 as 8, 12:30 as 750, 1e-4 as text.

Relative paths start from the recipe's own folder, then from the working directory. They are
settled once, when the recipe is read, so that ``recipe.json`` of a run means the same from
everywhere. Sources keep the names they were given, as draws and reports depend on them: it is the
folder ``data`` that is settled for them.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from equipoise.config import Recipe
from equipoise.recipes.check import Place


class _Loader(yaml.SafeLoader):
    def number(self, node: yaml.ScalarNode) -> int | float:
        text = str(self.construct_scalar(node)).lower()
        try:
            if node.tag.endswith(":int"):
                return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
            return float(text.replace(".inf", "inf").replace(".nan", "nan"))
        except ValueError as error:
            raise yaml.constructor.ConstructorError(
                None, None, "this is no number", node.start_mark
            ) from error


_TAG = "tag:yaml.org,2002:"
_PLAIN = {
    "null": ("~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": ("true|True|TRUE|false|False|FALSE", list("tTfF")),
    "int": ("[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    "float": (
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
    "merge": ("<<", ["<"]),
}
_Loader.yaml_implicit_resolvers = {}
for _kind, (_pattern, _leads) in _PLAIN.items():
    _Loader.add_implicit_resolver(f"{_TAG}{_kind}", re.compile(f"^(?:{_pattern})$"), _leads)
for _kind in ("int", "float"):
    _Loader.add_constructor(f"{_TAG}{_kind}", _Loader.number)


def parse(text: str) -> tuple[Any, yaml.Node | None]:
    """Return what a YAML text says, and its nodes, which know their lines.

    Raises:
        yaml.YAMLError: It is not YAML, or nothing that a recipe can hold.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, None
        _refuse_loops(node, set(), set())
        return loader.construct_document(node), node
    except RecursionError as error:
        raise yaml.YAMLError("it is nested too deeply") from error
    except (ValueError, LookupError, AttributeError) as error:
        # What a constructor does with a tag that does not fit its text, `!!bool maybe`.
        raise yaml.YAMLError(f"a value does not fit its tag ({error})") from error
    finally:
        loader.dispose()


def _refuse_loops(node: yaml.Node, above: set[int], seen: set[int]) -> None:
    if id(node) in above:
        raise yaml.constructor.ConstructorError(
            None, None, "an anchor holds itself", node.start_mark
        )
    if isinstance(node, yaml.ScalarNode) or id(node) in seen:
        return
    seen.add(id(node))
    pairs = node.value if isinstance(node, yaml.MappingNode) else [(item,) for item in node.value]
    for pair in pairs:
        for inner in pair:
            _refuse_loops(inner, above | {id(node)}, seen)


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
