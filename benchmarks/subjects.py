"""Commands that produce tokens, in a process that can be stopped and go on: run, serve, chat."""

from __future__ import annotations

import http.client
import json
import os
import select
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import IO, Any, Protocol

from equipoise.models.hub import resolve_model
from equipoise.models.load import load_tokenizer
from equipoise.store.stagefiles import StageFiles
from equipoise.types import Completion

MODEL = "workshop://start"
WINDOW, CAP = 3.5, 15.0
SHARDS, STREAMS = 3, 8
OBJECTS = ("frostbell", "ember lamp", "kettle", "ladder")
PROMPTS = [f"How do I tune the {OBJECTS[i % 4]} {i}?" for i in range(2000)]
Start = Callable[..., subprocess.Popen[bytes]]
"""Takes the arguments of ``equipoise`` and, by name, its ``stdin``."""


class Subject(Protocol):
    """One command under test."""

    process: subprocess.Popen[bytes]

    def ready(self) -> None:
        """Return once it computes."""

    def measure(self) -> tuple[int, float, bool]:
        """Return tokens, seconds, and whether what was asked for was finished."""


class Run:
    """``equipoise stage generate``, by the shards that it publishes."""

    def __init__(self, start: Start, place: Path) -> None:
        small = ("--set", "generate.batch_size=64", "--set", "prompts.train.0.limit=400")
        self.process = start("stage", "generate", "workshop", "--dir", str(place), *small)
        self._stage = place / "generate"

    def ready(self) -> None:
        _until(lambda: len(self._shards()) > 0, self.process)

    def measure(self) -> tuple[int, float, bool]:
        begun = time.perf_counter()
        # From the end of a shard on: it was stopped somewhere within one.
        had, first = self._shards(), None
        while time.perf_counter() - begun < CAP:
            time.sleep(0.01)
            now = self._shards()
            if first is None and len(now) > len(had):
                had, first = now, time.perf_counter()
            elif first is not None and len(now) >= len(had) + SHARDS:
                break
        ended, now = time.perf_counter(), self._shards()
        rows = [
            r for n in now[len(had) :] for r in StageFiles(self._stage).read_shard(n, Completion)
        ]
        seconds = ended - (begun if first is None else first)
        return sum(row.n_tokens for row in rows), seconds, len(now) >= len(had) + SHARDS

    @property
    def threads(self) -> int | None:
        """What the run has settled on; None where the environment has."""
        file = self._stage.parent / "machine.json"
        return json.loads(file.read_text("utf-8"))["threads"] if file.is_file() else None

    def _shards(self) -> list[str]:
        return sorted(StageFiles(self._stage).shards)


class Serve:
    """``equipoise serve`` and so many clients that read streams."""

    def __init__(self, start: Start, model: Path, policy: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self._port = free.getsockname()[1]
        where = ("--policy", str(policy), "--name", "model", "--port", str(self._port))
        self.process = start("serve", str(model), *where)
        self._texts: list[str] = []
        self._asked, self._refused = 0, ""

    def ready(self) -> None:
        self._key = _pipe(self.process).readline().decode().strip()

        def listens() -> bool:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self._port)):
                return True
            return False

        _until(listens, self.process)

    def measure(self) -> tuple[int, float, bool]:
        self._texts, open_ = [], list[socket.socket]()
        begun = time.perf_counter()
        readers = [
            threading.Thread(target=self._read, args=(begun + WINDOW, open_))
            for _ in range(STREAMS)
        ]
        for reader in readers:
            reader.start()
        time.sleep(max(0.0, begun + WINDOW - time.perf_counter()))
        texts = list(self._texts)
        for connection in open_:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for reader in readers:
            reader.join()
        if self._refused:
            raise SystemExit(f"the server says {self._refused}")
        time.sleep(0.3)  # the server sees that they have left
        return count_tokens(texts), WINDOW, True

    def _read(self, deadline: float, open_: list[socket.socket]) -> None:
        while time.perf_counter() < deadline:
            self._asked += 1
            asked = [{"role": "user", "content": PROMPTS[self._asked % len(PROMPTS)]}]
            body = {"model": "model", "messages": asked, "stream": True, "max_tokens": 88}
            connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=CAP)
            with suppress(OSError, http.client.HTTPException):
                connection.connect()
                open_.append(connection.sock)
                headers = {"authorization": f"Bearer {self._key}"}
                headers["content-type"] = "application/json"
                connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
                reply = connection.getresponse()
                if reply.status != 200:
                    self._refused = f"{reply.status}: {reply.read()!r}"
                    return
                for line in reply:
                    if line.startswith(b"data: {"):
                        choices = json.loads(line[6:])["choices"]
                        self._texts += [c["delta"].get("content") or "" for c in choices]
            connection.close()


class Chat:
    """``equipoise chat``, its input a file, without a history that grows."""

    def __init__(self, start: Start, model: Path, lines: Path) -> None:
        with lines.open("rb") as given:
            self.process = start("chat", str(model), "--max-tokens", "88", stdin=given)

    def ready(self) -> None:
        _pipe(self.process).readline()

    def measure(self) -> tuple[int, float, bool]:
        pipe, parts = _pipe(self.process).fileno(), list[bytes]()
        with suppress(BlockingIOError):  # what it wrote before it was stopped
            os.set_blocking(pipe, False)
            while os.read(pipe, 1 << 16):
                pass
        begun = time.perf_counter()
        while (left := begun + WINDOW - time.perf_counter()) > 0:
            if select.select([pipe], [], [], left)[0]:
                parts.append(os.read(pipe, 1 << 16))
        text = b"".join(parts).decode("utf-8", "ignore").replace("history is empty", "")
        return count_tokens(text.splitlines()), WINDOW, True


def count_tokens(texts: Sequence[str]) -> int:
    """Return the tokens of the texts, joined: a stream comes in pieces of words."""
    return len(_tokenizer()("".join(texts), add_special_tokens=False, verbose=False)["input_ids"])


@cache
def _tokenizer() -> Any:
    return load_tokenizer(resolve_model(MODEL))


def _pipe(process: subprocess.Popen[bytes]) -> IO[bytes]:
    assert process.stdout is not None
    return process.stdout


def _until(true: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    for _ in range(1200):
        if true():
            return
        if process.poll() is not None:
            break
        time.sleep(0.1)
    raise SystemExit(f"no start: {process.args}")
