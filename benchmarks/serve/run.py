"""The serving bench: what the server adds, what it costs in throughput, and what load does to it.

    python -m benchmarks.serve.run                    # about two minutes on two cores
    python -m benchmarks.serve.run --only overhead    # or: engine, load; --dry keeps the result
    python -m benchmarks.serve.run --only real        # after `equipoise fetch smollm2`

``overhead``: requests at a fixed rate to a fake engine that computes nothing, so that all of the
latency is the server's. ``engine``: tokens per second of the Workshop's model with ``generate`` of
``transformers``, with ``TransformersEngine``, in the batcher, and through HTTP, in turns. ``real``:
the same with SmolLM2-135M, where the model is what takes the time. ``load``: an open loop (a
request is sent when it is due, not when an answer came back) at 1.2 and at 10 times what the engine
can do.

Server and client are two processes on one machine and share its cores. The committed result is
``benchmarks/serve/results.json``; its ``machine`` says where it was made and how busy that was.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.results import agreed, flat, here, read, shaped, write
from benchmarks.serve.bare import bare_generate
from benchmarks.serve.openloop import Client
from benchmarks.serve.server import ANSWER, dialled

from equipoise.config import Sampling
from equipoise.engine.batcher import ContinuousBatcher
from equipoise.engine.sample import TransformersEngine
from equipoise.engine.seam import Generation
from equipoise.steer.served import HttpResponder
from equipoise.types import Branch, DialSetting, GenerationRequest, Message, Prompt

HERE = Path(__file__).parent
RESULT = HERE / "results.json"
SETTING = DialSetting((4, 4))
SECONDS = 8.0
CONCURRENCY = 32
ROUNDS = 5


@contextmanager
def server(*arguments: str) -> Iterator[tuple[int, str, int]]:
    """Run the server in a process; yields port, key and process id."""
    process = subprocess.Popen(
        [sys.executable, str(HERE / "server.py"), *arguments], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        said = json.loads(process.stdout.readline())
        yield said["port"], said["key"], process.pid
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()


def memory_mb(process: int) -> float:
    """Return the resident memory of a process, in MB (Linux)."""
    lines = Path(f"/proc/{process}/status").read_text("utf-8").splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS")).split()[1]) / 1024


def overhead() -> dict[str, Any]:
    """Latency of the server alone: the engine behind it computes nothing."""
    found: dict[str, Any] = {}
    with server("--slots", str(CONCURRENCY)) as (port, key, _):

        async def measure() -> None:
            client = Client(port, key)
            await client.open_loop(50, 2.0)
            for rate in (50, 100, 200):
                answers = await client.open_loop(rate, SECONDS)
                found[f"{rate} per second"] = answers.summary(SECONDS)

        asyncio.run(measure())
    return found


def load() -> dict[str, Any]:
    """Open loop above capacity: does the server go on answering at its pace, in flat memory?"""
    slots, delay = 4, 0.012
    n_tokens = len(dialled().encoder.completion_ids(ANSWER, finished=False))
    capacity = slots / (n_tokens * delay)
    found: dict[str, Any] = {"slots": slots, "capacity_per_second": round(capacity, 2)}
    arguments = ("--slots", str(slots), "--delay", str(delay), "--waiting", "16")
    with server(*arguments) as (port, key, process):

        async def measure() -> None:
            client = Client(port, key)
            await client.open_loop(capacity, 2.0)
            for factor in (1.2, 10.0, 10.0):
                before, start = memory_mb(process), time.perf_counter()
                answers = await client.open_loop(factor * capacity, SECONDS)
                name = f"{factor:g} x capacity"
                name = name if name not in found else f"{name}, again"
                found[name] = {
                    **answers.summary(time.perf_counter() - start),
                    "memory_grown_mb": round(memory_mb(process) - before, 2),
                }

        asyncio.run(measure())
    peak = found["1.2 x capacity"]["completed_per_second"]
    found["share_of_peak_at_10x"] = round(
        found["10 x capacity, again"]["completed_per_second"] / peak, 3
    )
    return found


def engine(model: str = "workshop://start", rounds: int = ROUNDS) -> dict[str, Any]:
    """Tokens per second of one model four ways: bare, our engine, the batcher, and through HTTP."""
    loaded = dialled(model)
    objects = ("frostbell", "ember lamp", "kettle", "ladder")
    prompts = [
        Prompt(f"p{i}", (Message("user", f"How do I tune the {objects[i % 4]} {i}?"),), "test")
        for i in range(96)
    ]
    sampling = Sampling(temperature=1.0, top_p=1.0, top_k=256, max_tokens=48)
    control_ids = loaded.encoder.control_ids(SETTING)
    ids = [tuple(loaded.encoder.prompt_ids(prompt.messages)) for prompt in prompts]
    ours = TransformersEngine(
        loaded.model, loaded.encoder, model_hash="bench", batch_size=CONCURRENCY
    )

    def bare() -> list[int]:
        whole = [(*prompt, *control_ids) for prompt in ids]
        return bare_generate(loaded, whole, sampling, batch_size=CONCURRENCY)

    def sampled() -> list[int]:
        requests = [GenerationRequest(i, (Branch(control_ids, k),)) for k, i in enumerate(ids)]
        return [row[0].n_tokens for row in ours.generate(requests, sampling)]

    async def batched() -> list[int]:
        batcher = ContinuousBatcher(loaded.model, loaded.encoder, slots=CONCURRENCY)
        await batcher.start()

        async def one(index: int) -> int:
            asked = Generation(ids[index], control_ids, sampling, index, "bench")
            return len([token async for token in batcher.stream(asked)])

        counts = await asyncio.gather(*map(one, range(len(ids))))
        await batcher.drain(1)
        return list(counts)

    with server("--model", model, "--slots", str(CONCURRENCY)) as (port, key, _):
        responder = HttpResponder(
            f"http://127.0.0.1:{port}",
            key,
            "model",
            attributes=("helpfulness", "safety"),
            sampling=sampling,
            workers=CONCURRENCY,
        )
        ways: dict[str, Callable[[], Sequence[int]]] = {
            "bare generate": bare,
            "sampling engine": sampled,
            "batcher": lambda: asyncio.run(batched()),
            "http": lambda: [r[0].n_tokens for r in responder.respond(prompts, [SETTING], seed=0)],
        }
        # In turns, as the machine's pace may change; the first round warms up.
        rates = {name: list[float]() for name in ways}
        for _ in range(rounds + 1):
            for name, way in ways.items():
                start = time.perf_counter()
                n_tokens = sum(way())
                rates[name].append(n_tokens / (time.perf_counter() - start))
    found: dict[str, Any] = {"requests": len(ids), "concurrency": CONCURRENCY, "rounds": rounds}
    for name, all_ in rates.items():
        found[name] = {"tokens_per_second": round(statistics.median(all_[1:]), 1)}
    for name in ("batcher", "http"):
        for other in ("bare generate", "sampling engine"):
            # Of each round by itself: its four ways met the same machine.
            shares = [a / b for a, b in zip(rates[name][1:], rates[other][1:], strict=True)]
            share = round(statistics.median(shares), 3)
            found[name][f"share_of_{other.replace(' ', '_')}"] = share
    return found


def real() -> dict[str, Any]:
    """Measure :func:`engine` where the model is what takes the time."""
    return {"model": "SmolLM2-135M-Instruct", **engine("cache://smollm2", rounds=3)}


PARTS = {"overhead": overhead, "engine": engine, "load": load}
ALL_PARTS = {**PARTS, "real": real}


def main() -> None:
    """Run the parts that were asked for and update the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=ALL_PARTS)
    parser.add_argument("--dry", action="store_true", help="print, and keep the committed result")
    given = parser.parse_args()
    parts = read(RESULT)["parts"] if RESULT.is_file() else {}
    for name in [given.only] if given.only else list(PARTS):
        parts[name] = {**here(), **ALL_PARTS[name]()}
        print(json.dumps({name: parts[name]}, indent=1))
    if not given.dry:
        write(RESULT, gathered(parts))


def gathered(parts: dict[str, Any]) -> dict[str, Any]:
    """Return the result of all parts."""
    headline = flat(parts, without=("machine",))
    made_at = agreed(list(parts.values()))
    return shaped("python -m benchmarks.serve.run", headline, made_at=made_at, parts=parts)


if __name__ == "__main__":
    main()
