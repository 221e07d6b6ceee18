"""Which rows ``on_bad_row: skip`` left out, and why: nothing is left out without a word."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from equipoise.errors import DataError

_SHOWN = 5
"""Reasons that are kept in words; the rest is counted."""


class Skipped:
    """Which rows, each once: a file that serves two splits is read twice."""

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
