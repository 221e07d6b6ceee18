"""Counters for Prometheus; labels are statuses, scenarios and codes, never texts."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
)

from equipoise.engine.seam import Load

_SECONDS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """What has happened since the start, and what is under way.

    Args:
        load: Returns the load of the engine.
        under_way: Returns the completions that are admitted and not finished.
    """

    def __init__(self, load: Callable[[], Load], under_way: Callable[[], int]) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()

        def counter(name: str, help_: str, *labels: str) -> Counter:
            return Counter(f"equipoise_{name}", help_, labels, registry=self._registry)

        def gauge(name: str, help_: str, value: Callable[[], float]) -> None:
            Gauge(f"equipoise_{name}", help_, registry=self._registry).set_function(value)

        self.responses = counter("responses", "Requests by HTTP status.", "status")
        """499 where the client left first."""
        self.refusals = counter("refusals", "Refused requests by code.", "code")
        self.answers = counter("answers", "Chat answers by scenario.", "scenario")
        self.prompt_tokens = counter("prompt_tokens", "Prompt tokens.")
        self.completion_tokens = counter("completion_tokens", "Sampled tokens.")
        gauge("completions_under_way", "Admitted, not finished.", under_way)
        gauge("completions_running", "In a slot.", lambda: load().running)
        gauge("completions_queued", "Waiting for a slot.", lambda: load().queued)
        gauge("slots", "Completions sampled at once.", lambda: load().slots)
        name, help_ = "equipoise_answer_seconds", "Duration of chat answers."
        self.seconds = Histogram(name, help_, buckets=_SECONDS, registry=self._registry)

    def page(self) -> bytes:
        """Return the page that Prometheus reads."""
        return generate_latest(self._registry)
