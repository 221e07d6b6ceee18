"""Checked generations -> pieces of text, with every way out closing what it opened."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Coroutine, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, cast

from equipoise.engine.seam import Generation, ServingEngine, Token
from equipoise.engine.text import AnswerText, StopStrings
from equipoise.errors import EquipoiseError, ServingError
from equipoise.protocol.failures import RefusedError, not_scored
from equipoise.protocol.wire import Choice
from equipoise.types import Finish, Message

if TYPE_CHECKING:
    from starlette.types import Receive

    from equipoise.encoding.encode import Encoder
    from equipoise.serve.chat import Job
    from equipoise.serve.scoring import LiveScorer

_MERGED_PIECES = 8
"""Pieces that wait for a slow reader; then the choices wait."""


@dataclass(frozen=True)
class Piece:
    """What a choice has to say at one token; ``finish`` is set on its last."""

    index: int
    text: str
    n_tokens: int
    """Sampled so far."""
    finish: Finish | None = None
    n_thought: int = 0
    """Of the tokens, those of thoughts."""


class ClientLeftError(Exception):
    """Nobody is there any more to read the answer."""


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


def pieces(job: Job, engine: ServingEngine, encoder: Encoder) -> AsyncGenerator[Piece, None]:
    """Return the pieces of all choices as they come; each choice ends with a ``finish``.

    Raises:
        RefusedError: 503 if the engine fails, 504 if the first token takes too long.
    """
    choices = [
        _choice(index, generation, job, engine, encoder)
        for index, generation in enumerate(job.generations)
    ]
    return choices[0] if len(choices) == 1 else _merged(choices)


async def _choice(
    index: int, generation: Generation, job: Job, engine: ServingEngine, encoder: Encoder
) -> AsyncGenerator[Piece, None]:
    text, stops = AnswerText(encoder), StopStrings(job.stops)
    n_tokens = n_thought = 0
    async with aclosing(_tokens(generation, job, engine)) as tokens:
        async for token in tokens:
            n_tokens, n_thought = n_tokens + 1, n_thought + token.thought
            shown = stops.push(text.push(token))
            finish = token.finish
            if finish is not None:
                shown += stops.push(text.flush())
            if stops.stopped:
                finish = "stop"
            elif finish is not None:
                shown += stops.flush()
            if shown or finish is not None:
                yield Piece(index, shown, n_tokens, finish, n_thought)
            if finish is not None:
                return
    raise _engine_failed()


async def _tokens(
    generation: Generation, job: Job, engine: ServingEngine
) -> AsyncGenerator[Token, None]:
    """Hand tokens through; faults of the engine become refusals."""
    deadline = time.monotonic() + job.limits.first_token_seconds
    stream = cast("AsyncGenerator[Token, None]", engine.stream(generation))
    waiting = True
    async with aclosing(stream):
        while True:
            try:
                if waiting:
                    async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                        token = await anext(stream)
                else:
                    token = await anext(stream)
            except StopAsyncIteration:
                return
            except TimeoutError:
                raise timed_out("the first token took too long") from None
            except RefusedError:
                raise
            except (EquipoiseError, RuntimeError, OSError) as error:
                raise _engine_failed() from error
            waiting = False
            yield token


async def _merged(
    choices: list[AsyncGenerator[Piece, None]],
) -> AsyncGenerator[Piece, None]:
    queue: asyncio.Queue[Piece | BaseException] = asyncio.Queue(_MERGED_PIECES)

    async def pump(choice: AsyncGenerator[Piece, None]) -> None:
        try:
            async with aclosing(choice):
                async for piece in choice:
                    await queue.put(piece)
        except Exception as error:
            await queue.put(error)

    tasks = [asyncio.ensure_future(pump(choice)) for choice in choices]
    try:
        open_ = len(choices)
        while open_:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            open_ -= item.finish is not None
            yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def scored(
    scorer: LiveScorer, messages: Sequence[Message], choices: Sequence[Choice]
) -> list[Choice]:
    """Return the choices with their measured unit scores.

    Raises:
        RefusedError: 503 ``scorer_unavailable``: an answer without scores is not given.
    """
    try:
        units = await scorer.score(messages, choices)
    except ServingError as error:
        raise not_scored() from error
    return [replace(c, measured=unit) for c, unit in zip(choices, units, strict=True)]


def timed_out(message: str) -> RefusedError:
    """Return the refusal of a request that took too long."""
    return RefusedError(504, message, code="timeout")


def _engine_failed() -> RefusedError:
    return RefusedError(
        503, "the engine failed; nothing was wrong with the request", code="engine_failure"
    )
