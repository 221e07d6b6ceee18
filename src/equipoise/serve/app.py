"""The server as an ASGI application: its routes behind one gate."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from equipoise.policy.decide import allowed_levels
from equipoise.protocol.openapi import document
from equipoise.protocol.replies import RefusedError, json_bytes, not_scored
from equipoise.serve.cors import Cors
from equipoise.serve.gate import VISIT, Gate, Visit
from equipoise.serve.limits import Admission, RateLimit
from equipoise.serve.metrics import Metrics
from equipoise.serve.prepare import CheckedChat, ServedModel, prepare
from equipoise.serve.respond import Answer, while_connected

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send

    from equipoise.engine.seam import ServingEngine
    from equipoise.policy.reload import Rules
    from equipoise.protocol.replies import Choice
    from equipoise.serve.content_log import ContentLog
    from equipoise.serve.scorer import LiveScorer

_LONG_BODY, _MANY_OBJECTS = 16 << 10, 16
"""Bodies above these are encoded beside the event loop, so that they hold up nobody else."""


class Api:
    """The routes, and what they share.

    Args:
        model: What the server knows of the model.
        engine: Samples.
        content_log: Where texts go, if the operator wants them.
        scorer: Scores every answer; ``model.scored`` says the same to the checks.
    """

    def __init__(
        self,
        model: ServedModel,
        engine: ServingEngine,
        content_log: ContentLog | None = None,
        scorer: LiveScorer | None = None,
    ) -> None:
        self.model, self.engine = model, engine
        self.content_log, self.scorer = content_log, scorer
        self.admission, self.draining, self.started = Admission(), False, int(time.time())
        self.metrics = Metrics(engine.load, lambda: self.admission.completions)

    def routes(self) -> list[Route]:
        """Return all there is; what is read can also be asked for with HEAD."""
        return [
            Route("/healthz", self.healthz),
            Route("/readyz", self.readyz),
            Route("/metrics", self.page_of_metrics),
            Route("/openapi.json", self.openapi),
            Route("/v1/models", self.models),
            Route("/v1/models/{name}", self.one_model),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
        ]

    async def healthz(self, request: Request) -> Response:
        """The process runs; says nothing more, as it is open."""
        return _json({"status": "ok"})

    async def readyz(self, request: Request) -> Response:
        """Answers can be given: a policy (the gate checks that), engine and scorer at work."""
        self._check_ready()
        return _json({"status": "ready"})

    async def page_of_metrics(self, request: Request) -> Response:
        """Counters for Prometheus."""
        kind = "text/plain; version=0.0.4; charset=utf-8"
        return Response(self.metrics.page(), media_type=kind)

    async def openapi(self, request: Request) -> Response:
        """The OpenAPI document."""
        return _json(document(self.model.name, self.model.dials))

    async def models(self, request: Request) -> Response:
        """The model under each scenario that the key may use, with its ranges there."""
        data = self._listed(request.scope[VISIT])
        return _json({"object": "list", "data": list(data.values())})

    async def one_model(self, request: Request) -> Response:
        """One entry of the list."""
        entry = self._listed(request.scope[VISIT]).get(request.path_params["name"])
        if entry is None:
            raise RefusedError(404, "this key has no such model", code="model_not_found")
        return _json(entry)

    async def chat(self, request: Request) -> ASGIApp:
        """Answer a chat."""
        visit: Visit = request.scope[VISIT]
        self._check_ready()
        limits, slots = visit.rules.policy.limits, self.engine.load().slots
        self.admission.check_room(visit.key.id, limits, slots)
        # Every turn is an object, and it is turns that take time.
        if len(visit.body) > _LONG_BODY or visit.body.count(b"{") > _MANY_OBJECTS:
            chat = await asyncio.to_thread(prepare, visit, self.model)
        else:
            chat = prepare(visit, self.model)
        visit.headers |= chat.envelope.headers()
        visit.log |= chat.envelope.logged()
        start = time.monotonic()

        async def answer(scope: Scope, receive: Receive, send: Send) -> None:
            job = Answer(chat, self.engine, self.model.encoder, self.scorer)
            with self.admission.admitted(chat, slots):
                try:
                    await while_connected(receive, job.send(send, visit.log))
                finally:
                    visit.log["completion_tokens"] = self._count(chat, job.choices, start)
                    if self.content_log is not None and visit.key.content_log:
                        self.content_log.write(chat, job.choices)

        return answer

    def _check_ready(self) -> None:
        """Refuse where no answers can be given."""
        if self.draining or not self.engine.healthy:
            soon = {"retry-after": "5"}
            raise RefusedError(503, "no answers are given now", code="not_ready", headers=soon)
        if self.scorer is not None and self.scorer.stuck:
            raise not_scored()

    def _count(self, chat: CheckedChat, choices: Sequence[Choice], start: float) -> int:
        """Count an answer that has ended, a broken one too; return its tokens."""
        n_tokens = sum(choice.n_tokens for choice in choices)
        self.metrics.answers.labels(chat.envelope.scenario).inc()
        self.metrics.prompt_tokens.inc(chat.envelope.prompt_tokens)
        self.metrics.completion_tokens.inc(n_tokens)
        self.metrics.seconds.observe(time.monotonic() - start)
        return n_tokens

    def _listed(self, visit: Visit) -> dict[str, dict[str, Any]]:
        """Return alias to entry: the model alone, then ``model@scenario`` for each of the key's."""
        rules, model = visit.rules, self.model
        permitted = visit.key.scenarios or (rules.policy.default_scenario,)
        names = [name for name in permitted if name in rules.policy.scenarios]
        aliases = [(f"{model.name}@{name}", name) for name in names]
        plain = [(model.name, names[0])] if permitted[0] in names else []
        return {
            alias: {
                "id": alias,
                "object": "model",
                "created": self.started,
                "owned_by": "operator",
                "scenario": name,
                "why": rules.policy.scenarios[name].why,
                "dials": self._ranges(visit, name),
                "levels": model.dials.levels,
            }
            for alias, name in plain + aliases
        }

    def _ranges(self, visit: Visit, scenario: str) -> dict[str, dict[str, float] | None]:
        rules, top = visit.rules, self.model.dials.levels - 1
        found = rules.policy.scenarios[scenario]
        levels = {
            attribute: allowed_levels(attribute, visit.key.ranges, found, rules.server)
            for attribute in self.model.dials.attributes
        }
        return {
            attribute: {"min": allowed[0] / top, "max": allowed[-1] / top} if allowed else None
            for attribute, allowed in levels.items()
        }


def build_app(
    api: Api,
    rules: Callable[[], Rules | None],
    *,
    hosts: frozenset[str],
    cors_origins: Sequence[str] = (),
    drain_seconds: float = 30.0,
    now_ns: Callable[[], int] = time.monotonic_ns,
) -> Starlette:
    """Return the application that lays a gate around routes.

    Args:
        api: The routes; engine, scorer and content log begin and end with the application.
        rules: Returns the rules in force.
        hosts: Host names that are served.
        cors_origins: Origins of pages that may read answers.
        drain_seconds: How long running answers may take when the server stops.
        now_ns: Clock of the rate limit.
    """

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        await api.engine.start()
        keeper = asyncio.ensure_future(api.content_log.keep_young()) if api.content_log else None
        try:
            yield
        finally:
            api.draining = True
            await api.engine.drain(drain_seconds)
            if api.scorer is not None:
                api.scorer.close()
            if api.content_log is not None and keeper is not None:
                keeper.cancel()
                api.content_log.close()

    routes = api.routes()
    gate = Middleware(
        Gate,
        rules=rules,
        hosts=hosts,
        rate=RateLimit(now_ns),
        model_hash=api.model.hash,
        metrics=api.metrics,
        cors=Cors(cors_origins, routes) if cors_origins else None,
    )
    wrong = {HTTPException: _no_route}
    app = Starlette(routes=routes, middleware=[gate], exception_handlers=wrong, lifespan=lifespan)
    app.router.redirect_slashes = False
    return app


async def _no_route(request: Request, error: Exception) -> Response:
    if isinstance(error, HTTPException) and error.status_code == 405:
        # GET stands for HEAD too.
        allow = {"Allow": min((error.headers or {})["Allow"].split(", "))}
        raise RefusedError(405, "not this method", code="method_not_allowed", headers=allow)
    raise RefusedError(404, "no such route", code="not_found")


def _json(value: Any) -> Response:
    return Response(json_bytes(value), media_type="application/json")
