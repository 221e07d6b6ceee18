"""One stage's folder of a run directory: shards in, hashes out, ``stage.json`` last."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    PUBLISHED = "published.json"
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
        self._published: dict[str, dict[str, Any]] = {}
        self._since = time.monotonic()

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
        """Make the folder, note the fingerprint, and load the list of what is published."""
        with self._run.writing():
            self.path.mkdir(parents=True, exist_ok=True)
            if self.complete:
                self._published = self._listed()
                return
            # A damaged or deleted file of an ended stage: only what is missing is made again.
            (self.path / RunFile.STAGE).unlink(missing_ok=True)
            started = {"fingerprint": self.fingerprint}
            if read_json_or_none(self.path / RunFile.STARTED) != started:
                publish_bytes(self.path / RunFile.STARTED, json_bytes(started))
            listed = self._listed()
            self._published = {k: v for k, v in listed.items() if (self.path / k).exists()}
            for file in self.path.rglob("*.parquet"):
                # Renamed but not yet listed when the process was killed.
                if file.relative_to(self.path).as_posix() not in self._published:
                    file.unlink()

    def has(self, name: str) -> bool:
        """True if a file, or a whole folder, of this name is published."""
        listed = self._listed()
        files = [file for file in listed if file == name or file.startswith(f"{name}/")]
        return bool(files) and all(file in self._published for file in files)

    # -- writing -------------------------------------------------------------------------------

    def publish_rows(
        self, name: str, rows: Sequence[Row], row_type: type[Row], **facts: Any
    ) -> None:
        """Publish one shard and list it with its hash.

        Args:
            name: File name relative to the stage, ending in ``.parquet``.
            rows: The shard's rows.
            row_type: Their dataclass.
            facts: What else to note about the shard, see :meth:`shard_facts`.
        """
        with self._run.writing():
            (self.path / name).parent.mkdir(parents=True, exist_ok=True)
            digest = publish_bytes(self.path / name, rows_to_parquet(rows, row_type))
            self._list({name: digest}, rows=len(rows), **facts)

    def publish_json(self, name: str, value: Any) -> None:
        """Publish plain data as JSON."""
        self.publish_bytes(name, json_bytes(value))

    def publish_bytes(self, name: str, data: bytes) -> None:
        """Publish one file."""
        with self._run.writing():
            (self.path / name).parent.mkdir(parents=True, exist_ok=True)
            self._list({name: publish_bytes(self.path / name, data)})

    def publish_directory(self, name: str, build: Callable[[Path], None]) -> None:
        """Publish a folder that ``build`` fills (a model directory, a report)."""
        with self._run.writing():
            hashes = publish_directory(self.path / name, build)
            old = [file for file in self._published if file.startswith(f"{name}/")]
            for file in old:
                del self._published[file]
            self._list({f"{name}/{file}": digest for file, digest in hashes.items()})

    def _list(self, hashes: Mapping[str, str], **facts: Any) -> None:
        now = time.monotonic()
        seconds, self._since = (now - self._since) / max(len(hashes), 1), now
        for name, digest in hashes.items():
            self._published[name] = {"sha256": digest, "seconds": seconds, **facts}
        publish_bytes(self.path / RunFile.PUBLISHED, json_bytes(self._published))

    def finish(self, **extra: Any) -> None:
        """End the stage: ``stage.json`` with the hash of every output, written last.

        Args:
            extra: More facts to keep, e.g. counts.
        """
        spent = sum(item["seconds"] for item in self._published.values())
        record = {
            "fingerprint": self.fingerprint,
            "outputs": {name: self._published[name]["sha256"] for name in sorted(self._published)},
            "minutes": (spent + time.monotonic() - self._since) / 60,
            **extra,
        }
        with self._run.writing():
            publish_bytes(self.path / RunFile.STAGE, json_bytes(record))
            shutil.rmtree(self.path / RunFile.WORK, ignore_errors=True)

    # -- reading -------------------------------------------------------------------------------

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
