"""Tables of results on Markdown pages, and the names of methods; a test compares both.

A table stands between ``<!-- table NAME -->`` and ``<!-- /table -->``.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from equipoise.report.canvas import written

Json = Mapping[str, Any]
NAMES = {
    "start": "untouched model",
    "prompting": "prompting",
    "rerank8": "reranking, best of 8",
    "rerank16": "reranking, best of 16",
    "steering": "steering (vectors while sampling)",
    "exmate": "ExMATE on MOEC",
    "clm": "CLM on MOEC",
    "rlhf": "RLHF (CLM warm start)",
    "raw-exmate": "ExMATE on the raw pool",
    "raw-clm": "CLM on the raw pool",
    "best": "**distilled steering (the recipe)**",
}
ENDS = ("low", "high")
PERCENT = -1
_BLOCK = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- /table -->)", re.DOTALL)


class Column(NamedTuple):
    """One column of estimates."""

    title: str
    key: str
    """Of the headline, or a dotted path in the result; ``{}`` stands for the row's name."""
    digits: int = 2


class Table(NamedTuple):
    """Column heads, and rows of cells."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """Return the table as Markdown."""
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def filled(text: str, result: Json, tables: Mapping[str, Callable[[Json], Table]]) -> str:
    """Return a Markdown page with its tables made anew."""
    return _BLOCK.sub(lambda m: f"{m[1]}{tables[m[2]](result).markdown()}\n{m[3]}", text)


def methods(result: Json) -> dict[str, str]:
    """Return the methods of a result and their names, in the order of its tables."""
    return {key: name for key, name in NAMES.items() if f"{key}.degenerate" in result["headline"]}


def both(title: str, key: str, digits: int = 2) -> list[Column]:
    """Return a column per attribute."""
    return [Column(f"{title} {a}", f"{key}.{a}", digits) for a in ("helpfulness", "safety")]


def table(result: Json, first: str, rows: Mapping[str, str], *columns: Column) -> Table:
    """Return a table of estimates; what was not measured is left blank.

    Args:
        result: The study's.
        first: Title of the first column.
        rows: What stands for ``{}`` in the keys, to what stands in the first column.
        columns: The others.
    """
    lines = [
        (name, *(cell(result, column.key.format(row), column.digits) for column in columns))
        for row, name in rows.items()
    ]
    return Table((first, *(column.title for column in columns)), lines)


def cell(result: Json, key: str, digits: int = 2) -> str:
    """Return an estimate of the headline, or one that lies at a dotted path, as text."""
    head = result["headline"]
    if key in head:
        return said({"value": head[key], **{e: head.get(f"{key}.{e}") for e in ENDS}}, digits)
    found: Any = result
    for name in key.split("."):
        if name not in found:
            return ""
        found = found[name]
    return said(found, digits)


def said(estimate: Json, digits: int = 2) -> str:
    """Return ``value (low to high)``, or the value alone where there is no interval."""
    value = estimate["value"]
    if value is None or value != value:
        return "–"
    if digits == PERCENT:
        return f"{written(100 * value, '{:.1f}')} %"
    form = f"{{:.{digits}f}}" if abs(value) < 100 else "{:.0f}"
    ends = [estimate[end] for end in ENDS]
    if any(end is None or end != end for end in ends):
        return f"{written(value, form)} (no interval)"
    return f"{written(value, form)} ({written(ends[0], form)} to {written(ends[1], form)})"
