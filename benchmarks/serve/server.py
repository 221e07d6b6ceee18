"""The server under test, in a process of its own: the real one, before a fake engine or a model.

Prints its port and its key as one line of JSON, and stops on SIGTERM.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

import yaml

from equipoise.dials.dials import Dials
from equipoise.dials.tokens import install
from equipoise.engine.batcher import ContinuousBatcher
from equipoise.engine.seam import Generation, Load, ServingEngine, Token
from equipoise.models.load import LoadedPolicy, load_causal
from equipoise.policy.file import shipped_policies
from equipoise.policy.keys import digest, new_secret
from equipoise.policy.reload import RulesSource
from equipoise.policy.rules import Key
from equipoise.serve.app import Api, build_app
from equipoise.serve.http import on_loopback
from equipoise.serve.main import LOCAL_HOSTS, served_model

ANSWER = "First, hold the frostbell with both hands."


class FakeEngine:
    """Takes ``delay`` seconds per token and computes nothing; ``slots`` requests at once."""

    def __init__(self, ids: list[int], *, slots: int, delay: float) -> None:
        self.ids, self.slots, self.delay = ids, slots, delay
        self.healthy, self._running, self._queued = True, 0, 0
        self._free = asyncio.Semaphore(slots)

    async def start(self) -> None:
        """Nothing to start."""

    async def drain(self, seconds: float) -> None:
        """Nothing to finish."""

    def load(self) -> Load:
        """Return the counts of this moment."""
        return Load(self._running, self._queued, self.slots)

    async def stream(self, generation: Generation) -> AsyncIterator[Token]:
        """Yield the answer's ids one by one."""
        self._queued += 1
        try:
            await self._free.acquire()
        finally:
            self._queued -= 1
        self._running += 1
        try:
            for token_id in self.ids:
                await asyncio.sleep(self.delay)
                yield Token(token_id)
            yield Token(-1, "stop")
        finally:
            self._running -= 1
            self._free.release()


def dialled(model: str = "workshop://start") -> LoadedPolicy:
    """Return a model with untrained dials: as fast as a tuned one."""
    loaded = load_causal(model)
    manifest = install(loaded.model, loaded.tokenizer, dials=Dials(("helpfulness", "safety"), 5))
    encoder = loaded.encoder.with_dials(manifest)
    return LoadedPolicy(loaded.model, loaded.tokenizer, encoder, manifest, loaded.hash)


def main() -> None:
    """Serve until SIGTERM."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--slots", type=int, default=4)
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--waiting", type=int, default=64)
    parser.add_argument("--model", help="a real engine with this model; else a fake one")
    given = parser.parse_args()
    loaded, secret = dialled(given.model) if given.model else dialled(), new_secret()
    engine: ServingEngine = FakeEngine(
        loaded.encoder.completion_ids(ANSWER, finished=False), slots=given.slots, delay=given.delay
    )
    if given.model:
        engine = ContinuousBatcher(loaded.model, loaded.encoder, slots=given.slots)
    policy = yaml.safe_load(shipped_policies()["example"].read_text("utf-8"))
    policy["limits"] |= {
        "waiting": given.waiting,
        "per_key": 100_000,
        "waiting_tokens": 10**9,
        "requests_per_minute": 10**8,
    }
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "policy.yaml"
        file.write_text(yaml.safe_dump(policy), "utf-8")
        model = served_model(loaded, "model")
        key = Key(id="bench", sha256=digest(secret), scenarios=tuple(policy["scenarios"]))
        source = RulesSource(file, None, dials=model.dials, fixed_keys=(key,))
        api = Api(model, engine)
        app = build_app(api, source.current, hosts=LOCAL_HOSTS, drain_seconds=1.0)
        with on_loopback(app) as port:
            print(json.dumps({"port": port, "key": secret}), flush=True)
            signal.sigwait({signal.SIGTERM, signal.SIGINT})


if __name__ == "__main__":
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    main()
