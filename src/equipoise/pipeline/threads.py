"""How many threads torch computes with: measured once per run directory, then kept.

A thread more is not always a gain. Where other work shares the cores, the threads of one small
matrix product wait for each other (that they do not spin meanwhile is seen to where the package is
imported). And it has to stay what it was: another number of threads may round differently, and a
resumed run would not end in the bytes of an uninterrupted one.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from pathlib import Path

from equipoise.store.publish import json_bytes, publish_bytes, read_json_or_none

FILE = "machine.json"
SECONDS, TURNS = 0.1, 4
"""Time given to each number of threads, and how often: other work comes and goes."""
PAYS = 1.1
"""Times as fast as fewer threads: a further thread that gains less is left to others."""


def cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def settle_threads(run_dir: Path, model: Path | None) -> int:
    """Set torch's threads as this run first settled them, and return their number.

    ``OMP_NUM_THREADS`` decides if it is set; then nothing is measured or kept.

    Args:
        run_dir: The run directory.
        model: The policy's directory; its width sets the size of the products that are timed.
    """
    import torch

    if "OMP_NUM_THREADS" in os.environ:
        return torch.get_num_threads()
    file = run_dir / FILE
    kept = read_json_or_none(file)
    if kept is None:
        kept = {"threads": fastest(_width(model), most=torch.get_num_threads())}
        publish_bytes(file, json_bytes(kept))
    threads = int(kept["threads"])
    torch.set_num_threads(threads)
    return threads


def fastest(width: int, *, most: int) -> int:
    """Return the number of threads, out of 1, 2, 4, ... ``most``, that decodes fastest.

    By the median over turns; more threads have to be :data:`PAYS` times as fast as fewer.
    """
    candidates = sorted({*(1 << power for power in range(most.bit_length())), most})
    turns = [[_speed(width, threads) for threads in candidates] for _ in range(TURNS)]
    best, reached = 1, 0.0
    for threads, speeds in zip(candidates, zip(*turns, strict=True), strict=True):
        speed = statistics.median(speeds)
        if speed > reached * PAYS:
            best, reached = threads, speed
    return best


def _speed(width: int, threads: int) -> float:
    import torch

    torch.set_num_threads(threads)
    rows, up = torch.ones(128, width), torch.ones(width, 4 * width)
    rows @ up  # the first product makes the threads
    count, begun = 0, time.perf_counter()
    while time.perf_counter() - begun < SECONDS:
        (torch.nn.functional.silu(rows @ up) @ up.T).softmax(-1)
        count += 1
    return count / (time.perf_counter() - begun)


def _width(model: Path | None) -> int:
    config = model / "config.json" if model is not None else None
    if config is None or not config.is_file():
        return 1024
    return int(json.loads(config.read_text("utf-8")).get("hidden_size", 1024))
