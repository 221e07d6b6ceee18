"""The gate before every route: host, key, sizes, rate. Nothing but ``/healthz`` is open.

Preflights of pages that the operator has listed need no key; see :mod:`equipoise.serve.cors`.

Plain ASGI around the whole app, so that a route cannot be added without it, and deny by default: a
path that is no route is answered 401 without a key as well. It is also the one place where errors
become responses and where a request is logged: sizes, dials and hashes, never a text or a key.
"""

from __future__ import annotations

import json
import logging
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from equipoise.policy import keys
from equipoise.policy.reload import Rules
from equipoise.protocol.failures import RefusedError, internal_error, json_bytes
from equipoise.serve.cors import Cors
from equipoise.serve.limits import RateLimit, check_headers, read_body
from equipoise.serve.metrics import Metrics
from equipoise.serve.running import ClientLeftError

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from equipoise.policy.decide import Key

_log = logging.getLogger("equipoise.serve")

OPEN_PATH = "/healthz"
VISIT = "equipoise.visit"
"""Where the gate leaves the :class:`Visit` in the ASGI scope."""
CLIENT_LEFT = 499
_NO_SNIFF = (b"x-content-type-options", b"nosniff")


@dataclass
class Visit:
    """A request that passed the gate."""

    id: str
    key: Key
    rules: Rules
    body: bytes
    log: dict[str, Any] = field(default_factory=dict)
    """Further fields of its log line."""


class Gate:
    """ASGI middleware; see the module.

    Args:
        app: What stands behind it.
        rules: Returns the rules in force, ``None`` if there are none.
        hosts: Values of the ``Host`` header that are served, without port, lower case.
        rate: Counts requests per key.
        model_hash: Named in every response to a key, beside the hash of the policy.
        metrics: Counts responses.
        cors: Says which pages of other origins may read what is answered.
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
        cors: Cors,
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
        request_id, start = f"chatcmpl-{secrets.token_hex(12)}", time.monotonic()
        record: dict[str, Any] = {"id": request_id}
        known: dict[bytes, bytes] = {}
        status, is_whole = 0, False

        async def noted(message: Message) -> None:
            nonlocal status, is_whole
            is_whole = message["type"] == "http.response.body" and not message.get("more_body")
            if message["type"] == "http.response.start":
                status = message["status"]
                extra = ((b"x-request-id", request_id.encode()), _NO_SNIFF, *known.items())
                extra += tuple(self._cors.headers(scope))
                message = {**message, "headers": [*message.get("headers", ()), *extra]}
            await send(message)

        try:
            await self._pass(scope, receive, noted, record, known)
        except ClientLeftError:
            status = CLIENT_LEFT
        except RefusedError as error:
            record["code"] = error.code
            await _send_error(noted, error)
        except Exception as error:
            # The message of an unknown error may quote a prompt: only its kind and place are kept.
            record |= {"fault": _place(error), "code": "internal_error"}
            if not status:
                await _send_error(noted, internal_error())
            elif not is_whole:
                raise RuntimeError("the response broke off") from None
        finally:
            self._metrics.responses[status or CLIENT_LEFT] += 1
            if "code" in record:
                self._metrics.refusals[record["code"]] += 1
            record |= {"status": status, "ms": round((time.monotonic() - start) * 1e3, 1)}
            _log.log(logging.ERROR if "fault" in record else logging.INFO, "%s", json.dumps(record))

    async def _pass(
        self,
        scope: Scope,
        receive: Receive,
        send: Send,
        record: dict[str, Any],
        known: dict[bytes, bytes],
    ) -> None:
        if scope["path"] == OPEN_PATH and scope["method"] in ("GET", "HEAD"):
            await self._app(scope, receive, send)
            return
        self._check_host(scope)
        check_headers(scope)
        preflight = self._cors.preflight(scope)
        if preflight is not None:
            await send({"type": "http.response.start", "status": 204, "headers": preflight})
            await send({"type": "http.response.body"})
            return
        rules, key = self._recognised(scope, record, known)
        limits = rules.policy.limits
        self._rate.take(key.id, key.requests_per_minute or limits.requests_per_minute)
        body = await read_body(receive)
        if body is None:
            raise ClientLeftError
        # A body may take its time: what was revoked or changed meanwhile holds for it too.
        if self._rules() is not rules:
            rules, key = self._recognised(scope, record, known)
        visit = Visit(record["id"], key, rules, body, record)
        await self._app({**scope, VISIT: visit}, receive, send)

    def _recognised(
        self, scope: Scope, record: dict[str, Any], known: dict[bytes, bytes]
    ) -> tuple[Rules, Key]:
        """Return the rules in force and whose request it is; note both for log and headers."""
        known.clear()
        rules = self._rules()
        if rules is None:
            raise RefusedError(
                503, "no dial policy is in force; the operator must repair it", code="no_policy"
            )
        key = _authenticate(scope, rules)
        record["key"] = key.id
        known[b"x-dial-policy"] = rules.policy_hash.encode("ascii")
        known[b"x-dial-model"] = self._model_hash.encode("ascii")
        return rules, key

    def _check_host(self, scope: Scope) -> None:
        values = [value for name, value in scope["headers"] if name == b"host"]
        text = values[0].decode("latin-1").lower() if len(values) == 1 else ""
        name, _, port = text.rpartition(":")
        host = name if name and port.isdigit() else text
        if host.strip("[]") not in self._hosts:
            # A page elsewhere whose name was made to point here (DNS rebinding) is stopped by this.
            raise RefusedError(
                421, "this name is not served; see --allow-host", code="unknown_host"
            )


def _authenticate(scope: Scope, rules: Rules) -> Key:
    shown = [value for name, value in scope["headers"] if name == b"authorization"]
    scheme, _, secret = (
        shown[0].decode("latin-1").partition(" ") if len(shown) == 1 else ("", "", "")
    )
    # Looked up whatever was shown, so that all failures take alike long.
    key = keys.find(rules.keys, secret.strip())
    if key is None or scheme.lower() != "bearer":
        raise RefusedError(
            401,
            "a valid key is needed: Authorization: Bearer KEY",
            code="invalid_api_key",
            headers={"www-authenticate": "Bearer"},
        )
    return key


async def _send_error(send: Send, error: RefusedError) -> None:
    body = json_bytes(error.body())
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        *((name.encode(), value.encode()) for name, value in error.headers.items()),
    ]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


def _place(error: BaseException) -> str:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    name = trace.tb_frame.f_globals.get("__name__", "?") if trace is not None else "?"
    line = trace.tb_lineno if trace is not None else 0
    return f"{type(error).__name__} at {name}:{line}"
