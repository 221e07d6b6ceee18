"""The gate before every route: host, key, sizes, rate. Nothing but ``/healthz`` is open.

Preflights of pages that the operator has listed need no key; see :mod:`equipoise.serve.cors`.

Middleware around all routes, so that a route cannot be added without it, and deny by default: a
path that is no route is answered 401 without a key as well. It is also the one place where errors
become responses and where a request is logged: sizes, dials and hashes, never a text or a key.
"""

from __future__ import annotations

import asyncio
import json
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from starlette.responses import Response

from equipoise.policy import keys
from equipoise.policy.reload import Rules
from equipoise.protocol.replies import RefusedError, json_bytes
from equipoise.serve.cors import Cors
from equipoise.serve.limits import RateLimit
from equipoise.serve.metrics import Metrics

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from equipoise.policy.rules import Key

_log = logging.getLogger("equipoise.serve")

OPEN_PATH = "/healthz"
VISIT = "equipoise.visit"
"""Where the gate leaves the :class:`Visit` in the ASGI scope."""
CLIENT_LEFT = 499
MAX_BODY_BYTES = 1 << 20
MAX_HEADER_BYTES = 32 << 10
BODY_SECONDS = 30.0


class ClientLeftError(Exception):
    """Nobody is there any more to read the answer."""


@dataclass
class Visit:
    """A request on its way; key, rules and body are set once it has passed the gate."""

    id: str
    log: dict[str, Any]
    """Fields of its log line."""
    headers: dict[bytes, bytes] = field(default_factory=dict)
    """Further headers of its response, a refusal too."""
    key: Key = field(init=False)
    rules: Rules = field(init=False)
    body: bytes = b""


class Gate:
    """ASGI middleware; see the module.

    Args:
        app: What stands behind it.
        rules: Returns the rules in force, ``None`` if there are none.
        hosts: Values of the ``Host`` header that are served, without port, lower case.
        rate: Counts requests per key.
        model_hash: Named in every response to a key, beside the hash of the policy.
        metrics: Counts responses.
        cors: Says which pages of other origins may read what is answered; ``None``: none.
    """

    def __init__(
        self,
        app: ASGIApp,
        rules: Callable[[], Rules | None],
        *,
        hosts: frozenset[str],
        rate: RateLimit,
        model_hash: str,
        metrics: Metrics,
        cors: Cors | None,
    ) -> None:
        self._app, self._rules = app, rules
        self._hosts, self._rate, self._metrics = hosts, rate, metrics
        self._model_hash, self._cors = model_hash, cors

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or refuse it."""
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        start, request_id = time.monotonic(), f"chatcmpl-{secrets.token_hex(12)}"
        visit = Visit(request_id, {"id": request_id})
        always = [(b"x-request-id", request_id.encode()), (b"x-content-type-options", b"nosniff")]
        always += self._cors.headers(scope) if self._cors else []
        status, is_whole = 0, False

        async def noted(message: Message) -> None:
            nonlocal status, is_whole
            is_whole = message["type"] == "http.response.body" and not message.get("more_body")
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message.get("headers", ()), *always, *visit.headers.items()]
                message = {**message, "headers": headers}
            await send(message)

        try:
            await self._pass(scope, receive, noted, visit)
        except ClientLeftError:
            status = CLIENT_LEFT
        except Exception as error:
            refused = error if isinstance(error, RefusedError) else None
            if refused is None:
                # An unknown error's message may quote a prompt: only its kind and place are kept.
                visit.log["fault"] = _place(error)
                refused = RefusedError(500, "a fault of the server", code="internal_error")
            visit.log["code"] = refused.code
            if not status:
                body, kind = json_bytes(refused.body()), "application/json"
                answer = Response(body, refused.status, refused.headers, media_type=kind)
                await answer(scope, receive, noted)
            elif not is_whole:
                raise RuntimeError("the response broke off") from None
        finally:
            self._metrics.responses.labels(status or CLIENT_LEFT).inc()
            if "code" in visit.log:
                self._metrics.refusals.labels(visit.log["code"]).inc()
            visit.log |= {"status": status, "ms": round((time.monotonic() - start) * 1e3, 1)}
            level = logging.ERROR if "fault" in visit.log else logging.INFO
            _log.log(level, "%s", json.dumps(visit.log))

    async def _pass(self, scope: Scope, receive: Receive, send: Send, visit: Visit) -> None:
        if scope["path"] == OPEN_PATH and scope["method"] in ("GET", "HEAD"):
            await self._app(scope, receive, send)
            return
        self._check_host(scope)
        _check_headers(scope)
        preflight = self._cors.preflight(scope) if self._cors else None
        if preflight is not None:
            await send({"type": "http.response.start", "status": 204, "headers": preflight})
            await send({"type": "http.response.body"})
            return
        self._recognise(scope, visit)
        limits = visit.rules.policy.limits
        self._rate.take(visit.key.id, visit.key.requests_per_minute or limits.requests_per_minute)
        visit.body = await read_body(receive)
        # A body may take its time: what was revoked or changed meanwhile holds for it too.
        if self._rules() is not visit.rules:
            self._recognise(scope, visit)
        await self._app({**scope, VISIT: visit}, receive, send)

    def _recognise(self, scope: Scope, visit: Visit) -> None:
        """Find the rules in force and whose request it is; note both for log and headers."""
        visit.headers.clear()
        rules = self._rules()
        if rules is None:
            raise RefusedError(
                503, "no dial policy is in force; the operator must repair it", code="no_policy"
            )
        visit.rules, visit.key = rules, _authenticate(scope, rules)
        visit.log["key"] = visit.key.id
        visit.headers[b"x-dial-policy"] = rules.policy_hash.encode("ascii")
        visit.headers[b"x-dial-model"] = self._model_hash.encode("ascii")

    def _check_host(self, scope: Scope) -> None:
        text = _only_header(scope, b"host").lower()
        name, _, port = text.rpartition(":")
        host = name if name and port.isdigit() else text
        if host.strip("[]") not in self._hosts:
            # A page elsewhere whose name was made to point here (DNS rebinding) is stopped by this.
            raise RefusedError(
                421, "this name is not served; see --allow-host", code="unknown_host"
            )


async def read_body(
    receive: Receive, *, limit: int = MAX_BODY_BYTES, seconds: float = BODY_SECONDS
) -> bytes:
    """Return the request's body, counted while it is read.

    Raises:
        ClientLeftError: Before the body was whole.
        RefusedError: 413 at the first byte too many, 408 if it takes too long.
    """
    body, more, close = bytearray(), True, {"connection": "close"}
    try:
        async with asyncio.timeout(seconds):
            while more:
                message: Message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientLeftError
                body += message.get("body", b"")
                more = message.get("more_body", False)
                if len(body) > limit:
                    text = f"the body holds more than {limit} bytes"
                    raise RefusedError(413, text, code="body_too_large", headers=close)
    except TimeoutError:
        text = "the body took too long"
        raise RefusedError(408, text, code="body_timeout", headers=close) from None
    return bytes(body)


def _check_headers(scope: Scope) -> None:
    """Refuse headers above 32 KiB in all (431) and request bodies that are packed (415)."""
    size = sum(len(name) + len(value) + 4 for name, value in scope["headers"])
    size += len(scope.get("raw_path") or b"") + len(scope["query_string"])
    if size > MAX_HEADER_BYTES:
        text = f"the headers hold more than {MAX_HEADER_BYTES} bytes"
        raise RefusedError(431, text, code="headers_too_large")
    packed = [value for name, value in scope["headers"] if name == b"content-encoding"]
    if any(value.strip().lower() not in (b"", b"identity") for value in packed):
        text = "packed request bodies are not taken; send plain JSON"
        raise RefusedError(415, text, code="packed_body")


def _only_header(scope: Scope, name: bytes) -> str:
    """Return the value of a header that stands there once, else nothing."""
    values = [value for one, value in scope["headers"] if one == name]
    return values[0].decode("latin-1") if len(values) == 1 else ""


def _authenticate(scope: Scope, rules: Rules) -> Key:
    scheme, _, secret = _only_header(scope, b"authorization").partition(" ")
    # Looked up whatever was shown, so that all failures take alike long.
    key = keys.find(rules.keys, secret.strip())
    if key is None or scheme.lower() != "bearer":
        text, headers = (
            "a valid key is needed: Authorization: Bearer KEY",
            {"www-authenticate": "Bearer"},
        )
        raise RefusedError(401, text, code="invalid_api_key", headers=headers)
    return key


def _place(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    name = trace.tb_frame.f_globals.get("__name__", "?") if trace is not None else "?"
    line = trace.tb_lineno if trace is not None else 0
    return f"{type(error).__name__} at {name}:{line}"
