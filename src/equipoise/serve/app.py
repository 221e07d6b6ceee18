"""The server as an ASGI application: one table of routes behind one gate."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

from equipoise.policy.reload import Rules
from equipoise.protocol.failures import (
    RefusedError,
    internal_error,
    json_bytes,
    not_ready,
    not_scored,
)
from equipoise.protocol.openapi import document
from equipoise.serve.answer import Answer
from equipoise.serve.auth import CLIENT_LEFT, VISIT, Gate, Visit
from equipoise.serve.chat import Job, ServedModel, prepare
from equipoise.serve.cors import Cors
from equipoise.serve.limits import Admission, RateLimit
from equipoise.serve.listing import list_models
from equipoise.serve.metrics import Metrics
from equipoise.serve.running import ClientLeftError

if TYPE_CHECKING:
    from starlette.types import ASGIApp

    from equipoise.engine.seam import ServingEngine
    from equipoise.protocol.wire import Choice
    from equipoise.serve.content_log import ContentLog
    from equipoise.serve.scoring import LiveScorer

_LONG_BODY, _MANY_OBJECTS = 16 << 10, 16
"""Bodies above these are encoded beside the event loop, so that they hold up nobody else."""


@dataclass
class House:
    """What the routes share."""

    model: ServedModel
    engine: ServingEngine
    metrics: Metrics
    admission: Admission
    content_log: ContentLog | None
    salt_key: bytes
    started: int
    scorer: LiveScorer | None = None
    draining: bool = False

    def check_ready(self) -> None:
        """Refuse where no answers can be given."""
        if self.draining or not self.engine.healthy:
            raise not_ready()
        if self.scorer is not None and self.scorer.stuck:
            raise not_scored()


async def healthz(house: House, request: Request) -> Response:
    """The process runs; says nothing more, as it is open."""
    return _json({"status": "ok"})


async def readyz(house: House, request: Request) -> Response:
    """Answers can be given: policy in force (the gate checks that), engine and scorer at work."""
    house.check_ready()
    return _json({"status": "ready"})


async def metrics(house: House, request: Request) -> Response:
    """Counters for Prometheus."""
    text = house.metrics.text(house.engine.load(), house.admission.completions)
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


async def openapi(house: House, request: Request) -> Response:
    """The OpenAPI document."""
    model = house.model
    return _json(document(model.name, model.dials))


async def models(house: House, request: Request) -> Response:
    """The model under each scenario that the key may use, with the ranges that it gets there."""
    visit: Visit = request.scope[VISIT]
    data = list_models(house.model, visit.key, visit.rules, created=house.started)
    return _json({"object": "list", "data": list(data.values())})


async def model(house: House, request: Request) -> Response:
    """One entry of the list."""
    visit: Visit = request.scope[VISIT]
    entry = list_models(house.model, visit.key, visit.rules, created=house.started).get(
        request.path_params["name"]
    )
    if entry is None:
        raise RefusedError(404, "this key has no such model", code="model_not_found")
    return _json(entry)


async def chat(house: House, request: Request) -> Response:
    """Answer a chat."""
    visit: Visit = request.scope[VISIT]
    house.check_ready()
    house.admission.check_room(
        visit.key.id, slots=house.engine.load().slots, limits=visit.rules.policy.limits
    )

    def prepared() -> Job:
        return prepare(
            visit.body,
            visit.key,
            visit.rules,
            house.model,
            request_id=visit.id,
            created=int(time.time()),
            fresh_seed=secrets.randbits(63),
            salt_key=house.salt_key,
        )

    # Every turn is an object, and it is turns that take time.
    is_long = len(visit.body) > _LONG_BODY or visit.body.count(b"{") > _MANY_OBJECTS
    job = await asyncio.to_thread(prepared) if is_long else prepared()
    applied, start = job.envelope.applied, time.monotonic()
    visit.log |= {
        "requested": dict(applied.requested),
        "effective": dict(applied.effective),
        "scenario": applied.scenario,
        "policy": applied.policy_hash[:12],
        "model": applied.model_hash[:12],
        "prompt_tokens": job.envelope.prompt_tokens,
    }

    def done(choices: list[Choice]) -> None:
        n_tokens = sum(choice.n_tokens for choice in choices)
        visit.log["completion_tokens"] = n_tokens
        house.metrics.answers[applied.scenario] += 1
        house.metrics.prompt_tokens += job.envelope.prompt_tokens
        house.metrics.completion_tokens += n_tokens
        house.metrics.took(time.monotonic() - start)
        if house.content_log is not None and visit.key.content_log:
            house.content_log.write(job, choices)

    return Answer(job, house.engine, house.model.encoder, house.admission, done, house.scorer)


_READ: tuple[tuple[str, Callable[[House, Request], Any]], ...] = (
    ("/healthz", healthz),
    ("/readyz", readyz),
    ("/metrics", metrics),
    ("/openapi.json", openapi),
    ("/v1/models", models),
    ("/v1/models/{name}", model),
)
ROUTES: tuple[tuple[str, str, Callable[[House, Request], Any]], ...] = (
    # The body that HEAD leaves out is dropped below us, where its length is known.
    *((method, path, endpoint) for path, endpoint in _READ for method in ("GET", "HEAD")),
    ("POST", "/v1/chat/completions", chat),
)


def build_app(
    model: ServedModel,
    engine: ServingEngine,
    rules: Callable[[], Rules | None],
    *,
    hosts: frozenset[str],
    cors_origins: Sequence[str] = (),
    content_log: ContentLog | None = None,
    scorer: LiveScorer | None = None,
    drain_seconds: float = 30.0,
    now_ns: Callable[[], int] = time.monotonic_ns,
) -> tuple[ASGIApp, House]:
    """Return the application, and what its routes share (to mark it as draining).

    Args:
        model: What the door knows of the model.
        engine: Started and drained with the application.
        rules: Returns the rules in force.
        hosts: Host names that are served.
        cors_origins: Origins of pages that may read answers.
        content_log: Where texts go, if the operator wants them.
        scorer: Scores every answer; ``model.scored`` says the same to the door.
        drain_seconds: How long running answers may take when the server stops.
        now_ns: Clock of the rate limit.
    """
    house = House(
        model=model,
        engine=engine,
        metrics=Metrics(),
        admission=Admission(),
        content_log=content_log,
        salt_key=secrets.token_bytes(32),
        started=int(time.time()),
        scorer=scorer,
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await engine.start()
        keeper = asyncio.ensure_future(content_log.keep_young()) if content_log else None
        try:
            yield
        finally:
            house.draining = True
            await engine.drain(drain_seconds)
            if scorer is not None:
                scorer.close()
            if content_log is not None and keeper is not None:
                keeper.cancel()
                content_log.close()

    # Pages that load scripts from elsewhere (/docs, /redoc) are off; the document has a route.
    app = FastAPI(
        lifespan=lifespan, openapi_url=None, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    for method, path, endpoint in ROUTES:
        app.add_api_route(path, _bound(endpoint, house), methods=[method], response_model=None)
    for kind in (RefusedError, ClientLeftError, HTTPException, Exception):
        app.add_exception_handler(kind, _refuse)
    gate = Gate(
        app,
        rules,
        hosts=hosts,
        rate=RateLimit(now_ns),
        model_hash=model.hash,
        metrics=house.metrics,
        cors=Cors(cors_origins, [(method, path) for method, path, _ in ROUTES]),
    )
    return gate, house


def _bound(endpoint: Callable[[House, Request], Any], house: House) -> Callable[..., Any]:
    async def route(request: Request) -> Response:
        response: Response = await endpoint(house, request)
        return response

    route.__name__ = endpoint.__name__
    return route


async def _refuse(request: Request, error: Exception) -> Response:
    """Turn what a route raises into a response; the gate logs what is left of it."""
    if isinstance(error, ClientLeftError):
        return Response(status_code=CLIENT_LEFT)
    if isinstance(error, HTTPException):
        message, code = _ROUTING.get(error.status_code, ("refused", "refused"))
        error = RefusedError(error.status_code, message, code=code, headers=error.headers)
    if not isinstance(error, RefusedError):
        error = internal_error()
    if VISIT in request.scope:
        request.scope[VISIT].log["code"] = error.code
    return Response(
        json_bytes(error.body()), error.status, error.headers, media_type="application/json"
    )


_ROUTING = {404: ("no such route", "not_found"), 405: ("not this method", "method_not_allowed")}


def _json(value: Any) -> Response:
    return Response(json_bytes(value), media_type="application/json")
