"""Typed rows <-> Parquet bytes: the dataclasses of :mod:`equipoise.types`, nothing looser.

The Arrow schema is derived from the type hints, so that a field cannot be lost or change its type
on the way through the disk. The same rows give the same bytes (fixed compression, no timestamps),
which is what lets an interrupted run be compared with an uninterrupted one by hash.
"""

from __future__ import annotations

import io
import json
import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import Field, fields, is_dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
from pydantic import BaseModel

if TYPE_CHECKING:
    import pyarrow as pa

Row = TypeVar("Row")

SPARSE = {"sparse": True}
"""Metadata of a field that JSON leaves out where it is empty; it needs a default."""
_SCALARS: dict[type, str] = {str: "string", int: "int64", float: "float64", bool: "bool_"}


def rows_to_parquet(rows: Sequence[Row], row_type: type[Row]) -> bytes:
    """Return the Parquet file of some rows as bytes.

    Args:
        rows: Instances of ``row_type``; may be empty.
        row_type: A dataclass of scalars, tuples, mappings with string keys, and dataclasses.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = arrow_schema(cast(type, row_type))
    table = pa.Table.from_pylist([_plain(row, for_arrow=True) for row in rows], schema=schema)
    sink = io.BytesIO()
    pq.write_table(table, sink, compression="zstd", compression_level=3, write_statistics=False)
    return sink.getvalue()


def rows_from_parquet(data: bytes, row_type: type[Row]) -> list[Row]:
    """Return the rows of a Parquet file made by :func:`rows_to_parquet`.

    Raises:
        ValueError: The bytes are not such a file, or hold another type of row.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        table = pq.read_table(io.BytesIO(data))
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"not a Parquet file: {error}") from error
    if not table.schema.equals(arrow_schema(cast(type, row_type))):
        raise ValueError(f"rows are not of type {row_type.__name__}")
    return [from_plain(row_type, row) for row in table.to_pylist()]


def rows_to_jsonl(rows: Iterable[Any]) -> bytes:
    """Return dataclass rows as JSON Lines."""
    lines = (json.dumps(to_plain(row), ensure_ascii=False, sort_keys=True) for row in rows)
    return "".join(f"{line}\n" for line in lines).encode("utf-8", "surrogatepass")


def rows_from_jsonl(data: bytes, row_type: type[Row]) -> list[Row]:
    """Return the rows of a file made by :func:`rows_to_jsonl`."""
    text = data.decode("utf-8", "surrogatepass")
    return [from_plain(row_type, json.loads(line)) for line in text.split("\n") if line]


@cache
def arrow_schema(row_type: type) -> pa.Schema:
    """Return the Arrow schema of a dataclass."""
    import pyarrow as pa

    return pa.schema(list(_arrow_fields(row_type)))


def to_plain(value: Any) -> Any:
    """Return dataclasses, models, arrays, tuples, mappings and scalars as what strict JSON holds.

    NaN and infinities become null; :func:`from_plain` reads null back as NaN where a float stands.
    """
    return _plain(value, for_arrow=False)


def from_plain(hint: Any, value: Any) -> Any:
    """Rebuild a value of type ``hint`` from plain data (JSON or Arrow).

    Raises:
        TypeError: A dataclass lacks a field that has no default.
        ValueError: A tuple or a pydantic model does not fit.
    """
    if value is None:
        return math.nan if hint is float else None
    hint = _without_none(hint)
    if is_dataclass(hint):
        hints = _hints(cast(type, hint))
        # A field that an older file lacks takes the type's default.
        kept = {name: from_plain(hints[name], value[name]) for name in hints if name in value}
        return cast(type, hint)(**kept)
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(hint, type) and issubclass(hint, BaseModel):
        return hint.model_validate(value)
    if origin is np.ndarray:
        return np.array(value, float)
    if origin is tuple:
        if len(arguments) == 2 and arguments[1] is Ellipsis:
            return tuple(from_plain(arguments[0], item) for item in value)
        return tuple(from_plain(kind, item) for kind, item in zip(arguments, value, strict=True))
    if origin is not None and issubclass(_class_of(origin), Mapping):
        pairs = value.items() if isinstance(value, Mapping) else value
        return {key: from_plain(arguments[1], item) for key, item in pairs}
    if origin is not None and issubclass(_class_of(origin), Sequence):
        return [from_plain(arguments[0], item) for item in value]
    if hint is float:
        return float(value)
    return value


def _plain(value: Any, *, for_arrow: bool) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {
            item.name: _plain(getattr(value, item.name), for_arrow=for_arrow)
            for item in _stored(type(value))
            if not item.metadata.get("sparse") or getattr(value, item.name) not in (None, {})
        }
    if isinstance(value, Mapping):
        pairs = [(str(key), _plain(item, for_arrow=for_arrow)) for key, item in value.items()]
        return pairs if for_arrow else dict(pairs)
    if isinstance(value, tuple | list):
        return [_plain(item, for_arrow=for_arrow) for item in value]
    if isinstance(value, BaseModel):
        return _plain(value.model_dump(mode="json"), for_arrow=for_arrow)
    if hasattr(value, "tolist"):  # a NumPy array or number
        return _plain(value.tolist(), for_arrow=for_arrow)
    if isinstance(value, float) and not (for_arrow or math.isfinite(value)):
        return None
    return value


@cache
def _hints(row_type: type) -> dict[str, Any]:
    hints = typing.get_type_hints(row_type)
    return {item.name: hints[item.name] for item in _stored(row_type)}


@cache
def _stored(row_type: type) -> tuple[Field[Any], ...]:
    return tuple(item for item in fields(row_type) if item.metadata.get("stored", True))


def _arrow_fields(row_type: type) -> Iterable[pa.Field]:
    import pyarrow as pa

    for name, hint in _hints(row_type).items():
        yield pa.field(name, _arrow_type(_without_none(hint)), nullable=_allows_none(hint))


def _arrow_type(hint: Any) -> pa.DataType:
    import pyarrow as pa

    if is_dataclass(hint):
        return pa.struct(list(_arrow_fields(cast(type, hint))))
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return _arrow_type(type(arguments[0]))
    if origin is not None and issubclass(_class_of(origin), Mapping):
        return pa.map_(pa.string(), _arrow_type(_without_none(arguments[1])))
    if origin is not None and issubclass(_class_of(origin), tuple | Sequence):
        item = pa.field("item", _arrow_type(_without_none(arguments[0])))
        return pa.list_(item)
    if hint in _SCALARS:
        return getattr(pa, _SCALARS[hint])()
    raise TypeError(f"no Arrow type for {hint!r}")


def _class_of(origin: Any) -> type:
    return origin if isinstance(origin, type) else type(None)


def _allows_none(hint: Any) -> bool:
    return type(None) in typing.get_args(hint)


def _without_none(hint: Any) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        kept = [item for item in typing.get_args(hint) if item is not type(None)]
        if len(kept) == 1:
            return kept[0]
    return hint
