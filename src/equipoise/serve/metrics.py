"""Counters in Prometheus text form; labels are statuses, scenarios and codes, never texts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from equipoise.engine.seam import Load

_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


@dataclass
class Metrics:
    """What has happened since the start."""

    responses: Counter[int] = field(default_factory=Counter)
    """HTTP status to requests; 499 where the client left first."""
    refusals: Counter[str] = field(default_factory=Counter)
    """Code of :mod:`equipoise.protocol.failures` to requests."""
    answers: Counter[str] = field(default_factory=Counter)
    """Scenario to chat answers that have ended."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    seconds: Counter[float] = field(default_factory=Counter)
    """Upper bound of duration to chat answers, not cumulative; ``inf`` beyond the last bound."""
    seconds_sum: float = 0.0

    def took(self, seconds: float) -> None:
        """Count the duration of one chat answer."""
        bound = next((bound for bound in _BUCKETS if seconds <= bound), float("inf"))
        self.seconds[bound] += 1
        self.seconds_sum += seconds

    def text(self, load: Load, under_way: int) -> str:
        """Return the page that Prometheus reads.

        Args:
            load: Of the engine.
            under_way: Completions admitted and not finished.
        """
        lines: list[str] = []

        def add(name: str, kind: str, help_: str, values: Mapping[str, int]) -> None:
            lines.append(f"# HELP equipoise_{name} {help_}")
            lines.append(f"# TYPE equipoise_{name} {kind}")
            lines.extend(f"equipoise_{name}{label} {value}" for label, value in values.items())

        def labelled(name: str, counts: Counter[int] | Counter[str]) -> dict[str, int]:
            pairs = sorted((str(label), count) for label, count in counts.items())
            return {f'{{{name}="{label}"}}': count for label, count in pairs}

        add("responses_total", "counter", "Requests by HTTP status.",
            labelled("status", self.responses))  # fmt: skip
        add("refusals_total", "counter", "Refused requests by code.",
            labelled("code", self.refusals))  # fmt: skip
        add("answers_total", "counter", "Chat answers by scenario.",
            labelled("scenario", self.answers))  # fmt: skip
        add("prompt_tokens_total", "counter", "Prompt tokens.", {"": self.prompt_tokens})
        add("completion_tokens_total", "counter", "Sampled tokens.", {"": self.completion_tokens})
        add("completions_under_way", "gauge", "Admitted, not finished.", {"": under_way})
        add("completions_running", "gauge", "In a slot.", {"": load.running})
        add("completions_queued", "gauge", "Waiting for a slot.", {"": load.queued})
        add("slots", "gauge", "Completions sampled at once.", {"": load.slots})
        name = "answer_seconds"
        add(name, "histogram", "Duration of chat answers.", {})
        total = 0
        for bound in (*_BUCKETS, float("inf")):
            total += self.seconds[bound]
            label = "+Inf" if bound == float("inf") else f"{bound:g}"
            lines.append(f'equipoise_{name}_bucket{{le="{label}"}} {total}')
        lines.append(f"equipoise_{name}_sum {self.seconds_sum:.6f}")
        lines.append(f"equipoise_{name}_count {total}")
        return "\n".join(lines) + "\n"
