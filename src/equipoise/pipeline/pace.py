"""How a run keeps to its plan: what is left by the pace so far, and a word if a stage is far over.

    left = planned minutes of the stages to come * (spent + HALF) / (planned + HALF)

``spent`` and ``planned`` are of the stages that this invocation has finished. ``HALF`` a minute
counts as if it had gone to plan: a short stage is mostly loading, and says little of a long one.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping

from equipoise.pipeline.threads import cores

HALF = 0.5
FAR = 2.0
"""Times its plan, and ``HALF`` a minute more than planned: then a stage is far over it."""


class Pace:
    """Follows the stages of one invocation.

    Args:
        planned: Stage to planned minutes; other stages are not followed.
        say: Prints a line.
        clock: Seconds.
    """

    def __init__(
        self,
        planned: Mapping[str, float],
        say: Callable[[str], None],
        *,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._to_come, self._say, self._clock = dict(planned), say, clock
        self._planned = self._spent = 0.0
        self._name, self._since, self._told = "", clock(), True

    @property
    def left(self) -> float:
        """Minutes that the stages to come will take at the pace so far."""
        return sum(self._to_come.values()) * (self._spent + HALF) / (self._planned + HALF)

    def begin(self, name: str) -> None:
        """Note that a stage begins."""
        self._name, self._since, self._told = name, self._clock(), name not in self._to_come

    def check(self) -> None:
        """Say, once, that the stage at work is far over its plan."""
        if self._told:
            return
        spent, planned = (self._clock() - self._since) / 60, self._to_come[self._name]
        if spent > FAR * planned and spent > planned + HALF:
            self._told = True
            self._say(
                f"{self._name}: {spent:.1f} min so far, planned {planned:.1f}; {_cause()}. "
                "It goes on, and the result does not change"
            )

    def end(self, minutes: float) -> None:
        """Note that the stage has ended, and say what is left.

        Args:
            minutes: What it took, in all its attempts.
        """
        self.check()
        self._told = True
        if self._name not in self._to_come:
            return
        self._planned += self._to_come.pop(self._name)
        self._spent += minutes
        if self._to_come:
            planned = sum(self._to_come.values())
            self._say(f"left: about {self.left:.1f} min (planned {planned:.1f})")


def _cause() -> str:
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0
    if load > cores() + 0.5:
        return f"other work shares the cores (load average {load:.1f} on {cores()})"
    return "the plan was too short, or other work shared the cores"
