"""The command itself, with a real (tiny) model: starts, answers, reloads, drains, phones nobody."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import pytest

from equipoise.cli.main import main
from equipoise.dials.dials import Dials
from equipoise.dials.tokens import install, save_dial_model
from equipoise.encoding.encode import Encoder
from equipoise.errors import ConfigError
from equipoise.models import load as models_load
from equipoise.policy.keys import add_key, digest, new_secret
from equipoise.policy.rules import Key
from equipoise.serve import main as serve_main
from equipoise.serve.http import listening
from serve_kit import call, chat_body, example_policy, policy_text, wait_for
from tuning_kit import tiny_policy

# Any attempt to reach another machine, or to look up a name, is printed.
_WATCHED = """
import sys
def watch(event, arguments):
    if event in ("socket.connect", "socket.sendto"):
        address = arguments[1]
        if not isinstance(address, tuple) or not str(address[0]).startswith(("127.", "::1")):
            print("OUTBOUND", event, address, file=sys.stderr, flush=True)
    if event in ("socket.getaddrinfo", "socket.gethostbyname"):
        if arguments[0] not in ("127.0.0.1", b"127.0.0.1", None):
            print("OUTBOUND", event, arguments, file=sys.stderr, flush=True)
sys.addaudithook(watch)
from equipoise.cli.main import main
main(sys.argv[1:])
"""


# Every step hangs, as on a device that has gone. A library's thread that comes back while Python is
# being taken down aborts the process, so it must not come to that: the last line would be printed.
_HANGING = """
import atexit, sys, threading
from equipoise.cli.main import main
from equipoise.engine import decode
decode.LiveRows.join = lambda *_: threading.Event().wait()
atexit.register(print, "taken down", file=sys.stderr, flush=True)
main(sys.argv[1:])
"""


@dataclass
class Served:
    process: subprocess.Popen[str]
    port: int
    key: str
    policy: Path
    said: list[str]
    """On stderr, which is the stream that is logged."""


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def save_toy(folder: Path) -> Path:
    """Write a tiny model with dials; return its directory."""
    policy = tiny_policy()
    manifest = install(policy.model, policy.tokenizer, dials=Dials(["helpfulness", "safety"], 5))
    save_dial_model(policy.model, policy.tokenizer, manifest, folder / "toy")
    assert Encoder(policy.tokenizer, manifest).has_chat_template
    return folder / "toy"


def start(folder: Path, program: str, *options: str, with_keys: bool = True) -> Served:
    """Start a server with a key in a file, or with the key that it prints."""
    model_dir = save_toy(folder)
    rules, keys, secret = folder / "policy.yaml", folder / "keys.json", new_secret()
    rules.write_text(policy_text(example_policy()))
    add_key(keys, Key(id="k", sha256=digest(secret), scenarios=("general",)))
    port = free_port()
    command = [sys.executable, "-c", program, "serve", str(model_dir), "--policy", str(rules),
               "--port", str(port), *options]  # fmt: skip
    command += ["--keys", str(keys)] if with_keys else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )
    said: list[str] = []
    assert process.stdout is not None and process.stderr is not None
    threading.Thread(target=said.extend, args=(process.stderr,), daemon=True).start()
    if not with_keys:
        secret = process.stdout.readline().strip()
    while True:
        assert process.poll() is None, said
        try:
            if call(port, "GET", "/healthz").status == 200:
                return Served(process, port, secret, rules, said)
        except OSError:
            time.sleep(0.1)


@contextmanager
def until_here(served: Served) -> Iterator[Served]:
    """Leave no process behind."""
    with served.process:
        try:
            yield served
        finally:
            served.process.kill()


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("process")
    with until_here(start(folder, _WATCHED, "--drain-seconds", "20")) as served:
        yield served


_NO_NETWORK = """
import fcntl, socket, struct, sys
with socket.socket() as any_socket:
    up = struct.pack("16sh22x", b"lo", 1)  # a new namespace has its loopback down
    fcntl.ioctl(any_socket, 0x8914, up)  # SIOCSIFFLAGS
    any_socket.settimeout(5)
    try:
        any_socket.connect(("192.0.2.1", 80))
        sys.exit("there is a route")
    except OSError:
        pass
import pytest
sys.exit(pytest.main(["-p", "no:cacheprovider", *sys.argv[1:]]))
"""


def unshare() -> list[str]:
    """Return the beginning of a command that runs without a network."""
    command = ["unshare", "--user", "--map-root-user", "--net"]
    if shutil.which("unshare") is None:
        pytest.skip("no `unshare` here")
    tried = subprocess.run([*command, "true"], capture_output=True, text=True)
    if tried.returncode:
        pytest.skip(f"no network namespaces here: {tried.stderr.strip()}")
    return command


@pytest.mark.nightly
def test_all_of_it_runs_without_a_route_to_anywhere() -> None:
    """The test below, in a network namespace that has nothing but its own loopback."""
    test = f"{__file__}::{test_the_whole_life_of_a_server.__name__}"
    done = subprocess.run(
        [*unshare(), sys.executable, "-c", _NO_NETWORK, test], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout


def test_the_whole_life_of_a_server(served: Served) -> None:
    """One test, as each start costs seconds."""
    port, key = served.port, served.key
    client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key=key, max_retries=0)
    asked = {"model": "toy", "seed": 5, "max_tokens": 12, "extra_body": {"dials": {"safety": 1}}}
    whole = client.chat.completions.create(
        messages=[{"role": "user", "content": "canary-91 hello"}], **asked
    )  # type: ignore[call-overload]
    stream = client.chat.completions.create(
        messages=[{"role": "user", "content": "canary-91 hello"}], stream=True, **asked
    )  # type: ignore[call-overload]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == whole.choices[0].message.content != ""
    assert whole.model_extra["dials"]["effective"]["safety"]["level"] == 4

    # The policy changes under it; SIGHUP only makes it look again.
    policy = example_policy(max_tokens=200)
    policy["scenarios"]["general"]["default"]["safety"] = 0.75
    served.policy.write_text(policy_text(policy))
    served.process.send_signal(signal.SIGHUP)
    reply = call(port, "POST", "/v1/chat/completions", chat_body("hi", max_tokens=1), key=key)
    assert reply.json["dials"]["effective"]["safety"]["level"] == 3

    # SIGTERM in the middle of an answer: it is finished, and the process ends with 0.
    long = chat_body("hi", stream=True, max_tokens=200, seed=1)
    body = json.dumps(long).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        f"Authorization: Bearer {key}\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode()
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(head + body)
        received = connection.recv(100)
        served.process.send_signal(signal.SIGTERM)
        while piece := connection.recv(65536):
            received += piece
    assert b"data: [DONE]" in received
    assert served.process.wait(60) == 0
    time.sleep(0.1)
    said = "".join(served.said)
    assert "OUTBOUND" not in said
    assert "canary" not in said and key not in said
    assert said.count('"status": 200') >= 4


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "0.0.0.0"])
def test_a_busy_port_is_said_before_the_model_is_loaded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], host: str
) -> None:
    keys = tmp_path / "keys.json"
    add_key(keys, Key(id="k", sha256=digest("x")))
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = str(busy.getsockname()[1])
        with pytest.raises(SystemExit) as ended:
            main(["serve", "nowhere", "--policy", "example", "--keys", str(keys),
                  "--host", host, "--port", port])  # fmt: skip
    said = capsys.readouterr()
    assert ended.value.code == 1 and said.out == ""
    assert f"cannot listen on {host}, port {port}" in said.err
    assert "Address already in use" in said.err and "--port" in said.err
    assert "Errno" not in said.err and "/v1 with policy" not in said.err


@pytest.mark.parametrize("host", ["192.0.2.1", "nowhere.invalid"])
def test_an_address_of_another_machine_is_said(host: str) -> None:
    with pytest.raises(ConfigError, match="cannot listen on"), listening(host, free_port()):
        pass


def test_success_and_key_are_printed_once_it_listens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The port may be taken while the model is loaded."""
    monkeypatch.delenv("EQUIPOISE_KEYS", raising=False)
    monkeypatch.setattr(serve_main, "log_to_stderr", lambda: None)
    model_dir, load = save_toy(tmp_path), models_load.load_causal
    with socket.socket() as busy:
        busy.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        busy.bind(("127.0.0.1", 0))

        def taken(name: str) -> Any:
            busy.listen()
            return load(name)

        monkeypatch.setattr(models_load, "load_causal", taken)
        with pytest.raises(SystemExit) as ended:
            main(["serve", str(model_dir), "--policy", "example",
                  "--port", str(busy.getsockname()[1])])  # fmt: skip
    said = capsys.readouterr()
    assert ended.value.code == 1 and said.out == ""
    assert "cannot listen on" in said.err and "/v1 with policy" not in said.err


def test_a_start_warns_of_keys_for_scenarios_that_are_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "equipoise.serve")
    monkeypatch.setattr(serve_main, "run_app", lambda app, **_: None)
    monkeypatch.setattr(serve_main, "log_to_stderr", lambda: None)
    keys = tmp_path / "keys.json"
    add_key(keys, Key(id="k", sha256=digest("x"), scenarios=("nope",)))
    command = ["serve", str(save_toy(tmp_path)), "--policy", "example", "--keys", str(keys)]
    with pytest.raises(SystemExit) as ended:
        main([*command, "--port", str(free_port())])
    assert not ended.value.code
    assert "key k: the policy has no scenario nope" in caplog.text


def test_a_start_without_keys_prints_one_and_ends_though_every_step_hangs(tmp_path: Path) -> None:
    with until_here(start(tmp_path, _HANGING, "--drain-seconds", "1", with_keys=False)) as served:
        port, key = served.port, served.key
        assert key.startswith("eqp-")
        assert call(port, "GET", "/readyz", key=key).status == 200
        waiting = threading.Thread(target=hang_up_with, args=(port, key), daemon=True)
        waiting.start()
        page = ""
        while "equipoise_completions_under_way 1.0\n" not in page:
            page = call(port, "GET", "/metrics", key=key).body.decode()
        arguments = Path(f"/proc/{served.process.pid}/cmdline")
        if arguments.exists():  # A12: what `ps` shows to everybody
            assert key.encode() not in arguments.read_bytes()
        served.process.send_signal(signal.SIGTERM)
        assert served.process.wait(120) == 0
        waiting.join(60)
        assert served.process.stdout is not None
        assert served.process.stdout.read() == ""  # shown once
        wait_for(lambda: "given up" in "".join(served.said), "stderr is read")
        said = "".join(served.said)
        assert key not in said and "taken down" not in said


def hang_up_with(port: int, key: str) -> None:
    with suppress(OSError, http.client.HTTPException):
        call(port, "POST", "/v1/chat/completions", chat_body("hi"), key=key)
