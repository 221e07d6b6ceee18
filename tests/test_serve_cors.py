"""Health checks by HEAD, and pages of other origins: those that are listed, none by default."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest

from equipoise.cli.main import main
from equipoise.errors import ConfigError
from equipoise.policy.keys import revoke_key
from equipoise.serve.cors import check_origin
from serve_kit import Reply, Server, ask, call, chat_body, make_server, running

CHAT = "/v1/chat/completions"
PAGE, OTHER = "https://app.example", "https://evil.example"
ASKED = "access-control-request-"
ALLOWED = "access-control-allow-origin"
READS = ["/healthz", "/readyz", "/metrics", "/openapi.json", "/v1/models", "/v1/models/toy"]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Server:
    return make_server(
        tmp_path_factory.mktemp("cors"), cors_origins=(PAGE, "http://localhost:3000")
    )


def send(
    server: Server,
    method: str,
    path: str,
    *,
    origin: str = "",
    key: bool = False,
    asked: dict[str, str] | None = None,
) -> Reply:
    headers = [("origin", origin)] if origin else []
    headers += [(ASKED + name, value) for name, value in (asked or {}).items()]
    body = chat_body() if method == "POST" else None
    shown = server.secrets["lab"] if key else None

    async def one() -> Reply:
        await server.engine.start()
        return await ask(server.app, body, method=method, path=path, key=shown, headers=headers)

    return asyncio.run(one())


def preflight(server: Server, path: str = CHAT, *, origin: str = PAGE, **asked: str) -> Reply:
    return send(server, "OPTIONS", path, origin=origin, asked=asked)


def cors_of(reply: Reply) -> set[str]:
    return {name for name in reply.headers if name.startswith("access-control-")}


# --- HEAD ---------------------------------------------------------------------------------------


def test_head_is_get_without_a_body(tmp_path: Path) -> None:
    server = make_server(tmp_path)
    with running(server) as port:
        for path in READS:
            key = None if path == "/healthz" else server.secrets["lab"]
            got, head = (call(port, method, path, key=key) for method in ("GET", "HEAD"))
            assert (head.status, head.body) == (200, b""), path
            same = ("content-type", "content-length", "x-dial-policy")
            assert [head.headers.get(n) for n in same] == [got.headers.get(n) for n in same]
            if key is not None:
                refused = call(port, "HEAD", path)
                assert (refused.status, refused.body) == (401, b"")
        assert call(port, "HEAD", CHAT, key=server.secrets["lab"]).status == 405
        server.api.draining = True
        assert call(port, "HEAD", "/readyz", key=server.secrets["lab"]).status == 503


# --- without a list -----------------------------------------------------------------------------


def test_by_default_no_page_elsewhere_gets_anything(tmp_path: Path) -> None:
    server = make_server(tmp_path)
    for origin in (PAGE, "null", "http://localhost", "*"):
        asked = preflight(server, origin=origin, method="POST")
        assert asked.status == 401
        for reply in (asked, send(server, "POST", CHAT, origin=origin, key=True)):
            assert not cors_of(reply) and "vary" not in reply.headers


# --- with one -----------------------------------------------------------------------------------


def test_a_listed_page_reads_answers_and_what_they_say_of_the_dials(server: Server) -> None:
    reply = send(server, "POST", CHAT, origin=PAGE, key=True)
    assert (reply.status, reply.headers[ALLOWED], reply.headers["vary"]) == (200, PAGE, "Origin")
    exposed = reply.headers["access-control-expose-headers"].split(", ")
    said = {name for name in reply.headers if name.startswith("x-dial-")}
    assert len(said) == 5 and said | {"x-request-id", "retry-after"} == set(exposed)
    assert cors_of(reply) == {ALLOWED, "access-control-expose-headers"}  # no credentials


@pytest.mark.parametrize(
    "origin",
    [OTHER, "null", "*", "", "http://app.example", "https://app.example:8443", f"{PAGE}/",
     "https://APP.example", "https://app.example.evil.example", "https://sub.app.example",
     f"{PAGE} {PAGE}", f"{PAGE}, {OTHER}", "http://localhost", "\xff"],
)  # fmt: skip
def test_no_other_page_does(server: Server, origin: str) -> None:
    for method, path, key in (("POST", CHAT, True), ("GET", "/healthz", False)):
        reply = send(server, method, path, origin=origin, key=key)
        assert reply.status == 200
        assert not cors_of(reply) and reply.headers["vary"] == "Origin"
    asked = preflight(server, origin=origin, method="POST")
    assert asked.status == 401 and not cors_of(asked)


def test_two_origins_are_none(server: Server) -> None:
    headers = [("origin", PAGE), ("origin", PAGE), (f"{ASKED}method", "POST")]
    for method, status in (("OPTIONS", 401), ("GET", 401)):
        reply = asyncio.run(ask(server.app, method=method, path=CHAT, headers=headers))
        assert reply.status == status and not cors_of(reply)


def test_refusals_can_be_read_by_the_page(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    replies = [
        (401, send(server, "POST", CHAT, origin=PAGE)),
        (404, send(server, "GET", "/nowhere", origin=PAGE, key=True)),
        (405, send(server, "PUT", CHAT, origin=PAGE, key=True)),
    ]
    with monkeypatch.context() as context:
        context.setattr(server.api, "draining", True)
        replies.append((503, send(server, "POST", CHAT, origin=PAGE, key=True)))
    with monkeypatch.context() as context:
        context.setattr(server.engine, "load", lambda: 1 / 0)
        replies.append((500, send(server, "POST", CHAT, origin=PAGE, key=True)))
    for status, reply in replies:
        assert (reply.status, reply.headers[ALLOWED]) == (status, PAGE)


def test_a_preflight_needs_no_key(server: Server) -> None:
    concrete = {
        (method, route.path.replace("{name}", "toy"))
        for route in server.app.routes
        for method in route.methods  # type: ignore[attr-defined]
    }
    sent = "authorization,content-type,x-stainless-lang,openai-organization"
    before = len(server.engine.seen)
    for method, path in concrete:
        reply = preflight(server, path, method=method, headers=sent)
        assert (reply.status, reply.body) == (204, b""), (method, path)
        assert reply.headers[ALLOWED] == PAGE
        assert method in reply.headers["access-control-allow-methods"].split(", ")
        assert reply.headers["access-control-allow-headers"].split(", ") == sent.split(",")
        assert "access-control-allow-credentials" not in reply.headers
        assert preflight(server, path, method=method).status == 204
    assert len(server.engine.seen) == before


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        ("/nowhere", {"method": "GET"}),
        (f"{CHAT}/", {"method": "POST"}),
        ("/v1/models/a/b", {"method": "GET"}),
        (CHAT, {}),
        (CHAT, {"method": "GET"}),
        (CHAT, {"method": "post"}),
        (CHAT, {"method": "DELETE"}),
        (CHAT, {"method": "POST", "headers": "authorization, x-evil"}),
        (CHAT, {"method": "POST, GET"}),
        (CHAT, {"method": "POST", "headers": "cookie"}),
        (CHAT, {"method": "POST", "headers": "x-stainless-a\r\nset-cookie: b"}),
    ],
)
def test_other_preflights_are_refused_as_any_request(
    server: Server, path: str, asked: dict[str, str]
) -> None:
    reply = preflight(server, path, **asked)
    assert reply.status == 401
    assert cors_of(reply) == {ALLOWED, "access-control-expose-headers"}


def test_an_origin_is_no_key_and_a_revoked_key_stays_revoked(tmp_path: Path) -> None:
    server = make_server(tmp_path, cors_origins=(PAGE,))
    assert send(server, "GET", "/v1/models", origin=PAGE, key=True).status == 200
    revoke_key(server.keys_file, "lab")
    assert preflight(server, "/v1/models", method="GET").status == 204
    assert send(server, "GET", "/v1/models", origin=PAGE, key=True).status == 401


def test_a_browser_at_a_socket(tmp_path: Path) -> None:
    server = make_server(tmp_path, cors_origins=(PAGE,))
    key = server.secrets["lab"]
    headers = {"Origin": PAGE}
    with running(server) as port:
        asked = {f"{ASKED}method": "POST", f"{ASKED}headers": "authorization,content-type"}
        reply = call(port, "OPTIONS", CHAT, headers=headers | asked)
        assert (reply.status, reply.body) == (204, b"")
        stream = call(port, "POST", CHAT, chat_body(stream=True), key=key, headers=headers)
        assert stream.headers[ALLOWED] == PAGE and b"[DONE]" in stream.body
        evil = call(port, "OPTIONS", CHAT, headers=headers | asked | {"Host": "evil.example"})
        assert evil.status == 421


def test_a_preflight_is_logged_without_its_origin(
    server: Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "equipoise.serve")
    preflight(server, method="POST")
    (line,) = caplog.messages
    assert set(json.loads(line)) == {"id", "status", "ms"}


# --- the option ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "origin",
    ["https://a.example", "http://localhost:3000", "http://127.0.0.1:8080", "http://[::1]:3000",
     "https://xn--bcher-kva.example", "tauri://localhost", "chrome-extension://abcdefgh"],
)  # fmt: skip
def test_an_origin_is_scheme_host_and_port(origin: str) -> None:
    check_origin(origin)


@pytest.mark.parametrize(
    "origin",
    ["*", "null", "", "a.example", "https://", "https://a.example/", "https://a.example/chat",
     "https://a.example?x", "https://*.example", "https://A.example", "HTTPS://a.example",
     "https://me@a.example", "https://bücher.example", "https://a.example:443",
     "http://a.example:80", "https://a.example:0443", "https://a.example:99999",
     "https://a.example ", "https://a.example,https://b.example", "file://", "https://a.example\n"],
)  # fmt: skip
def test_anything_else_is_refused_before_the_model_is_loaded(
    origin: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ConfigError) as caught:
        check_origin(origin)
    assert "--cors-origin https://" in caught.value.fix
    options = ["--policy", "example", "--cors-origin", "https://a.example"]
    with pytest.raises(SystemExit) as ended:
        main(["serve", "nowhere", *options, "--cors-origin", origin])
    assert ended.value.code == 1
    assert "cannot be an origin" in capsys.readouterr().err
