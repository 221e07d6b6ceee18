"""The serving bench: what the door adds, what it costs in throughput, and what it does under load.

    python benchmarks/serve/run.py                    # about a minute on two cores
    python benchmarks/serve/run.py --only overhead    # or: engine, load

``overhead``: requests at a fixed rate to a fake engine that computes nothing, so that all of the
latency is the door's. ``engine``: tokens per second of the Workshop's model through
``TransformersEngine``, through the batcher, and through HTTP. ``load``: an open loop (a request is
sent when it is due, not when an answer came back) at 1.2 and at 10 times what the engine can do.

Server and client are two processes on one machine and share its cores. The committed result is
``benchmarks/serve/results.json``; its ``machine`` says where it was made and how busy that was.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from openloop import Client
from server import ANSWER, dialled

from equipoise.models.sampling import TransformersEngine
from equipoise.serve.batcher import ContinuousBatcher
from equipoise.serve.client import HttpResponder
from equipoise.serve.engine import Generation
from equipoise.types import Branch, DialSetting, GenerationRequest, Message, Prompt, Sampling

HERE = Path(__file__).parent
RESULT = HERE / "results.json"
SETTING = DialSetting((4, 4))
SECONDS = 8.0
CONCURRENCY = 32


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
    """Latency of the door alone: the engine behind it computes nothing."""
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
                name = f"{factor:g} x capacity" + (", again" if factor in found else "")
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


def engine() -> dict[str, Any]:
    """Tokens per second of one model three ways, the same completions each time."""
    loaded = dialled()
    objects = ("frostbell", "ember lamp", "kettle", "ladder")
    prompts = [
        Prompt(f"p{i}", (Message("user", f"How do I tune the {objects[i % 4]} {i}?"),), "test")
        for i in range(96)
    ]
    sampling = Sampling(temperature=1.0, top_p=1.0, top_k=256, max_tokens=48)
    found: dict[str, Any] = {"requests": len(prompts), "concurrency": CONCURRENCY}

    def rate(name: str, n_tokens: Sequence[int], seconds: float) -> None:
        found[name] = {"tokens_per_second": round(sum(n_tokens) / seconds, 1)}

    control_ids = loaded.encoder.control_ids(SETTING)
    ids = [tuple(loaded.encoder.prompt_ids(prompt.messages)) for prompt in prompts]
    bare = TransformersEngine(
        loaded.model, loaded.encoder, model_hash="bench", batch_size=CONCURRENCY
    )
    requests = [GenerationRequest(i, (Branch(control_ids, k),)) for k, i in enumerate(ids)]
    bare.generate(requests[:8], sampling)
    start = time.perf_counter()
    sampled = bare.generate(requests, sampling)
    rate("sampling engine", [row[0].n_tokens for row in sampled], time.perf_counter() - start)

    async def batched() -> list[int]:
        batcher = ContinuousBatcher(loaded.model, loaded.encoder, slots=CONCURRENCY)
        await batcher.start()

        async def one(index: int) -> int:
            asked = Generation(ids[index], control_ids, sampling, index, "bench")
            return len([token async for token in batcher.stream(asked)])

        counts = await asyncio.gather(*map(one, range(len(ids))))
        await batcher.drain(1)
        return list(counts)

    start = time.perf_counter()
    counts = asyncio.run(batched())
    rate("batcher", counts, time.perf_counter() - start)
    with server("--real", "--slots", str(CONCURRENCY)) as (port, key, _):
        responder = HttpResponder(
            f"http://127.0.0.1:{port}",
            key,
            "model",
            attributes=("helpfulness", "safety"),
            sampling=sampling,
            workers=CONCURRENCY,
        )
        responder.respond(prompts[:8], [SETTING], seed=1)
        start = time.perf_counter()
        rows = responder.respond(prompts, [SETTING], seed=0)
        rate("http", [row[0].n_tokens for row in rows], time.perf_counter() - start)
    for name in ("batcher", "http"):
        share = found[name]["tokens_per_second"] / found["sampling engine"]["tokens_per_second"]
        found[name]["share_of_sampling_engine"] = round(share, 3)
    return found


PARTS = {"overhead": overhead, "engine": engine, "load": load}


def machine() -> dict[str, Any]:
    """Return what the figures depend on."""
    import torch
    import transformers

    names = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    return {
        "processor": next(line.split(": ")[1] for line in names if line.startswith("model name")),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "load_average": [round(value, 2) for value in os.getloadavg()],
    }


def main() -> None:
    """Run the parts that were asked for and update the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=PARTS)
    given = parser.parse_args()
    found = json.loads(RESULT.read_text("utf-8")) if RESULT.is_file() else {}
    for name in [given.only] if given.only else list(PARTS):
        found[name] = {"machine": machine(), **PARTS[name]()}
        print(json.dumps({name: found[name]}, indent=1))
    RESULT.write_text(json.dumps(found, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
