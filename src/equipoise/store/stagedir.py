"""Writing one stage's folder of a run directory: shards in, hashes out, ``stage.json`` last."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from equipoise.store.publish import (
    json_bytes,
    publish_bytes,
    publish_directory,
    read_json_or_none,
)
from equipoise.store.shards import rows_to_parquet
from equipoise.store.stagefiles import RunFile, StageFiles

Row = TypeVar("Row")


class Run(Protocol):
    """What a stage needs from its run directory."""

    def writing(self) -> AbstractContextManager[None]:
        """Turn disk errors into user errors."""
        ...


class Stage(StageFiles):
    """A stage at work. Make one with :meth:`equipoise.pipeline.rundir.RunDir.begin`.

    Args:
        path: The folder.
        fingerprint: What the stage depends on.
        run: The run directory it lies in.
    """

    def __init__(self, path: Path, *, fingerprint: dict[str, Any], run: Run) -> None:
        super().__init__(path)
        self.fingerprint, self._run = fingerprint, run
        self._since = time.monotonic()

    @property
    def work(self) -> Path:
        """Scratch folder that survives a kill and is deleted when the stage ends."""
        path = self.path / RunFile.WORK
        path.mkdir(parents=True, exist_ok=True)
        return path

    def begun_with(self) -> dict[str, Any] | None:
        """Return the fingerprint that the stage was begun with; none if it never was."""
        old = self._record() or read_json_or_none(self.path / RunFile.STARTED)
        return None if old is None else old["fingerprint"]

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

    def publish_directory(self, name: str, build: Callable[[Path], object]) -> None:
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
