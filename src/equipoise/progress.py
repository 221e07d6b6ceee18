"""Progress on stderr: bars with an ETA on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TextIO

LINE_EVERY_SECONDS = 10.0
"""On a log file, at most one line per task in this time."""


class Progress:
    """Where a run reports how far it is.

    Args:
        stream: Output; stderr by default, so that stdout stays clean for results.
        quiet: Print nothing.
    """

    def __init__(self, stream: TextIO | None = None, *, quiet: bool = False) -> None:
        self._stream, self._quiet = stream or sys.stderr, quiet
        self._above: Callable[[str], None] | None = None
        self._watch: Callable[[], None] = lambda: None

    def say(self, text: str) -> None:
        """Print one line (or several); above a bar if one is shown."""
        if self._quiet:
            return
        if self._above is not None:
            self._above(text)
        else:
            print(text, file=self._stream, flush=True)

    @contextmanager
    def watched(self, watch: Callable[[], None]) -> Iterator[None]:
        """Call ``watch`` whenever a task has got on."""
        self._watch = watch
        try:
            yield
        finally:
            self._watch = lambda: None

    @contextmanager
    def task(self, name: str, total: int, *, done: int = 0) -> Iterator[Callable[[int], None]]:
        """Show one task; yields a function that takes the number of newly finished units.

        Args:
            name: What is being done.
            total: Units in all.
            done: Units that an earlier attempt has finished.
        """
        if self._quiet:
            yield lambda _count: None
        elif self._stream.isatty():
            with self._bar(name, total, done) as advance:
                yield self._followed(advance)
        else:
            yield self._followed(self._lines(name, total, done))

    def _followed(self, advance: Callable[[int], None]) -> Callable[[int], None]:
        def followed(units: int) -> None:
            advance(units)
            self._watch()

        return followed

    @contextmanager
    def steps(self, name: str) -> Iterator[Callable[[int, int], None]]:
        """Show one task whose length is learnt on the way; yields ``on_step(done, total)``."""
        stack, shown = ExitStack(), 0
        advance: Callable[[int], None] | None = None

        def on_step(done: int, total: int) -> None:
            nonlocal advance, shown
            if advance is None:
                advance = stack.enter_context(self.task(name, total))
            advance(done - shown)
            shown = done

        with stack:
            yield on_step

    def _lines(self, name: str, total: int, done: int) -> Callable[[int], None]:
        begun = shown = time.monotonic()
        count = done

        def advance(units: int) -> None:
            nonlocal count, shown
            count += units
            now = time.monotonic()
            if count >= total or now - shown >= LINE_EVERY_SECONDS:
                shown = now
                spent = now - begun
                left = spent / max(count - done, 1) * max(total - count, 0)
                self.say(f"{name}: {count}/{total}, {_clock(spent)} spent, {_clock(left)} left")

        return advance

    @contextmanager
    def _bar(self, name: str, total: int, done: int) -> Iterator[Callable[[int], None]]:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )
        from rich.progress import Progress as Bars

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(),
        )
        with Bars(*columns, console=Console(file=self._stream)) as bars:
            task = bars.add_task(name, total=total, completed=done)
            self._above = lambda text: bars.console.print(text, markup=False, highlight=False)
            try:
                yield lambda units: bars.advance(task, units)
            finally:
                self._above = None


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes}:{rest:02d}"
