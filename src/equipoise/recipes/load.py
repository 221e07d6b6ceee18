"""YAML -> Recipe: all errors at once, each with file and line, a wrong name with the nearest.

Overrides (``--set tune.objective=exmate``) are laid over the file before it is checked, so they go
through the same checks; their errors name the flag instead of a line.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from equipoise.config import Recipe
from equipoise.errors import ConfigError
from equipoise.recipes.check import Place, contradictions, explain, nearest
from equipoise.recipes.source import parse, settled_paths


def shipped() -> dict[str, Path]:
    """Return the shipped recipes: name to file, sorted by name."""
    folder = Path(str(resources.files("equipoise") / "recipes"))
    return {file.stem: file for file in sorted(folder.glob("*.yaml"))}


def describe_shipped() -> dict[str, str]:
    """Return name to one-line description of the shipped recipes."""
    return {name: str(parse(file.read_text("utf-8"))[0]["description"]).strip()
            for name, file in shipped().items()}  # fmt: skip


def find_recipe(name: str) -> Path:
    """Return the file of a shipped recipe, or of a path.

    Raises:
        ConfigError: There is no such file; names the nearest shipped recipe.
    """
    known = shipped()
    if name in known:
        return known[name]
    if Path(name).is_file():
        return Path(name)
    raise ConfigError(
        f"no recipe {name!r}",
        why=f"it is neither a file nor a shipped recipe ({', '.join(known)})",
        fix=nearest(name, known) or "`equipoise recipes` lists the shipped ones",
    )


def load_recipe(name: str, *, overrides: Sequence[str] = (), data: str | None = None) -> Recipe:
    """Read, override and check a recipe.

    Args:
        name: A shipped recipe's name or a path to a YAML file.
        overrides: ``dotted.path=value`` items; the value is YAML.
        data: Folder of relative data sources; overrides the recipe's ``data``.

    Raises:
        ConfigError: Lists all errors, each with ``file:line`` (or the flag) and the nearest name.
    """
    file = find_recipe(name)
    plain, lines = _read(file)
    folder = None if name in shipped() else file.parent
    return build_recipe(
        plain, lines=lines, file=str(file), overrides=overrides, data=data, folder=folder
    )


def build_recipe(
    plain: dict[str, Any],
    *,
    lines: Mapping[Place, int],
    file: str,
    overrides: Sequence[str] = (),
    data: str | None = None,
    folder: Path | None = None,
) -> Recipe:
    """Lay overrides over plain data and check the result; see :func:`load_recipe`.

    Args:
        plain: The recipe as YAML or JSON gave it.
        lines: Place to line number, where known.
        file: Name to print in errors.
        overrides: As in :func:`load_recipe`.
        data: As in :func:`load_recipe`.
        folder: In which relative paths of the plain data are looked up before the working
            directory; paths of overrides are relative to the latter.
    """
    flags: dict[Place, str] = {}
    for item in overrides:
        place = _apply(plain, item)
        flags[place] = f"--set {item}"
    if data is not None:
        plain["data"], flags[("data",)] = data, f"--data {data}"
    try:
        recipe = Recipe.model_validate(plain)
        problems = contradictions(recipe)
    except ValidationError as error:
        problems = [(item["loc"], explain(item)) for item in error.errors()]
    if not problems:
        return settled_paths(recipe, folder, list(flags))
    texts = [f"{_where(place, lines, flags, file)}: {text}" for place, text in problems]
    raise ConfigError(
        f"{len(texts)} error{'s' if len(texts) > 1 else ''} in recipe {file}",
        why="\n".join(["the values below cannot be used", *(f"    {text}" for text in texts)]),
        fix="correct these lines (or flags); `equipoise recipes workshop` prints a complete recipe",
    )


def _read(file: Path) -> tuple[dict[str, Any], dict[Place, int]]:
    try:
        plain, node = parse(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise ConfigError(
            f"{file}{line} is not valid YAML",
            why=str(getattr(error, "problem", None) or error),
            fix="correct the line; a recipe to start from is printed by `equipoise recipes`",
        ) from error
    if not isinstance(plain, dict) or not isinstance(node, yaml.MappingNode):
        raise ConfigError(
            f"{file} holds no recipe",
            why="a recipe is a mapping of field names to values",
            fix="see `equipoise recipes` for complete ones",
        )
    lines: dict[Place, int] = {}
    twice = _note_lines(node, (), lines)
    if twice:
        raise ConfigError(
            f"{file}: the same key twice",
            why="; ".join(f"line {line}: {key}" for key, line in twice),
            fix="keep one of them",
        )
    return plain, lines


def _note_lines(node: yaml.Node, place: Place, lines: dict[Place, int]) -> list[tuple[str, int]]:
    twice: list[tuple[str, int]] = []
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            inner = (*place, key.value)
            if inner in lines:
                twice.append((key.value, key.start_mark.line + 1))
            lines[inner] = key.start_mark.line + 1
            twice += _note_lines(value, inner, lines)
    elif isinstance(node, yaml.SequenceNode):
        for index, value in enumerate(node.value):
            lines[(*place, index)] = value.start_mark.line + 1
            twice += _note_lines(value, (*place, index), lines)
    return twice


def _apply(plain: dict[str, Any], item: str) -> Place:
    path, equals, text = item.partition("=")
    # Not isdigit(): it takes `²`. A longer number is no position in any list.
    place = tuple(
        int(part) if re.fullmatch("[0-9]{1,9}", part) else part for part in path.strip().split(".")
    )
    if not equals or not all(str(part) for part in place):
        raise ConfigError(
            f"--set {item} cannot be read",
            why="it has not the form path=value",
            fix="for instance: --set tune.objective=exmate",
        )
    try:
        value = parse(text)[0]
    except yaml.YAMLError as error:
        raise ConfigError(
            f"--set {item} cannot be read",
            why=f"the value is not YAML: {getattr(error, 'problem', None) or error}",
            fix="put the value in quotes",
        ) from error
    target: Any = plain
    for part, following in pairwise(place):
        inner = _child(target, part)
        if not isinstance(inner, dict | list):
            inner = [] if isinstance(following, int) else {}
            _put(target, part, inner, item)
        target = inner
    _put(target, place[-1], value, item)
    return place


def _child(target: Any, part: str | int) -> Any:
    if isinstance(target, dict):
        return target.get(part)
    return target[part] if isinstance(part, int) and part < len(target) else None


def _put(target: Any, part: str | int, value: Any, item: str) -> None:
    if isinstance(target, dict):
        target[part] = value
    elif isinstance(part, int) and part <= len(target):
        target[part : part + 1] = [value]
    else:
        raise ConfigError(
            f"--set {item} cannot be applied",
            why=f"{part!r} is not a position in a list of {len(target)}",
            fix="count from 0; the next free position appends",
        )


def _where(place: Place, lines: Mapping[Place, int], flags: Mapping[Place, str], file: str) -> str:
    for length in range(len(place), 0, -1):
        if place[:length] in flags:
            return flags[place[:length]]
        if place[:length] in lines:
            return f"{file}:{lines[place[:length]]}"
        # What the file does not hold came with a flag for something inside it.
        inside = [text for path, text in flags.items() if path[:length] == place[:length]]
        if inside:
            return inside[-1]
    return f"{file}:1" if lines else file
