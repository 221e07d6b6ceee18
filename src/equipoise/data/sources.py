"""Rows of JSONL, JSON and Parquet files and of ``datasets`` names."""

from __future__ import annotations

import gzip
import json
import logging
import random
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from equipoise.config import SourceConfig
from equipoise.errors import DataError
from equipoise.recipes.source import home
from equipoise.seeds import derive_seed

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Place:
    """What messages call a row, as they must not show its text."""

    source: str
    row: int
    """Counted from 1; of JSON Lines, blank lines are not counted."""

    def __str__(self) -> str:
        return f"{self.source}, row {self.row}"


_SHOWN = 5
"""Reasons for a row left out that are kept in words; the rest is counted."""
_AROUND = "set `on_bad_row: skip` for this source, which leaves such rows out and counts them."
_FORMATS = "Give JSON Lines (.jsonl, also .gz), a JSON list, or Parquet, in UTF-8."
_SUFFIXES = (".jsonl", ".json", ".parquet")
_Item = TypeVar("_Item")

log = logging.getLogger(__name__)


class Skipped:
    """Which rows ``on_bad_row: skip`` left out, and why.

    Each once: a file that serves two splits is read twice.
    """

    def __init__(self) -> None:
        self._reasons: dict[str, str] = {}

    @property
    def count(self) -> int:
        """How many rows were left out."""
        return len(self._reasons)

    def note(self, rows: Iterable[tuple[str, DataError]]) -> None:
        """Take note of rows that were left out, each with its place; no text of a row is kept."""
        for place, error in rows:
            what = error.what.removeprefix(place).lstrip(": ")
            self._reasons[place] = f"{place}: {what} ({error.why})"

    def facts(self) -> dict[str, Any]:
        """Return what a stage keeps: ``count``, and ``first``, the first reasons in words."""
        return {"count": self.count, "first": list(self._reasons.values())[:_SHOWN]}


def read_items(
    source: SourceConfig,
    read: Callable[[Row, Place], _Item],
    *,
    data: Path | None,
    skipped: Skipped | None = None,
) -> list[_Item]:
    """Make an item of every row that passes ``where``; ``limit`` is not applied.

    Args:
        source: Not a ``workshop://`` one; its ``on_bad_row`` decides about what cannot be used.
        read: Takes a row and its place; raises DataError.
        data: Folder in which relative paths are looked up first.
        skipped: Takes note of the rows that are left out.

    Raises:
        DataError: No such file or data set, a row that cannot be used, or none that can.
    """
    items: list[_Item] = []
    bad: list[tuple[str, DataError]] = []
    for number, row in _numbered(source, data):
        place = Place(source.source, number)
        try:
            if isinstance(row, DataError):
                raise row
            items.append(read(row, place))
        except DataError as error:
            if source.on_bad_row == "stop":
                raise refused(error) from error
            bad.append((str(place), error))
    if bad and not items:
        raise none_left(source.source, len(bad), bad[0][1])
    if bad:
        log.warning("%s: %d rows skipped, the first: %s", source.source, len(bad), bad[0][1].what)
        (skipped or Skipped()).note(bad)
    return items


def refused(error: DataError) -> DataError:
    """The error for a row that ends the run, with the way around it."""
    return DataError(error.what, why=error.why, fix=f"{error.fix}\n  or: {_AROUND}")


def none_left(source: str, n_bad: int, first: DataError) -> DataError:
    """The error for a source of which ``on_bad_row: skip`` left nothing."""
    return DataError(
        f"No row of {source} can be used",
        why=f"All {n_bad} were skipped. The first: {first.what}: {first.why}",
        fix=first.fix,
    )


def draw(items: Sequence[_Item], source: SourceConfig, *, seed: int) -> list[_Item]:
    """At most ``source.limit`` items, drawn by the seed, in their old order."""
    if source.limit is None or len(items) <= source.limit:
        return list(items)
    chooser = random.Random(derive_seed(seed, "limit", source.source))
    return [items[i] for i in sorted(chooser.sample(range(len(items)), source.limit))]


def find_file(name: str, data: Path | None) -> Path | None:
    """Return the file that a source names, or nothing for a ``datasets`` name."""
    path = home(name)
    places = [path] if path.is_absolute() or data is None else [data / path, path]
    for place in places:
        if place.is_file():
            return place
    is_folder = path.is_absolute() and path.is_dir()  # `datasets` reads folders
    if path.name.removesuffix(".gz").endswith(_SUFFIXES) or path.is_absolute() != is_folder:
        looked = " and in ".join(dict.fromkeys(str(place.parent.absolute()) for place in places))
        raise DataError(
            f"No data file {name}",
            why=f"It is not in {looked}",
            fix="Correct the source, or set `data` to the folder that holds it.",
        )
    return None


def _numbered(source: SourceConfig, data: Path | None) -> list[tuple[int, Row | DataError]]:
    """Return the rows that pass ``where``, and those that cannot be read, with their numbers."""
    path = find_file(source.source, data)
    rows = _read_file(path, source.source) if path is not None else _read_dataset(source)
    if not rows:
        raise DataError(
            f"{source.source} is empty",
            why="It holds no row.",
            fix="Give a file with at least one row, one JSON object a line.",
        )
    # Optional columns are common: one row without a field says nothing about the others.
    fields = {field for row in rows if not isinstance(row, DataError) for field in row}
    for field in source.where if fields else ():
        if field not in fields:
            raise DataError(
                f"{source.source} has no field {field}",
                why=f"`where` asks for it; the fields are {', '.join(sorted(map(str, fields)))}.",
                fix="Correct `where` in the recipe.",
            )
    wanted = {field: value.casefold() for field, value in source.where.items()}
    kept = [
        (number, row)
        for number, row in enumerate(rows, start=1)
        if isinstance(row, DataError)
        or all(str(row.get(field)).casefold() == value for field, value in wanted.items())
    ]
    if not kept:
        raise DataError(
            f"No row of {source.source} is left",
            why=f"None of its {len(rows)} rows has {source.where}.",
            fix="Correct `where` in the recipe.",
        )
    return kept


def _read_file(path: Path, source: str) -> Sequence[Row | DataError]:
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        import pyarrow.parquet as parquet

        try:
            rows: list[Row] = parquet.read_table(path).to_pylist()
        except (OSError, ValueError) as error:
            raise _damaged(path, str(error)) from error
        return rows
    try:
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rb") as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise _damaged(path, str(error)) from error
    if name.endswith(".json"):
        return _parse_json(path, content)
    # Not splitlines(): JSON strings may hold U+2028 and its like unescaped.
    lines = [(n, line) for n, line in enumerate(content.split(b"\n"), start=1) if line.strip()]
    return [
        _parse_line(Place(source, row), number, line)
        for row, (number, line) in enumerate(lines, start=1)
    ]


def _parse_json(path: Path, content: bytes) -> list[Row]:
    try:
        text = content.decode("utf-8-sig")
        value = json.loads(text) if text.strip() else []
    except (ValueError, RecursionError) as error:
        raise _damaged(path, str(error)) from error
    if isinstance(value, dict) and isinstance(value.get("data"), list):
        value = value["data"]
    if not isinstance(value, list) or not all(isinstance(row, dict) for row in value):
        raise _damaged(path, "It is not a list of JSON objects.")
    return value


def _parse_line(place: Place, number: int, line: bytes) -> Row | DataError:
    """Return the row, or what is wrong with it: whether that ends the run, others decide."""
    try:
        # A byte order mark: Windows writes one, and `cat` moves it into the middle of a file.
        row = json.loads(line.decode("utf-8-sig"))
        why = "" if isinstance(row, dict) else f"Line {number} is not a JSON object."
    except (ValueError, RecursionError) as error:
        row, why = {}, f"Line {number}: {error}"
    return DataError(f"{place}: cannot be read", why=why, fix=_FORMATS) if why else row


def _damaged(path: Path, why: str) -> DataError:
    return DataError(f"Cannot read {path}", why=why, fix=_FORMATS)


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
