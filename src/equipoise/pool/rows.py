"""Rows of JSONL, JSON and Parquet files and of ``datasets`` names."""

from __future__ import annotations

import gzip
import json
import random
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from equipoise.config import SourceConfig
from equipoise.errors import DataError
from equipoise.seeds import derive_seed

Row = Mapping[str, Any]

_SUFFIXES = (".jsonl", ".json", ".parquet")
_Item = TypeVar("_Item")


def read_rows(source: SourceConfig, *, data: Path | None) -> list[Row]:
    """Read the rows of a file or ``datasets`` name that pass ``where``; ``limit`` is not applied.

    Args:
        source: Not a ``workshop://`` one.
        data: Folder in which relative paths are looked up first.

    Raises:
        DataError: No such file or data set, a damaged line, or no row left.
    """
    path = find_file(source.source, data)
    rows = _read_file(path) if path is not None else _read_dataset(source)
    if not rows:
        raise DataError(
            f"{source.source} is empty",
            why="It holds no row.",
            fix="Give a file with at least one row, one JSON object a line.",
        )
    for field in source.where:
        if field not in rows[0]:
            raise DataError(
                f"{source.source} has no field {field}",
                why=f"`where` asks for it; the fields are {', '.join(sorted(rows[0]))}.",
                fix="Correct `where` in the recipe.",
            )
    kept = [
        row
        for row in rows
        if all(str(row.get(f)).casefold() == v.casefold() for f, v in source.where.items())
    ]
    if not kept:
        raise DataError(
            f"No row of {source.source} is left",
            why=f"None of its {len(rows)} rows has {source.where}.",
            fix="Correct `where` in the recipe.",
        )
    return kept


def draw(items: Sequence[_Item], source: SourceConfig, *, seed: int) -> list[_Item]:
    """At most ``source.limit`` items, drawn by the seed, in their old order."""
    if source.limit is None or len(items) <= source.limit:
        return list(items)
    chooser = random.Random(derive_seed(seed, "limit", source.source))
    return [items[i] for i in sorted(chooser.sample(range(len(items)), source.limit))]


def numbered(rows: Iterable[Row], source: SourceConfig) -> Iterable[tuple[str, Row]]:
    """Each row with a name for messages: source and row number."""
    return ((f"{source.source}, row {n}", row) for n, row in enumerate(rows, start=1))


def find_file(name: str, data: Path | None) -> Path | None:
    """Return the file that a source names, or nothing for a ``datasets`` name."""
    path = Path(name).expanduser()
    places = [path] if path.is_absolute() or data is None else [data / path, path]
    for place in places:
        if place.is_file():
            return place
    is_folder = path.is_absolute() and path.is_dir()  # `datasets` reads folders
    if path.name.removesuffix(".gz").endswith(_SUFFIXES) or path.is_absolute() != is_folder:
        looked = " and ".join(str(place.parent) for place in places)
        raise DataError(
            f"No data file {name}",
            why=f"Looked in {looked}.",
            fix="Correct the source, or set `data` to the folder that holds it.",
        )
    return None


def _read_file(path: Path) -> list[Row]:
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        import pyarrow.parquet as parquet

        try:
            return list(parquet.read_table(path).to_pylist())
        except (OSError, ValueError) as error:
            raise _damaged(path, str(error)) from error
    try:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rt", encoding="utf-8") as file:
            text = file.read()
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise _damaged(path, str(error)) from error
    if name.endswith(".json"):
        return _parse_json(path, text)
    # Not splitlines(): JSON strings may hold U+2028 and its like unescaped.
    lines = [(n, line) for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
    return [_parse_line(path, number, line) for number, line in lines]


def _parse_json(path: Path, text: str) -> list[Row]:
    try:
        value = json.loads(text) if text.strip() else []
    except ValueError as error:
        raise _damaged(path, str(error)) from error
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise _damaged(path, "It is not a list of JSON objects.")
    return value


def _parse_line(path: Path, number: int, line: str) -> Row:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise _damaged(path, f"Line {number}: {error}") from error
    if not isinstance(row, dict):
        raise _damaged(path, f"Line {number} is not a JSON object.")
    return row


def _damaged(path: Path, why: str) -> DataError:
    return DataError(
        f"Cannot read {path}",
        why=why,
        fix="Give JSON Lines (.jsonl, also .gz), a JSON list, or Parquet, in UTF-8.",
    )


def _read_dataset(source: SourceConfig) -> list[Row]:
    from datasets import load_dataset

    try:
        return list(load_dataset(source.source, split=source.split))
    except Exception as error:  # the client raises many kinds; none of them is ours
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise DataError(
            f"No data set {source.source} with split {source.split}",
            why=reason,
            fix="Correct the name or the split, or give a JSONL or Parquet file.",
        ) from error
