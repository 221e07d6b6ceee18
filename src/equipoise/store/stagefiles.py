"""Reading one stage's folder of a run directory: every byte is checked against its hash."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import Any, TypeVar

from equipoise.errors import RunError
from equipoise.store.publish import json_bytes, read_json_or_none, sha256_bytes, sha256_file
from equipoise.store.shards import rows_from_parquet

Row = TypeVar("Row")
Parsed = TypeVar("Parsed")


class RunFile(StrEnum):
    """Names of the store's own files."""

    LOCK = ".lock"
    STARTED = "started.json"
    PUBLISHED = "published.json"
    STAGE = "stage.json"
    WORK = "work"


class StageFiles:
    """A stage's published files. Get one with :meth:`equipoise.pipeline.rundir.RunDir.done`.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, path.name
        self._published: dict[str, dict[str, Any]] = {}

    @property
    def complete(self) -> bool:
        """True if the stage has ended and all its files are there."""
        record = self._record()
        if record is None or set(record["outputs"]) != set(self._listed()):
            return False
        return all((self.path / name).exists() for name in record["outputs"])

    @property
    def outputs(self) -> dict[str, str]:
        """Relative file name to SHA-256 of every output of a complete stage."""
        record = self._record()
        return dict(record["outputs"]) if record else {}

    @property
    def outputs_hash(self) -> str:
        """One hash over all outputs; it is part of the fingerprints of later stages."""
        return sha256_bytes(json_bytes(self.outputs))

    @property
    def minutes(self) -> float:
        """Minutes that the complete stage took, earlier attempts' published shards included."""
        record = self._record()
        return float(record["minutes"]) if record else 0.0

    @property
    def shards(self) -> list[str]:
        """Names of the published shards, sorted."""
        return sorted(name for name in self._files() if name.endswith(".parquet"))

    def shard_facts(self, name: str) -> dict[str, Any]:
        """Return ``sha256``, ``seconds``, ``rows`` and what else was noted about a shard."""
        return dict(self._files()[name])

    def facts(self) -> dict[str, Any]:
        """Return what :meth:`finish` kept."""
        return self._record() or {}

    def read_rows(self, row_type: type[Row], *, prefix: str = "") -> Iterator[list[Row]]:
        """Yield the rows of each shard whose name starts with ``prefix``, in order.

        Raises:
            RunError: A shard is damaged.
        """
        for name in self.shards:
            if name.startswith(prefix):
                yield self.read_shard(name, row_type)

    def read_shard(self, name: str, row_type: type[Row]) -> list[Row]:
        """Return the rows of one shard, its hash checked.

        Raises:
            RunError: The shard is damaged.
        """
        digest = self._files()[name]["sha256"]
        return self._parse(name, digest, lambda data: rows_from_parquet(data, row_type))

    def read_json(self, name: str) -> Any:
        """Return a published JSON file, its hash checked.

        Raises:
            RunError: The file is damaged.
        """
        return self._parse(name, self._files()[name]["sha256"], json.loads)

    def read_bytes(self, name: str) -> bytes:
        """Return a published file, its hash checked.

        Raises:
            RunError: The file is damaged.
        """
        return self._parse(name, self._files()[name]["sha256"], bytes)

    def directory(self, name: str) -> Path:
        """Return a published folder, all its hashes checked.

        Raises:
            RunError: A file of it is damaged.
        """
        for file, listed in self._files().items():
            if file.startswith(f"{name}/") and sha256_file(self.path / file) != listed["sha256"]:
                raise self._damaged(file, "its SHA-256 is not the recorded one")
        return self.path / name

    def _parse(self, name: str, digest: str, parse: Callable[[bytes], Parsed]) -> Parsed:
        try:
            data = (self.path / name).read_bytes()
            if sha256_bytes(data) != digest:
                raise ValueError("its SHA-256 is not the recorded one")
            return parse(data)
        except (ValueError, FileNotFoundError) as error:
            raise self._damaged(name, str(error)) from error

    def _damaged(self, name: str, why: str) -> RunError:
        file = self.path / name
        return RunError(
            f"{file} is damaged",
            why=why,
            fix=f"delete that file and run again: only its content is made anew ({self.name} keeps "
            "its other files)",
        )

    def _record(self) -> dict[str, Any] | None:
        record: dict[str, Any] | None = read_json_or_none(self.path / RunFile.STAGE)
        return record

    def _files(self) -> dict[str, dict[str, Any]]:
        return self._published or self._listed()

    def _listed(self) -> dict[str, dict[str, Any]]:
        return read_json_or_none(self.path / RunFile.PUBLISHED) or {}
