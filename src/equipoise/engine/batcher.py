"""Continuous batching: requests with different dial settings share each step of one model.

One thread owns the model. The event loop hands it tickets and gets tokens back; a ticket whose
reader has gone is dropped before the next step, so a slot is never held for nobody.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from equipoise.engine.cache import KeysValues, PrefixCache
from equipoise.engine.decode import LiveRows
from equipoise.engine.draw import Row
from equipoise.engine.seam import Generation, Load, Token
from equipoise.engine.ticket import Item, Ticket, post, step_failed, stopped
from equipoise.errors import DataError
from equipoise.models.context import check_room, positions

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from equipoise.encoding.encode import Encoder

log = logging.getLogger(__name__)

_PREFILL_TOKENS = 512
"""Prompt tokens that may be computed between two steps: the rows in flight wait meanwhile."""
_GATHERED, _MAX_WAITED = 8, 4
"""Newcomers join once 1/8 of the slots is free, or after 4 steps: a join costs about a step,
whether one row joins or four."""
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
        self._n_vocabulary, self._slots = int(config.vocab_size), slots
        self._waiting: deque[Ticket] = deque()
        self._running: list[Ticket] = []
        self._changed = threading.Condition()  # guards the two lists and the flags below
        self._waited = 0
        """Steps since rows joined."""
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
        with self._changed:
            return Load(len(self._running), len(self._waiting), self._slots)

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
        with self._changed:
            if self._draining or not self.healthy:
                raise stopped()
            self._waiting.append(ticket)
            self._changed.notify()
        try:
            while True:
                item = await ticket.items.get()
                if isinstance(item, Exception):
                    raise item
                yield item
                if item.finish is not None:
                    return
        finally:
            with self._changed:
                ticket.cancelled = True
                if ticket in self._waiting:
                    self._waiting.remove(ticket)
                self._changed.notify()

    async def drain(self, seconds: float) -> None:
        """Refuse new work, let requests finish for at most ``seconds``, then stop the thread.

        A step that does not end even then is given up with its requests: the thread is a daemon,
        and the process can end without it.
        """
        with self._changed:
            self._draining = True
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and self.healthy and self._is_read():
            await asyncio.sleep(0.01)
        with self._changed:
            self._stopping = True
            self._changed.notify()
        if self._thread is None:
            return
        await asyncio.to_thread(self._thread.join, _LAST_STEP_SECONDS)
        if self.lingers:
            log.error("a decoding step did not end; it is given up with its requests")
            self._give_up()

    def _is_read(self) -> bool:
        with self._changed:
            return bool(self._waiting) or any(not ticket.cancelled for ticket in self._running)

    def _check(self, generation: Generation) -> None:
        ids = (*generation.prompt_ids, *generation.control_ids)
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
                    self._admit(newcomers)
                    self._deliver()
                    self._live.advance()
                    failed = 0
                except Exception as error:
                    if self._broken:  # given up meanwhile: nobody is left to be told
                        break
                    # The step was common to all rows, so none of them can go on.
                    failed += 1
                    log.error("a decoding step failed: %s", type(error).__name__)
                    self._fail_running(step_failed(error))
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
        with self._changed:
            while not (self._running or self._waiting or self._stopping):
                self._changed.wait()
            if self._stopping:
                return None
            gone = [t for t in self._running if t.cancelled]
            self._running = [t for t in self._running if not t.cancelled]
            newcomers: list[Ticket] = []
            free = self._slots - len(self._running)
            self._waited += 1
            due = free * _GATHERED >= self._slots or self._waited >= _MAX_WAITED
            budget = _PREFILL_TOKENS if due else 0
            while self._waiting and len(self._running) < self._slots and budget > 0:
                ticket = self._nearest_turn()
                self._waiting.remove(ticket)
                budget -= len(ticket.generation.prompt_ids)
                newcomers.append(ticket)
                self._running.append(ticket)
                self._waited = 0
        self._live.leave([t.row for t in gone if t.row is not None])
        return newcomers

    def _nearest_turn(self) -> Ticket:
        """Return who joins next: the key with the fewest rows, and of its requests the oldest."""
        rows = Counter(ticket.generation.prefix_salt for ticket in self._running)
        return min(self._waiting, key=lambda ticket: rows[ticket.generation.prefix_salt])

    def _admit(self, newcomers: list[Ticket]) -> None:
        if not newcomers:
            return
        joined = self._live.join([ticket.generation for ticket in newcomers])
        failures: list[tuple[Ticket, Item]] = []
        for ticket, result in zip(newcomers, joined, strict=True):
            if isinstance(result, Row):
                ticket.row = result
            else:
                failures.append((ticket, step_failed(result)))
        self._done([ticket for ticket, _ in failures])
        post(failures)

    def _deliver(self) -> None:
        owners = {id(ticket.row): ticket for ticket in self._running}
        drawn = [(owners[id(row)], item) for row, item in self._live.draw()]
        self._done([t for t, item in drawn if isinstance(item, Exception) or item.finish])
        post(drawn)

    def _give_up(self) -> None:
        """Take no more requests and fail those that are here; leaves the rows alone."""
        with self._changed:
            self._broken = True
            failed = [*self._running, *self._waiting]
            self._running = []
            self._waiting.clear()
        post([(ticket, stopped()) for ticket in failed])

    def _fail_running(self, error: Exception) -> None:
        with self._changed:
            failed, self._running = self._running, []
        self._live.clear()
        post([(ticket, error) for ticket in failed])

    def _done(self, tickets: list[Ticket]) -> None:
        with self._changed:
            gone = set(map(id, tickets))
            self._running = [t for t in self._running if id(t) not in gone]
