"""Tokens per second of two commits in turns: offline on K samples per prompt, and in the batcher.

    git worktree add ../before COMMIT
    python -m benchmarks.decoder --before ../before    # after `equipoise fetch smollm2`
    python -m benchmarks.decoder --before ../before --only "offline workshop" --dry

Each side is a process of its own that loads both models and then waits its turn, so that both meet
the same machine; the first round warms up. The result is ``benchmarks/decoder.json``: per workload
the median and the range of the ratio after / before, by the clock and by the processor's time
(which other work on the machine disturbs less), and the share of completions whose ids agree.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

from benchmarks import results

HERE = Path(__file__).parent
RESULT = HERE / "decoder.json"
WORKSHOP, SMOLLM2 = "workshop://start", "cache://smollm2"
K, BATCH = 16, 128

OFFLINE = {"offline smollm2": (SMOLLM2, 8, 24), "offline workshop": (WORKSHOP, 16, 64)}
"""Model, prompts (K samples of each), new tokens at most."""
SERVED = {
    "batcher smollm2, 16 requests": (SMOLLM2, 16, 24, 16),
    "batcher smollm2, 64 requests": (SMOLLM2, 64, 80, 16),
    "batcher workshop, 16 requests": (WORKSHOP, 16, 96, 64),
    "batcher workshop, 64 requests": (WORKSHOP, 64, 192, 64),
}
"""Model, requests at once (as many slots), requests in all, new tokens at most."""
_ASIDES = ("", " Explain it as if I had never done it before.", " " + "I have little time. " * 4)


def _questions(n: int) -> list[str]:
    things = ("frostbell", "ember lamp", "kettle", "ladder", "brass key", "letter to my landlord")
    return [f"How do I repair the {things[i % 6]} {i}?{_ASIDES[i % 3]}" for i in range(n)]


def _work(side: str) -> None:
    """Answer names of workloads on stdin with one line of JSON each."""
    from equipoise.dials.tokens import install
    from equipoise.engine.batcher import ContinuousBatcher
    from equipoise.engine.sample import TransformersEngine
    from equipoise.engine.seam import Generation
    from equipoise.models.load import LoadedPolicy, load_causal
    from equipoise.types import Branch, DialSetting, GenerationRequest, Message

    named: dict[str, Any] = {"attributes": ("helpfulness", "safety"), "levels": 5}
    with suppress(ImportError):  # commits from before this class
        from equipoise.dials.dials import Dials

        named = {"dials": Dials(**named)}
    try:
        from equipoise.config import Sampling
    except ImportError:
        from equipoise.types import Sampling  # type: ignore[attr-defined,no-redef]

    @cache
    def dialled(name: str) -> LoadedPolicy:
        found = load_causal(name, device="cpu")
        dials = install(found.model, found.tokenizer, **named)
        encoder = found.encoder.with_dials(dials)
        return LoadedPolicy(found.model, found.tokenizer, encoder, dials, found.hash)

    def prompts_of(name: str, n: int) -> list[tuple[int, ...]]:
        encode = dialled(name).encoder.prompt_ids
        return [tuple(encode((Message("user", text),))) for text in _questions(n)]

    def offline(name: str, n: int, most: int) -> Callable[[], list[list[int]]]:
        policy, sampling = (
            dialled(name),
            Sampling(temperature=1.0, top_p=1.0, top_k=256, max_tokens=most),
        )
        engine = TransformersEngine(policy.model, policy.encoder, model_hash=side, batch_size=BATCH)
        requests = [
            GenerationRequest(ids, tuple(Branch((), 1000 * i + k) for k in range(K)))
            for i, ids in enumerate(prompts_of(name, n))
        ]
        return lambda: [
            [*one.token_ids, -1] for row in engine.generate(requests, sampling) for one in row
        ]

    def served(name: str, at_once: int, n: int, most: int) -> Callable[[], list[list[int]]]:
        policy, sampling = (
            dialled(name),
            Sampling(temperature=1.0, top_p=1.0, top_k=256, max_tokens=most),
        )
        control_ids = policy.encoder.control_ids(DialSetting((4, 4)))
        asked = [
            Generation(ids, control_ids, sampling, i, "bench")
            for i, ids in enumerate(prompts_of(name, n))
        ]

        async def all_of_them() -> list[list[int]]:
            batcher = ContinuousBatcher(policy.model, policy.encoder, slots=at_once)
            await batcher.start()
            free = asyncio.Semaphore(at_once)

            async def one(generation: Generation) -> list[int]:
                async with free:
                    return [token.id async for token in batcher.stream(generation)]

            found = await asyncio.gather(*map(one, asked))
            await batcher.drain(1)
            return list(found)

        return lambda: asyncio.run(all_of_them())

    @cache
    def way(name: str, tokens: int) -> Callable[[], list[list[int]]]:
        *how, most = OFFLINE[name] if name in OFFLINE else SERVED[name]
        return (offline if name in OFFLINE else served)(*how, min(most, tokens))

    print("ready", flush=True)
    for line in sys.stdin:
        work = way(*json.loads(line))
        start, own = time.perf_counter(), time.process_time()
        ids = work()
        seconds, own = time.perf_counter() - start, time.process_time() - own
        print(
            json.dumps(
                {
                    "rate": sum(map(len, ids)) / seconds,
                    "own": sum(map(len, ids)) / own,
                    "texts": [hashlib.sha256(str(one).encode()).hexdigest()[:12] for one in ids],
                }
            ),
            flush=True,
        )


class _Side:
    """One commit's process."""

    def __init__(self, name: str, tree: Path) -> None:
        self.commit = _git(tree, "rev-parse", "HEAD")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.decoder", "--worker", name],
            cwd=HERE.parent,
            env={**os.environ, "PYTHONPATH": str(tree / "src")},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._said()

    def run(self, workload: str, tokens: int) -> Any:
        """Return the rates and the texts of one round of at most so many tokens per answer."""
        assert self._process.stdin is not None
        print(json.dumps([workload, tokens]), file=self._process.stdin, flush=True)
        return json.loads(self._said())

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _said(self) -> str:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise SystemExit(f"the process of {self.commit} ended")
        return line


def _git(tree: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(tree), *arguments], check=True, capture_output=True, text=True
    ).stdout.strip()


def measure(
    before: _Side, after: _Side, workload: str, *, pairs: int, tokens: int
) -> dict[str, Any]:
    """Return rates and ratios of one workload; who begins changes from pair to pair."""
    rounds: dict[_Side, list[Any]] = {before: [], after: []}
    for pair in range(pairs + 1):
        for side in (before, after) if pair % 2 else (after, before):
            rounds[side].append(side.run(workload, tokens))
    agree = [
        a == b for a, b in zip(*(rounds[s][-1]["texts"] for s in (before, after)), strict=True)
    ]
    found: dict[str, Any] = {"pairs": pairs, "completions": len(agree)}
    found["same_ids"] = round(sum(agree) / len(agree), 4)
    for name, key in (("wall", "rate"), ("processor", "own")):
        old, new = ([one[key] for one in rounds[side][1:]] for side in (before, after))
        ratios = [a / b for a, b in zip(new, old, strict=True)]
        found[f"{name}_time"] = {
            "before_tokens_per_second": round(statistics.median(old), 1),
            "after_tokens_per_second": round(statistics.median(new), 1),
            "ratio": round(statistics.median(ratios), 3),
            "ratio_range": [round(min(ratios), 3), round(max(ratios), 3)],
        }
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure both trees in turns and update the result."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--before", type=Path, help="a worktree of the commit to compare with")
    parser.add_argument("--only", choices=(*OFFLINE, *SERVED), action="append")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=10**6, help="at most, of one answer")
    parser.add_argument("--dry", action="store_true", help="print, and keep the committed result")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    if given.worker:
        _work(given.worker)
        return
    if given.before is None:
        parser.error("--before is missing")
    before, after = _Side("before", given.before), _Side("after", HERE.parent)
    for workload in given.only or (*OFFLINE, *SERVED):
        most = {**OFFLINE, **SERVED}[workload][-1]
        found = {
            "before": before.commit,
            "commit": after.commit,
            "machine": results.machine(),
            "new_tokens": min(most, given.tokens),
            **measure(before, after, workload, pairs=given.pairs, tokens=given.tokens),
        }
        workloads = results.read(RESULT)["workloads"] if RESULT.is_file() else {}
        workloads[workload] = found
        print(json.dumps({workload: workloads[workload]}, indent=1), flush=True)
        headline = {
            f"{name}.{kind}.ratio": one[kind]["ratio"]
            for name, one in workloads.items()
            for kind in ("processor_time", "wall_time")
        }
        made = results.shaped(
            "python -m benchmarks.decoder --before DIR",
            headline,
            seeds=[0],
            made_at=results.agreed(list(workloads.values())),
            workloads=workloads,
        )
        if not given.dry:
            results.write(RESULT, made)
    before.close()
    after.close()


if __name__ == "__main__":
    main()
