"""Kill stages at their k-th flush or rename, run them again, and compare all hashes.

A program of its own, so that every process it forks has torch imported but never used: the parent
computes nothing. The product has no hook for this: the child wraps ``os.fsync`` and ``os.replace``.

    python crash_driver.py RUN_DIR WORK_DIR STAGE=POINTS...

RUN_DIR holds the stages, or at least all that come before them, complete. Prints one JSON object,
stage to what was found. One process for all stages: importing torch takes longer than their work.
"""

from __future__ import annotations

import importlib
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def import_everything() -> None:
    """Pay once for what every child needs."""
    import datasets  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers  # noqa: F401
    import trl  # noqa: F401
    from transformers import (  # noqa: F401
        LlamaForCausalLM,
        LlamaForSequenceClassification,
        PreTrainedTokenizerFast,
        Trainer,
    )

    import equipoise.engine.sample
    import equipoise.pipeline.runner
    import equipoise.pool.score
    import equipoise.report.render
    import equipoise.tune.trainer  # noqa: F401
    from equipoise.pipeline.table import STAGES

    for row in STAGES.values():
        importlib.import_module(row.where.partition(":")[0])

    torch.set_num_threads(1)


def wrap_calls(on_call: Callable[[], bool]) -> None:
    """Let ``on_call`` run before each flush and rename; true: do the call, then die."""

    def wrapped(call: Callable[..., Any]) -> Callable[..., Any]:
        def inner(*args: Any, **kwargs: Any) -> Any:
            die_after = on_call()
            result = call(*args, **kwargs)
            if die_after:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return inner

    os.fsync, os.replace = wrapped(os.fsync), wrapped(os.replace)  # type: ignore[assignment]


def kill_at(point: int) -> None:
    """Die at call number ``point`` (from 0): before it if even, right after it if odd."""
    count = -1

    def on_call() -> bool:
        nonlocal count
        count += 1
        if count == point and point % 2 == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return count == point

    wrap_calls(on_call)


def run_stage(run_dir: Path, stage: str) -> None:
    """Run one stage as the command line would."""
    from equipoise.pipeline.rundir import RunDir
    from equipoise.pipeline.runner import run_stage as run
    from equipoise.pipeline.stored import stored_recipe
    from equipoise.progress import Progress

    with RunDir.open(run_dir, stored_recipe(run_dir)) as opened:
        run(stage, opened, progress=Progress(quiet=True))


def in_child(body: Callable[[], None]) -> int:
    """Run ``body`` in a forked process; return its wait status."""
    pid = os.fork()
    if pid == 0:
        try:
            body()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


def outputs(run_dir: Path, stage: str) -> Any:
    """The hashes that a stage has recorded."""
    return json.loads((run_dir / stage / "stage.json").read_text())["outputs"]


def up_to(stage: str, source: Path, target: Path) -> Path:
    """Copy a run directory without a stage and all that come after it."""
    from equipoise.pipeline.table import ORDER

    shutil.copytree(source, target)
    for later in ORDER[ORDER.index(stage) :]:
        shutil.rmtree(target / later, ignore_errors=True)
    return target


def check(base: Path, work: Path, stage: str, points: int) -> dict[str, Any]:
    """Return the number of calls, the points killed at, and what went wrong."""
    reference, counter = work / "reference", work / "calls"
    shutil.copytree(base, reference)

    def counted() -> None:
        calls = 0

        def on_call() -> bool:
            nonlocal calls
            calls += 1
            return False

        wrap_calls(on_call)
        run_stage(reference, stage)
        counter.write_text(str(calls))

    assert in_child(counted) == 0
    calls, expected = int(counter.read_text()), outputs(reference, stage)
    chosen = sorted({round(i * (calls - 1) / max(points - 1, 1)) for i in range(points)})
    wrong = []
    for point in chosen:
        run_dir = work / f"kill-{point}"
        shutil.copytree(base, run_dir)

        def killed(run_dir: Path = run_dir, point: int = point) -> None:
            kill_at(point)
            run_stage(run_dir, stage)

        status = in_child(killed)
        if not (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL):
            wrong.append(f"point {point}: not killed, status {status}")
        if in_child(lambda run_dir=run_dir: run_stage(run_dir, stage)) != 0:
            wrong.append(f"point {point}: the second run failed")
        elif outputs(run_dir, stage) != expected:
            wrong.append(f"point {point}: other hashes")
        left = [path.name for path in run_dir.rglob("*") if path.name.startswith(".tmp-")]
        wrong += [f"point {point}: {name} left over" for name in left]
        shutil.rmtree(run_dir)
    return {"calls": calls, "killed": len(chosen), "wrong": wrong, "outputs": len(expected)}


if __name__ == "__main__":
    import_everything()
    whole, work = Path(sys.argv[1]), Path(sys.argv[2])
    found = {}
    for stage, points in (item.split("=") for item in sys.argv[3:]):
        base = up_to(stage, whole, work / stage / "base")
        found[stage] = check(base, work / stage, stage, int(points))
    print(json.dumps(found))
