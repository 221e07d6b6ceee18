"""No prompt, completion or key in any log; the content log only where it is switched on."""

from __future__ import annotations

import errno
import io
import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from equipoise.errors import ConfigError
from equipoise.protocol.replies import Envelope
from equipoise.serve import content_log
from equipoise.serve.content_log import ContentLog
from equipoise.types import Message
from serve_kit import Server, call, chat_body, make_server, running

CHAT = "/v1/chat/completions"
CANARY = "canary-7f3a 東京"
ANSWER = "The answer canary-55d1 flies."


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """Everything that any logger says, down to debug level."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    root = logging.getLogger()
    loggers = [
        root,
        *(logging.getLogger(n) for n in ("equipoise.serve", "uvicorn.error", "asyncio")),
    ]
    before = [(logger, logger.level) for logger in loggers]
    root.addHandler(handler)
    for logger in loggers:
        logger.setLevel(logging.DEBUG)
    yield stream
    root.removeHandler(handler)
    for logger, level in before:
        logger.setLevel(level)


def everything(server: Server, port: int) -> None:
    """Send the canary down every path that ends in a log line."""
    key = server.secrets["lab"]
    bodies: list[object] = [
        chat_body(CANARY),
        chat_body(CANARY, stream=True),
        chat_body(CANARY, n=2, stop=[CANARY]),
        chat_body(CANARY, user=CANARY),
        chat_body(CANARY, dials={CANARY: 1}),
        chat_body(CANARY, dials={"safety": CANARY}),
        chat_body(CANARY, **{CANARY: 1}),
        chat_body(CANARY, temperature=CANARY),
        chat_body(CANARY) | {"model": CANARY},
        chat_body(CANARY * 5000),
        CANARY.encode(),
        f'{{"{CANARY}": 1, "{CANARY}": 2}}'.encode(),
        [CANARY],
    ]
    for body in bodies:
        for secret in (key, CANARY.split()[0], None):
            call(port, "POST", CHAT, body, key=secret, headers={"x-canary": "canary-7f3a"})
    call(port, "GET", f"/{CANARY.split()[0]}?q=canary-7f3a", key=key)
    call(port, "GET", f"/v1/models/{CANARY.split()[0]}", key=key)
    call(port, "GET", "/v1/models", key=key, headers={"Host": "canary-7f3a"})


@pytest.mark.parametrize("fault", ["none", "engine fails", "fault of ours"])
@pytest.mark.parametrize("n", [40, pytest.param(10_000, marks=pytest.mark.nightly)])
def test_no_text_and_no_key_in_any_log(
    tmp_path: Path, log: io.StringIO, fault: str, n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not in n lines of requests, of which each round of ``everything`` leaves about 40."""
    server = make_server(tmp_path, text=ANSWER, fail_at=2 if fault == "engine fails" else None)
    if fault == "fault of ours":

        def broken(*_: object, **__: object) -> None:
            raise KeyError(CANARY)

        monkeypatch.setattr(type(server.model.encoder), "control_ids", broken)
    with running(server) as port:
        while log.getvalue().count('"status"') <= n:
            everything(server, port)
        metrics = call(port, "GET", "/metrics", key=server.secrets["lab"]).body.decode()
        if fault == "fault of ours":
            reply = call(port, "POST", CHAT, chat_body(CANARY), key=server.secrets["lab"])
            assert reply.status == 500
            assert reply.json["error"]["message"] == "a fault of the server"
    said = log.getvalue()
    for place in (said, metrics):
        for secret in ("canary", "東京", "\\u6771", *server.secrets.values()):
            assert secret not in place
    if fault == "fault of ours":
        assert "KeyError at test_serve_logs" in said
    assert not (tmp_path / "content.jsonl").exists()


def lines(log: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in log.getvalue().splitlines() if line.startswith('{"id"')]


def test_a_line_says_what_was_applied(tmp_path: Path, log: io.StringIO) -> None:
    server = make_server(tmp_path)
    with running(server) as port:
        reply = call(
            port, "POST", CHAT, chat_body(dials={"safety": 0.6}), key=server.secrets["lab"]
        )
        call(port, "POST", CHAT, chat_body(dials={"safety": 9}), key=server.secrets["lab"])
    good, bad = lines(log)
    assert good["id"] == reply.json["id"] == reply.headers["x-request-id"]
    assert good["requested"] == {"safety": 0.6}
    assert good["effective"]["safety"] == {"level": 3, "value": 0.75}
    assert good["policy"] == server.rules().policy_hash[:12]
    assert good["model"] == server.model.hash[:12]
    assert (good["key"], good["scenario"], good["status"]) == ("lab", "general", 200)
    assert good["completion_tokens"] == len(server.engine.ids) + 1
    assert (bad["status"], bad["code"]) == (400, "invalid_dial")


def test_the_content_log_is_a_file_of_its_own(tmp_path: Path, log: io.StringIO) -> None:
    server = make_server(tmp_path, text=ANSWER, content_log=True)
    keys = json.loads(server.keys_file.read_text())
    keys["keys"][1]["content_log"] = False
    server.keys_file.write_text(json.dumps(keys))
    with running(server) as port:
        for name in ("lab", "kid"):
            call(port, "POST", CHAT, chat_body(CANARY), key=server.secrets[name])
    file = tmp_path / "content.jsonl"
    assert file.stat().st_mode & 0o777 == 0o600
    (row,) = [json.loads(line) for line in file.read_text().splitlines()]
    assert row["messages"] == [{"role": "user", "content": CANARY}]
    assert row["completions"] == [ANSWER]
    assert (row["key"], row["dials"]["scenario"]) == ("lab", "general")
    assert "canary" not in log.getvalue()


def test_a_content_log_that_others_can_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "content.jsonl"
    file.touch(0o644)
    file.chmod(0o644)
    with pytest.raises(ConfigError, match="chmod 600"):
        ContentLog(file, days=1)
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError):
        ContentLog(tmp_path / "link", days=1)
    with pytest.raises(ConfigError):
        ContentLog(tmp_path / "none" / "content.jsonl", days=1)


def job(text: str, created: int) -> Any:
    envelope = Envelope("id", created, "toy@general", {}, {}, "general", "p", "m", 1)
    return SimpleNamespace(envelope=envelope, key_id="k", messages=(Message("user", text),))


def test_half_a_row_is_not_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that is nearly full takes a part of what is written, and then nothing."""
    file, real, room = tmp_path / "content.jsonl", os.write, 10_000

    def write(descriptor: int, data: bytes) -> int:
        nonlocal room
        if not room:
            raise OSError(errno.ENOSPC, "full")
        n = real(descriptor, data[: min(7, room)])
        room -= n
        return n

    log = ContentLog(file, days=2, now=lambda: 0.0)
    monkeypatch.setattr(content_log.os, "write", write)
    log.write(job("first", 0), [])
    room = 20
    with pytest.raises(OSError, match="full"):
        log.write(job("lost", 0), [])
    room = 10_000
    log.write(job("last", 0), [])
    rows = [json.loads(row) for row in file.read_text().splitlines()]
    assert [row["messages"][0]["content"] for row in rows] == ["first", "last"]


def test_no_text_gets_older_than_was_allowed(tmp_path: Path) -> None:
    file, old = tmp_path / "content.jsonl", tmp_path / "content.jsonl.old"
    hour, clock = 3600.0, [0.0]

    def texts() -> list[str]:
        rows = [row for one in (old, file) if one.exists() for row in one.read_text().splitlines()]
        return [json.loads(row)["messages"][0]["content"] for row in rows]

    written: list[int] = []
    log = ContentLog(file, days=2, now=lambda: clock[0])
    for hour_ in range(0, 200, 5):
        clock[0] = hour_ * hour
        log.expire()
        log.write(job(str(hour_), int(clock[0])), [])
        written.append(hour_)
        kept = [int(text) for text in texts()]
        assert kept == [one for one in written if one >= kept[0]]  # in order, none lost between
        assert hour_ - kept[0] < 48
        assert hour_ < 24 or hour_ - kept[0] >= 19
    clock[0] += 25 * hour
    log.expire()
    clock[0] += 48 * hour
    log.expire()  # nobody has asked anything since
    assert texts() == [] and not old.exists()
    assert file.stat().st_mode & 0o777 == 0o600
    log.close()
    file.write_text("a letter to keep\n")
    with pytest.raises(ConfigError, match="no content log"):
        ContentLog(file, days=1)
    assert file.read_text() == "a letter to keep\n"
