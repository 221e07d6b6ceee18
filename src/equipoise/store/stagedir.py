"""One stage's folder of a run directory: shards in, hashes out, ``stage.json`` last."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol, TypeVar

from equipoise.errors import RunError
from equipoise.store.fingerprint import diff
from equipoise.store.publish import (
    json_bytes,
    publish_bytes,
    publish_directory,
    read_json_or_none,
    sha256_bytes,
    sha256_file,
)
from equipoise.store.shards import rows_from_parquet, rows_to_parquet

Row = TypeVar("Row")
Parsed = TypeVar("Parsed")


class RunFile(StrEnum):
    """Names of the store's own files."""

    LOCK = ".lock"
    STARTED = "started.json"
    SHARDS = "shards.json"
    STAGE = "stage.json"
    WORK = "work"


class Run(Protocol):
    """What a stage needs from its run directory."""

    path: Path

    def writing(self) -> AbstractContextManager[None]:
        """Turn disk errors into user errors."""
        ...


class Stage:
    """A stage's folder. Make one with :meth:`equipoise.store.rundir.RunDir.begin`.

    Args:
        path: The folder.
        fingerprint: What the stage depends on; ``None`` if the stage is only read.
        run: The run directory it lies in.
    """

    def __init__(self, path: Path, *, fingerprint: dict[str, Any] | None, run: Run) -> None:
        self.path, self.name, self.fingerprint, self._run = path, path.name, fingerprint, run
        self._outputs: dict[str, str] = {}
        self._shards: dict[str, dict[str, Any]] = {}
        self._begun = self._since = time.monotonic()

    # -- state ---------------------------------------------------------------------------------

    @property
    def complete(self) -> bool:
        """True if the stage has ended and all its files are there."""
        record = self._record()
        return record is not None and all((self.path / name).exists() for name in record["outputs"])

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
    def work(self) -> Path:
        """Scratch folder that survives a kill and is deleted when the stage ends."""
        path = self.path / RunFile.WORK
        path.mkdir(parents=True, exist_ok=True)
        return path

    def changes(self) -> list[str]:
        """Return how the fingerprint differs from the one the stage was begun with."""
        old = self._record() or read_json_or_none(self.path / RunFile.STARTED)
        return [] if old is None else diff(old["fingerprint"], self.fingerprint)

    def prepare(self) -> None:
        """Make the folder, note the fingerprint, and load the list of published shards."""
        with self._run.writing():
            self.path.mkdir(parents=True, exist_ok=True)
            if self.complete:
                self._shards = self._listed()
                return
            # A damaged or deleted file of an ended stage: only what is missing is made again.
            (self.path / RunFile.STAGE).unlink(missing_ok=True)
            started = {"fingerprint": self.fingerprint}
            if read_json_or_none(self.path / RunFile.STARTED) != started:
                publish_bytes(self.path / RunFile.STARTED, json_bytes(started))
            listed = self._listed()
            self._shards = {k: v for k, v in listed.items() if (self.path / k).exists()}
            for file in self.path.rglob("*.parquet"):
                # Renamed but not yet listed when the process was killed.
                if file.relative_to(self.path).as_posix() not in self._shards:
                    file.unlink()

    # -- writing -------------------------------------------------------------------------------

    def publish_rows(self, name: str, rows: Sequence[Row], row_type: type[Row]) -> None:
        """Publish one shard and list it with its hash.

        Args:
            name: File name relative to the stage, ending in ``.parquet``.
            rows: The shard's rows.
            row_type: Their dataclass.
        """
        with self._run.writing():
            (self.path / name).parent.mkdir(parents=True, exist_ok=True)
            digest = publish_bytes(self.path / name, rows_to_parquet(rows, row_type))
            seconds = time.monotonic() - self._since
            self._since = time.monotonic()
            self._shards[name] = {"sha256": digest, "rows": len(rows), "seconds": seconds}
            publish_bytes(self.path / RunFile.SHARDS, json_bytes(self._shards))

    def publish_json(self, name: str, value: Any) -> None:
        """Publish plain data as JSON."""
        self.publish_bytes(name, json_bytes(value))

    def publish_bytes(self, name: str, data: bytes) -> None:
        """Publish one file."""
        with self._run.writing():
            self._outputs[name] = publish_bytes(self.path / name, data)

    def publish_directory(self, name: str, build: Callable[[Path], None]) -> None:
        """Publish a folder that ``build`` fills (a model directory, a report)."""
        with self._run.writing():
            hashes = publish_directory(self.path / name, build)
            self._outputs.update({f"{name}/{file}": digest for file, digest in hashes.items()})

    def finish(self, **extra: Any) -> None:
        """End the stage: ``stage.json`` with the hash of every output, written last.

        Args:
            extra: More facts to keep, e.g. counts.
        """
        earlier = sum(item["seconds"] for item in self._shards.values())
        now = time.monotonic()
        spent = earlier + now - self._since if self._shards else now - self._begun
        outputs = {**self._outputs, **{k: v["sha256"] for k, v in self._shards.items()}}
        record = {
            "fingerprint": self.fingerprint,
            "outputs": dict(sorted(outputs.items())),
            "minutes": spent / 60,
            **extra,
        }
        with self._run.writing():
            publish_bytes(self.path / RunFile.STAGE, json_bytes(record))
            shutil.rmtree(self.path / RunFile.WORK, ignore_errors=True)

    # -- reading -------------------------------------------------------------------------------

    @property
    def shards(self) -> list[str]:
        """Names of the published shards, sorted."""
        return sorted(self._shards or self._listed())

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
        listed = (self._shards or self._listed())[name]["sha256"]
        return self._parse(name, listed, lambda data: rows_from_parquet(data, row_type))

    def read_json(self, name: str) -> Any:
        """Return a published JSON file, its hash checked.

        Raises:
            RunError: The file is damaged.
        """
        return self._parse(name, self.outputs[name], json.loads)

    def read_bytes(self, name: str) -> bytes:
        """Return a published file, its hash checked.

        Raises:
            RunError: The file is damaged.
        """
        return self._parse(name, self.outputs[name], bytes)

    def directory(self, name: str) -> Path:
        """Return a published folder, all its hashes checked.

        Raises:
            RunError: A file of it is damaged.
        """
        for file, digest in self.outputs.items():
            if file.startswith(f"{name}/") and sha256_file(self.path / file) != digest:
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

    def _listed(self) -> dict[str, dict[str, Any]]:
        return read_json_or_none(self.path / RunFile.SHARDS) or {}
