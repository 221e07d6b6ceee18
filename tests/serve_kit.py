"""A server for tests: fake engine with scripted ids, small policy, two keys, a real uvicorn."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from starlette.applications import Starlette

from equipoise.dials.dials import Dials
from equipoise.dials.manifest import DialManifest, control_tokens
from equipoise.encoding.encode import Encoder
from equipoise.engine.seam import Generation, Load, Token
from equipoise.policy.file import shipped_policies
from equipoise.policy.keys import add_key, digest, new_secret
from equipoise.policy.reload import Rules, RulesSource
from equipoise.policy.rules import Key
from equipoise.serve.app import Api, build_app
from equipoise.serve.content_log import ContentLog
from equipoise.serve.http import on_loopback
from equipoise.serve.prepare import ServedModel
from tokenizer_kit import byte_bpe

ATTRIBUTES = ("helpfulness", "safety")
LEVELS = 5
HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})
ANSWER = "Naïve 東京 🙂 answer, e\u0301 and more."


def dialled(tokenizer: Any) -> Encoder:
    """Return an encoder with dials on a tokenizer."""
    tokens = control_tokens(Dials(ATTRIBUTES, LEVELS))
    tokenizer.add_tokens(tokens, special_tokens=True)
    ids = [tokenizer.convert_tokens_to_ids(token) for token in tokens]
    half = LEVELS + 1
    manifest = DialManifest(
        attributes=ATTRIBUTES,
        levels=LEVELS,
        token_ids={"helpfulness": tuple(ids[:LEVELS]), "safety": tuple(ids[half : half + LEVELS])},
        auto_ids={"helpfulness": ids[LEVELS], "safety": ids[-1]},
        tokenizer_hash="0",
        tied=True,
    )
    return Encoder(tokenizer, manifest)


def served_model(encoder: Encoder | None = None, *, context: int = 4096) -> ServedModel:
    """Return what the server knows of a model that is not there."""
    encoder = encoder or dialled(byte_bpe())
    return ServedModel(
        name="toy",
        hash="ab" * 32,
        encoder=encoder,
        dials=Dials(ATTRIBUTES, LEVELS),
        vocab_size=len(encoder.tokenizer),
        context=context,
    )


@dataclass
class FakeEngine:
    """Answers every generation with the same ids, with ``slots`` at once and a delay per token."""

    ids: Sequence[int]
    slots: int = 4
    delay: float = 0.0
    fail_at: int | None = None
    """Token index at which sampling raises."""
    healthy: bool = True
    endless: bool = False
    seen: list[Generation] = field(default_factory=list)
    finished: int = 0
    _running: int = 0
    _queued: int = 0
    _free: asyncio.Semaphore | None = None
    loop: asyncio.AbstractEventLoop | None = None

    async def start(self) -> None:
        self._free = asyncio.Semaphore(self.slots)
        self.loop = asyncio.get_running_loop()

    async def drain(self, seconds: float) -> None:
        self.healthy = False

    def load(self) -> Load:
        return Load(self._running, self._queued, self.slots)

    async def stream(self, generation: Generation) -> AsyncIterator[Token]:
        assert self._free is not None
        self.seen.append(generation)
        self._queued += 1
        try:
            await self._free.acquire()
        finally:
            self._queued -= 1
        self._running += 1
        try:
            limit = generation.sampling.max_tokens
            at = 0
            while at < limit and (self.endless or at < len(self.ids)):
                await asyncio.sleep(self.delay)
                if at == self.fail_at:
                    raise RuntimeError("CANARY of the engine at /secret/path 0xdeadbeef")
                at += 1
                is_last = at == limit
                self.finished += is_last  # before the last token: nobody asks for more after it
                yield Token(self.ids[(at - 1) % len(self.ids)], "length" if is_last else None)
                if is_last:
                    return
            self.finished += 1
            yield Token(-1, "stop")
        finally:
            self._running -= 1
            self._free.release()


@dataclass
class Server:
    """The application and everything around it that a test may want to move."""

    app: Starlette
    api: Api
    engine: FakeEngine
    source: RulesSource
    model: ServedModel
    policy_file: Path
    keys_file: Path
    secrets: dict[str, str]
    """Name of a key to what its client sends."""

    def rules(self) -> Rules:
        rules = self.source.current()
        assert rules is not None
        return rules


def example_policy(**limits: Any) -> dict[str, Any]:
    """Return the shipped example as plain data, with other limits."""
    policy: dict[str, Any] = yaml.safe_load(shipped_policies()["example"].read_text("utf-8"))
    policy["limits"] |= {"requests_per_minute": 1_000_000, **limits}
    return policy


def policy_text(policy: object) -> str:
    """Return a policy as it is written to a file: closed, so that it is in force at once."""
    return yaml.safe_dump(policy, explicit_end=True)


def make_server(
    folder: Path,
    *,
    text: str = ANSWER,
    limits: dict[str, Any] | None = None,
    content_log: bool = False,
    now_ns: Callable[[], int] = time.monotonic_ns,
    model: ServedModel | None = None,
    cors_origins: Sequence[str] = (),
    **engine: Any,
) -> Server:
    """Return a server with the example policy and two keys.

    ``lab`` may use all scenarios (its default is ``general``); ``kid`` only ``kids``.
    """
    model = model or served_model()
    policy_file, keys_file = folder / "policy.yaml", folder / "keys.json"
    policy = example_policy(**(limits or {}))
    policy_file.write_text(policy_text(policy), "utf-8")
    policy_file.chmod(0o644)
    secrets_ = {"lab": new_secret(), "kid": new_secret()}
    scenarios = {
        "lab": ("general", *(name for name in policy["scenarios"] if name != "general")),
        "kid": ("kids",),
    }
    for name, secret in secrets_.items():
        add_key(keys_file, Key(id=name, sha256=digest(secret), scenarios=scenarios[name]))
    ids = model.encoder.completion_ids(text, finished=False)
    fake = FakeEngine(ids, **engine)
    source = RulesSource(policy_file, keys_file, dials=Dials(ATTRIBUTES, LEVELS))
    log = ContentLog(folder / "content.jsonl", days=1) if content_log else None
    api = Api(model, fake, log)
    app = build_app(api, source.current, hosts=HOSTS, cors_origins=cors_origins, now_ns=now_ns)
    return Server(app, api, fake, source, model, policy_file, keys_file, secrets_)


@contextlib.contextmanager
def running(server: Server) -> Iterator[int]:
    """Run a server behind a real uvicorn on loopback; yields its port."""
    with on_loopback(server.app) as port:
        yield port


@dataclass(frozen=True)
class Reply:
    """What came back of a plain HTTP request."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)


def call(
    port: int,
    method: str,
    path: str,
    body: object = None,
    *,
    key: str | None = None,
    headers: dict[str, str] | None = None,
) -> Reply:
    """Send one request without a client library in between."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    sent = {"Authorization": f"Bearer {key}"} if key is not None else {}
    data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
    try:
        connection.request(method, path, data, sent | (headers or {}))
        answer = connection.getresponse()
        pairs = {name.lower(): value for name, value in answer.getheaders()}
        return Reply(answer.status, pairs, answer.read())
    finally:
        connection.close()


async def ask(
    app: Any,
    body: bytes | object = None,
    *,
    method: str = "POST",
    path: str = "/v1/chat/completions",
    key: str | None = None,
    headers: Sequence[tuple[str, str]] = (),
    query: str = "",
    host: str = "localhost",
    halfway: Callable[[], None] | None = None,
    reads: int | None = None,
) -> Reply:
    """Call an application without a socket; the client stays until it has everything.

    ``halfway`` is called when half of the body has come; after ``reads`` messages the client reads
    no more.
    """
    data = body if isinstance(body, bytes) else json.dumps(body).encode() if body else b""
    given = [("host", host), *headers]
    if key is not None:
        given.append(("authorization", f"Bearer {key}"))
    scope = {
        "type": "http", "asgi": {"version": "3.0", "spec_version": "2.3"}, "http_version": "1.1",
        "method": method, "scheme": "http", "path": path, "raw_path": path.encode(),
        "query_string": query.encode(), "root_path": "", "client": ("127.0.0.1", 1),
        "server": ("127.0.0.1", 80),
        "headers": [(name.encode("latin-1"), value.encode("latin-1")) for name, value in given],
    }  # fmt: skip
    half = len(data) // 2 if halfway else 0
    incoming = [{"type": "http.request", "body": data[half:], "more_body": False}]
    sent: list[Any] = []

    async def receive() -> Any:
        nonlocal halfway
        if halfway is not None:
            halfway, happened = None, halfway
            happened()
            return {"type": "http.request", "body": data[:half], "more_body": True}
        if incoming:
            return incoming.pop()
        return await asyncio.Event().wait()

    async def send(message: Any) -> None:
        if reads is not None and len(sent) == reads:
            await asyncio.Event().wait()
        sent.append(message)

    await app(scope, receive, send)
    start = sent[0]
    pairs = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in start["headers"]}  # fmt: skip  # noqa: E501
    return Reply(start["status"], pairs, b"".join(item.get("body", b"") for item in sent[1:]))


def wait_for(happened: Callable[[], bool], what: str) -> None:
    """Wait for something that other threads do; generous, as the machine may be busy."""
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def chat_body(text: str = "Hello", **more: Any) -> dict[str, Any]:
    """Return the smallest chat request."""
    return {"model": "toy", "messages": [{"role": "user", "content": text}], **more}
