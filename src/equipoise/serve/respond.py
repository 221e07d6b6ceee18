"""The answer to a checked chat, whole or as a stream of events; every way out frees its slots."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing, suppress
from typing import TYPE_CHECKING, Any, cast

from equipoise.engine.text import AnswerText, StopStrings
from equipoise.errors import EquipoiseError, ServingError
from equipoise.protocol.replies import Choice, RefusedError, json_bytes, not_scored
from equipoise.serve.gate import ClientLeftError

if TYPE_CHECKING:
    from starlette.types import Receive, Send

    from equipoise.encoding.encode import Encoder
    from equipoise.engine.seam import ServingEngine, Token
    from equipoise.serve.prepare import CheckedChat
    from equipoise.serve.scorer import LiveScorer

_ERROR_SECONDS = 1.0
"""How long the end of a broken stream may wait for its reader."""

_Show = Callable[[int, str, bool], Awaitable[None]]
"""Shows new text of the choice with an index, and whether that was its last."""


async def while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Run ``work``, and cancel it at once when the client leaves.

    Raises:
        ClientLeftError: The client left first.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_gone(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientLeftError
        await task
    finally:
        for one in (task, watcher):
            one.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Answer:
    """Samples the choices of a chat, and sends what comes of it.

    Args:
        chat: The checked request.
        engine: Samples.
        encoder: Of the model.
        scorer: Scores every choice, or the answer fails.
    """

    def __init__(
        self,
        chat: CheckedChat,
        engine: ServingEngine,
        encoder: Encoder,
        scorer: LiveScorer | None = None,
    ) -> None:
        self._chat, self._engine, self._encoder, self._scorer = chat, engine, encoder, scorer
        self.choices = [Choice() for _ in chat.generations]
        """What has come of each so far."""

    async def send(self, send: Send, log: dict[str, Any]) -> None:
        """Send the answer in the form that was asked for.

        Args:
            send: ASGI.
            log: Gets the ``code`` of a fault that ends a stream.

        Raises:
            RefusedError: Before anything was sent: 503 if engine or scorer fail, 504 if the first
                token or the whole takes too long.
        """
        if self._chat.request.stream:
            await self._stream(send, log)
        else:
            await self._whole(send)

    async def _whole(self, send: Send) -> None:
        async def unseen(index: int, text: str, is_last: bool) -> None:
            pass

        try:
            async with asyncio.timeout(self._chat.limits.total_seconds):
                await self._sample(unseen)
                await self._score()
        except TimeoutError:
            raise _timed_out("the answer took too long") from None
        body = json_bytes(self._chat.envelope.completion(self._given(), self.choices))
        size = (b"content-length", str(len(body)).encode())
        await send(_start(b"application/json", size))
        await send({"type": "http.response.body", "body": body})

    async def _stream(self, send: Send, log: dict[str, Any]) -> None:
        envelope, begun, turn = self._chat.envelope, False, asyncio.Lock()

        async def event(value: Any) -> None:
            data = b"data: " + json_bytes(value) + b"\n\n"
            await send({"type": "http.response.body", "body": data, "more_body": True})

        async def show(index: int, text: str, is_last: bool) -> None:
            nonlocal begun
            async with turn:
                if not begun:
                    begun = True
                    await send(_start(b"text/event-stream"))
                    for each in range(len(self.choices)):
                        await event(envelope.chunk(each, {"role": "assistant"}))
                if text:
                    await event(envelope.chunk(index, {"content": text}))
                if is_last and self._scorer is None:
                    await event(envelope.chunk(index, {}, self.choices[index]))

        try:
            # Sending counts: a client that does not read holds its slot no longer than this.
            async with asyncio.timeout(self._chat.limits.total_seconds):
                await self._sample(show)
                if self._scorer is not None:
                    # The text is out, so an answer that cannot be scored ends with an error and
                    # without a finish_reason.
                    await self._score()
                    for index, choice in enumerate(self.choices):
                        await event(envelope.chunk(index, {}, choice))
                options = self._chat.request.stream_options
                if options is not None and options.include_usage:
                    await event(envelope.usage_chunk(self.choices))
                await send({"type": "http.response.body", "body": b"data: [DONE]\n\n"})
        except (RefusedError, TimeoutError) as error:
            late = _timed_out("the answer took too long")
            refusal = error if isinstance(error, RefusedError) else late
            if not begun:
                raise refusal from None
            log["code"] = refusal.code
            with suppress(TimeoutError):  # a reader who does not read; the connection is closed
                async with asyncio.timeout(_ERROR_SECONDS):
                    await event(refusal.body())
                    await send({"type": "http.response.body", "body": b""})

    async def _sample(self, show: _Show) -> None:
        """Sample all choices; the first fault ends them all."""
        try:
            async with asyncio.TaskGroup() as group:
                for index in range(len(self.choices)):
                    group.create_task(self._choice(index, show))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None

    async def _choice(self, index: int, show: _Show) -> None:
        chat, choice = self._chat, self.choices[index]
        text, stops = AnswerText(self._encoder), StopStrings(chat.request.stops)
        wait: float | None = chat.limits.first_token_seconds
        stream = self._engine.stream(chat.generations[index])
        async with aclosing(cast("AsyncGenerator[Token, None]", stream)) as tokens:
            is_last = False
            while not is_last:
                token, wait = await _next(tokens, wait), None
                choice.n_tokens += 1
                choice.n_thought += token.thought
                shown, finish = stops.push(text.push(token)), token.finish
                if finish is not None:
                    shown += stops.push(text.flush())
                if stops.stopped:
                    finish = "stop"
                elif finish is not None:
                    shown += stops.flush()
                choice.text += shown
                is_last = finish is not None
                choice.finish = finish or choice.finish
                if shown or is_last:
                    await show(index, shown, is_last)

    async def _score(self) -> None:
        if self._scorer is None:
            return
        try:
            units = await self._scorer.score(self._chat.messages, self.choices)
        except ServingError as error:
            raise not_scored() from error
        for choice, unit in zip(self.choices, units, strict=True):
            choice.measured = unit

    def _given(self) -> list[Choice]:
        n = self._chat.request.n
        if self._scorer is None or len(self.choices) == n:
            return self.choices
        units = [choice.measured or {} for choice in self.choices]
        order = self._scorer.ranked(units, self._chat.setting)
        return [self.choices[index] for index in order[:n]]


async def _next(tokens: AsyncGenerator[Token, None], seconds: float | None) -> Token:
    """Return the next token; faults of the engine become refusals."""
    try:
        async with asyncio.timeout(seconds):
            return await anext(tokens)
    except TimeoutError:
        raise _timed_out("the first token took too long") from None
    except (StopAsyncIteration, EquipoiseError, RuntimeError, OSError) as error:
        raise RefusedError(
            503, "the engine failed; nothing was wrong with the request", code="engine_failure"
        ) from error


def _start(kind: bytes, *more: tuple[bytes, bytes]) -> dict[str, Any]:
    headers = [(b"content-type", kind), (b"cache-control", b"no-store"), *more]
    return {"type": "http.response.start", "status": 200, "headers": headers}


def _timed_out(message: str) -> RefusedError:
    return RefusedError(504, message, code="timeout")
