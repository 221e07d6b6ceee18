"""Continuous batching: requests with different dial settings share each step of one model.

One thread owns the model. The event loop hands it tickets and gets tokens back; a ticket whose
reader has gone is dropped before the next step, so a slot is never held for nobody.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Sequence
from typing import TYPE_CHECKING

from equipoise.engine.cache import KeysValues, PrefixCache
from equipoise.engine.decode import LiveRows
from equipoise.engine.draw import Row
from equipoise.engine.line import Item, Line, Ticket, step_failed, stopped
from equipoise.engine.seam import Generation, Load, Token
from equipoise.errors import DataError
from equipoise.models.limits import check_room, positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from equipoise.encoding.encode import Encoder

log = logging.getLogger(__name__)

_MAX_FAILED_STEPS = 3
"""Steps in a row that may fail before the engine counts as broken."""
_STEP_SECONDS = 60.0
"""A step that takes longer counts as hung, until it ends."""
_LAST_STEP_SECONDS = 5.0
"""How long the step under way may take when the time to drain is up."""


class ContinuousBatcher:
    """Samples many generations at once on any Hugging Face causal LM with keys and values.

    A completion depends on its own generation only (up to the rounding of floats, as batches differ
    in size): :class:`equipoise.engine.sample.TransformersEngine` gives the same for the same ids,
    sampling and seed. Temperature 0 takes the likeliest token.

    Args:
        model: In evaluation mode.
        encoder: Of the same model: end ids, masked ids.
        slots: Rows decoded together, at least 1; more requests wait in line.
        prefix_tokens: Prompt tokens kept for sharing, see :class:`PrefixCache`; 0 for none.

    Attributes:
        context_tokens: Tokens of prompt, controls and completion that the model can hold, or None
            if its config does not say.

    Raises:
        ModelError: The model cannot be decoded row by row.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        encoder: Encoder,
        *,
        slots: int = 16,
        prefix_tokens: int = 8192,
    ) -> None:
        if slots < 1:
            raise ValueError(f"slots must be at least 1, got {slots}")
        self.prefixes: PrefixCache[KeysValues] = PrefixCache(prefix_tokens)
        self._live, self._encoder = LiveRows(model, encoder, self.prefixes), encoder
        config = model.config.get_text_config()
        self.context_tokens = positions(config)
        self._n_vocabulary, self._line = int(config.vocab_size), Line(slots)
        self._began: float | None = None
        """When the step under way began."""
        self._thread: threading.Thread | None = None
        self._stopping = self._draining = self._broken = False

    @property
    def healthy(self) -> bool:
        """False once the model's thread has died, while a step hangs, and after :meth:`drain`."""
        began = self._began
        hangs = began is not None and time.monotonic() - began > _STEP_SECONDS
        return self.lingers and not hangs and not self._broken

    @property
    def lingers(self) -> bool:
        """Whether the model's thread runs; after :meth:`drain` only if a step hung meanwhile."""
        return self._thread is not None and self._thread.is_alive()

    def load(self) -> Load:
        """Return rows in flight, requests in line, and slots."""
        return self._line.load()

    async def start(self) -> None:
        """Start the model's thread; a second call does nothing."""
        import torch

        if self._thread is None:
            # A new thread would compute with as many threads as there are cores.
            n = torch.get_num_threads()
            self._thread = threading.Thread(
                target=self._run, args=(n,), name="equipoise-model", daemon=True
            )
            self._thread.start()

    async def stream(self, generation: Generation) -> AsyncIterator[Token]:
        """Yield tokens until one has a ``finish``; closing frees the slot within one step.

        Raises:
            DataError: The ids, the length or the sampling do not fit the model.
            ServingError: The engine is stopping or broken, or this generation failed.
        """
        self._check(generation)
        ticket = Ticket(generation, asyncio.get_running_loop())
        with self._line.changed:
            if self._draining or not self.healthy:
                raise stopped()
            self._line.waiting.append(ticket)
            self._line.changed.notify()
        try:
            while True:
                item = await ticket.items.get()
                if isinstance(item, Exception):
                    raise item
                yield item
                if item.finish is not None:
                    return
        finally:
            self._line.cancel(ticket)

    async def drain(self, seconds: float) -> None:
        """Refuse new work, let requests finish for at most ``seconds``, then stop the thread.

        A step that does not end even then is given up with its requests: the thread is a daemon,
        and the process can end without it.
        """
        with self._line.changed:
            self._draining = True
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.healthy and self._line.is_read():
            await asyncio.sleep(0.01)
        with self._line.changed:
            self._stopping = True
            self._line.changed.notify()
        if self._thread is None:
            return
        await asyncio.to_thread(self._thread.join, _LAST_STEP_SECONDS)
        if self.lingers:
            log.error("a decoding step did not end; it is given up with its requests")
            self._give_up()

    def _check(self, generation: Generation) -> None:
        ids = generation.given_ids
        n = self._encoder.most_tokens(generation.sampling)
        named = (*ids, *(token_id for token_id, _ in generation.logit_bias))
        if not ids or n < 1 or not all(0 <= i < self._n_vocabulary for i in named):
            raise DataError(
                "a request cannot be sampled",
                why=f"it needs ids in [0, {self._n_vocabulary}) and at least one token to sample",
                fix="check the request before it reaches the engine",
            )
        check_room(len(ids), n, self.context_tokens)

    def _run(self, n_threads: int) -> None:
        """The model's thread: leave, join, draw, deliver, advance."""
        import torch

        torch.set_num_threads(n_threads)
        failed = 0
        try:
            while (newcomers := self._next()) is not None:
                try:
                    self._began = time.monotonic()
                    self._step(newcomers)
                    failed = 0
                except Exception as error:
                    if self._broken:  # given up meanwhile: nobody is left to be told
                        break
                    # The step was common to all rows, so none of them can go on.
                    failed += 1
                    log.error("a decoding step failed: %s", type(error).__name__)
                    self._live.clear()
                    self._line.deliver(
                        [(ticket, step_failed(error)) for ticket in self._line.running]
                    )
                    if failed == _MAX_FAILED_STEPS:
                        break
                finally:
                    self._began = None
        except BaseException as error:
            log.critical("the model's thread died: %s", type(error).__name__)
        finally:
            self._live.clear()
            self._give_up()

    def _next(self) -> list[Ticket] | None:
        """Wait for work; drop rows whose reader has gone; return newcomers, or None to stop."""
        with self._line.changed:
            while not (self._line.running or self._line.waiting or self._stopping):
                self._line.changed.wait()
            if self._stopping:
                return None
            gone, newcomers = self._line.turn()
        self._live.leave([ticket.row for ticket in gone if ticket.row is not None])
        return newcomers

    def _step(self, newcomers: Sequence[Ticket]) -> None:
        """Let newcomers join, and every row draw and advance."""
        joined = self._live.join([ticket.generation for ticket in newcomers])
        failures: list[tuple[Ticket, Item]] = []
        for ticket, result in zip(newcomers, joined, strict=True):
            if isinstance(result, Row):
                ticket.row = result
            else:
                failures.append((ticket, step_failed(result)))
        self._line.deliver(failures)
        owners = {ticket.row: ticket for ticket in self._line.running}
        self._line.deliver([(owners[row], item) for row, item in self._live.draw()])
        self._live.advance()

    def _give_up(self) -> None:
        """Take no more requests and fail those that are here; leaves the rows alone."""
        with self._line.changed:
            self._broken = True
            failed = [*self._line.running, *self._line.waiting]
            self._line.waiting.clear()
            self._line.deliver([(ticket, stopped()) for ticket in failed])
