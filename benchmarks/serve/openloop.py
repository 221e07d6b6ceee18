"""An open-loop client: a request goes out when it is due, whatever has come back by then."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass
class Answers:
    """What came back: status to count, and latencies in seconds by status."""

    latencies: dict[int, list[float]] = field(default_factory=dict)
    failed: Counter[str] = field(default_factory=Counter)

    def add(self, status: int, seconds: float) -> None:
        """Count one answer."""
        self.latencies.setdefault(status, []).append(seconds)

    def summary(self, seconds: float) -> dict[str, Any]:
        """Return counts, completed requests per second, and percentiles in milliseconds."""
        found: dict[str, Any] = {
            "completed_per_second": round(len(self.latencies.get(200, [])) / seconds, 2),
            "failed": dict(self.failed),
        }
        for status, values in sorted(self.latencies.items()):
            p50, p99 = np.percentile(np.array(values) * 1e3, [50, 99])
            found[str(status)] = {
                "n": len(values),
                "p50_ms": round(float(p50), 2),
                "p99_ms": round(float(p99), 2),
            }
        return found


class Client:
    """Keeps connections open and sends requests when they are due."""

    def __init__(self, port: int, key: str) -> None:
        body = {
            "model": "model",
            "messages": [{"role": "user", "content": "How do I tune the frostbell?"}],
            "dials": {"safety": 1, "helpfulness": 0.5},
        }
        data = json.dumps(body).encode()
        self._request = (
            f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {key}"
            f"\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
        ).encode() + data
        self._port = port
        self._idle: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def open_loop(self, rate: float, seconds: float) -> Answers:
        """Send ``rate`` requests per second for so long, and wait for what is under way."""
        answers, start = Answers(), time.perf_counter()
        tasks = []
        for index in range(round(rate * seconds)):
            await asyncio.sleep(max(0.0, start + index / rate - time.perf_counter()))
            tasks.append(asyncio.create_task(self._once(answers)))
        await asyncio.gather(*tasks)
        return answers

    async def _once(self, answers: Answers) -> None:
        begun = time.perf_counter()
        try:
            try:
                reader, writer, head = await self._exchange(self._idle.pop())
            except (IndexError, OSError, EOFError):
                # None is open, or the server has closed one that was idle for long.
                fresh = await asyncio.open_connection("127.0.0.1", self._port)
                reader, writer, head = await self._exchange(fresh)
            length = next(
                int(line.split(b":")[1])
                for line in head.lower().split(b"\r\n")
                if line.startswith(b"content-length")
            )
            await reader.readexactly(length)
            answers.add(int(head[9:12]), time.perf_counter() - begun)
            self._idle.append((reader, writer))
        except (OSError, EOFError) as error:
            answers.failed[type(error).__name__] += 1

    async def _exchange(
        self, connection: tuple[asyncio.StreamReader, asyncio.StreamWriter]
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter, bytes]:
        reader, writer = connection
        writer.write(self._request)
        return reader, writer, await reader.readuntil(b"\r\n\r\n")
