"""The response of one chat request: whole, or as a stream of events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any

from starlette.responses import Response

from equipoise.protocol.failures import RefusedError, json_bytes
from equipoise.protocol.wire import Choice, Spent
from equipoise.serve.auth import VISIT
from equipoise.serve.limits import Admission
from equipoise.serve.running import Piece, pieces, scored, timed_out, while_connected

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

    from equipoise.encoding.encode import Encoder
    from equipoise.engine.seam import ServingEngine
    from equipoise.serve.chat import Job
    from equipoise.serve.scoring import LiveScorer

_ERROR_SECONDS = 1.0
"""How long the end of a broken stream may wait for its reader."""


class Answer(Response):
    """Runs a job while its client is there, and sends what comes of it.

    Args:
        job: The checked request.
        engine: Samples.
        encoder: Of the model.
        admission: Places under way.
        on_done: Called with the finished choices, also those of a broken answer.
        scorer: Scores every choice, or the answer fails.
    """

    def __init__(
        self,
        job: Job,
        engine: ServingEngine,
        encoder: Encoder,
        admission: Admission,
        on_done: Callable[[list[Choice]], None],
        scorer: LiveScorer | None = None,
    ) -> None:
        self.scorer = scorer
        self.job, self.engine, self.encoder = job, engine, encoder
        self.admission, self.on_done = admission, on_done
        self.background = None
        self.status_code = 200
        self._log: dict[str, Any] = {}
        self._choices = [Choice("", "length", 0) for _ in job.generations]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer.

        Raises:
            RefusedError: Before anything was sent; its headers say what would have applied.
        """
        self._log = scope[VISIT].log
        try:
            await self._run(receive, send)
        except RefusedError as error:
            given = dial_headers(self.job)
            error.headers |= {name.decode(): value.decode() for name, value in given}
            raise

    async def _run(self, receive: Receive, send: Send) -> None:
        job = self.job
        with self.admission.admitted(
            job.key_id,
            len(job.generations),
            job.tokens,
            slots=self.engine.load().slots,
            limits=job.limits,
        ):
            try:
                work = self._stream(send) if job.stream else self._whole(send)
                await while_connected(receive, work)
            finally:
                self.on_done(self._choices)

    async def _whole(self, send: Send) -> None:
        try:
            async with asyncio.timeout(self.job.limits.total_seconds):
                await self._collect()
                await self._score()
        except TimeoutError:
            raise timed_out("the answer took too long") from None
        body = json_bytes(self.job.envelope.completion(self._kept(), self._spent()))
        size = (b"content-length", str(len(body)).encode())
        await self._begin(send, b"application/json", size)
        await send({"type": "http.response.body", "body": body})

    async def _collect(self) -> None:
        async with aclosing(pieces(self.job, self.engine, self.encoder)) as all_pieces:
            async for piece in all_pieces:
                self._note(piece)

    async def _score(self) -> None:
        if self.scorer is not None:
            self._choices = await scored(self.scorer, self.job.messages, self._choices)

    def _spent(self) -> Spent:
        return Spent(
            sum(choice.n_tokens for choice in self._choices),
            sum(choice.n_thought for choice in self._choices),
        )

    def _kept(self) -> list[Choice]:
        if self.scorer is None or len(self._choices) == self.job.keep:
            return self._choices
        units = [choice.measured or {} for choice in self._choices]
        order = self.scorer.ranked(units, self.job.setting)
        return [self._choices[index] for index in order[: self.job.keep]]

    async def _stream(self, send: Send) -> None:
        envelope, begun = self.job.envelope, False

        async def event(value: Any) -> None:
            data = b"data: " + json_bytes(value) + b"\n\n"
            await send({"type": "http.response.body", "body": data, "more_body": True})

        try:
            # Sending counts: a client that does not read holds its slot no longer than this.
            async with (
                asyncio.timeout(self.job.limits.total_seconds),
                aclosing(pieces(self.job, self.engine, self.encoder)) as all_pieces,
            ):
                async for piece in all_pieces:
                    if not begun:
                        begun = True
                        await self._begin(send, b"text/event-stream")
                        for index in range(len(self.job.generations)):
                            await event(envelope.chunk(index, {"role": "assistant"}))
                    self._note(piece)
                    if piece.text:
                        await event(envelope.chunk(piece.index, {"content": piece.text}))
                    if piece.finish is not None and self.scorer is None:
                        await event(envelope.chunk(piece.index, {}, self._choices[piece.index]))
                if self.scorer is not None:
                    # The text is out, so an answer that cannot be scored ends with an error and
                    # without a finish_reason.
                    await self._score()
                    for index, choice in enumerate(self._choices):
                        await event(envelope.chunk(index, {}, choice))
                if self.job.include_usage:
                    await event(envelope.usage_chunk(self._spent()))
                await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})
        except (RefusedError, TimeoutError) as error:
            refusal = (
                error if isinstance(error, RefusedError) else timed_out("the answer took too long")
            )
            if not begun:
                raise refusal from None
            self._log["code"] = refusal.code
            with suppress(TimeoutError):  # a reader who does not read; the connection is closed
                async with asyncio.timeout(_ERROR_SECONDS):
                    await event(refusal.body())
                    await send({"type": "http.response.body", "body": b""})

    async def _begin(self, send: Send, kind: bytes, *more: tuple[bytes, bytes]) -> None:
        headers = [(b"content-type", kind), (b"cache-control", b"no-store"), *more]
        await send(
            {
                "type": "http.response.start",
                "status": 200,
                "headers": [*headers, *dial_headers(self.job)],
            }
        )

    def _note(self, piece: Piece) -> None:
        before = self._choices[piece.index]
        self._choices[piece.index] = Choice(
            before.text + piece.text,
            piece.finish or "length",
            piece.n_tokens,
            n_thought=piece.n_thought,
        )


def dial_headers(job: Job) -> list[tuple[bytes, bytes]]:
    """Return the headers that say what was asked for and what was applied.

    The gate adds the hashes of policy and model, as to every response.
    """
    applied = job.envelope.applied

    def compact(value: Any) -> bytes:
        return json.dumps(value, separators=(",", ":"), sort_keys=True).encode("ascii")

    return [
        (b"x-dial-requested", compact(dict(applied.requested))),
        (b"x-dial-effective", compact(dict(applied.effective))),
        (b"x-dial-scenario", applied.scenario.encode("ascii")),
    ]
