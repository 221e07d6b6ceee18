"""How long it takes to build an Encoder on real tokenizers.

    python -m benchmarks.encoder TOKENIZER_DIR... [--before SRC] [--rounds N] [--dry]

A directory holds ``tokenizer.json`` and ``tokenizer_config.json``; its name stands in the result.
``--before`` is the ``src`` folder of another checkout: both sides are then measured in turns, each
build in a process of its own, since that is what a stage pays. Loading the tokenizer is not in it.
The committed result is ``benchmarks/encoder.json``; ``--dry`` keeps it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import median

from benchmarks.results import flat, shaped, write

RESULT = Path(__file__).with_name("encoder.json")
_BUILD = """
import sys, time
from transformers import AutoTokenizer
from equipoise.encoding.encode import Encoder
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
start = time.perf_counter()
Encoder(tokenizer)
print(time.perf_counter() - start)
"""


def seconds(folder: Path, source: Path) -> float:
    """Return the seconds of one build, in a fresh process that imports from ``source``."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(source),
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    command = [sys.executable, "-c", _BUILD, str(folder)]
    done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
    return float(done.stdout)


def measure(
    folders: list[Path], sources: Mapping[str, Path], rounds: int
) -> dict[str, dict[str, dict[str, object]]]:
    """Return tokenizer to side to ``{n, median, all}``, in seconds; the sides take turns."""
    found: dict[str, dict[str, list[float]]] = {
        folder.name: {side: [] for side in sources} for folder in folders
    }
    for _ in range(rounds):
        for folder in folders:
            for side, source in sources.items():
                found[folder.name][side].append(seconds(folder, source))
    return {
        name: {
            side: {
                "n": len(times),
                "median_seconds": round(median(times), 3),
                "seconds": [round(t, 3) for t in times],
            }
            for side, times in sides.items()
        }
        for name, sides in found.items()
    }


def main() -> None:
    """Measure, print and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folders", nargs="+", type=Path)
    parser.add_argument("--before", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dry", action="store_true", help="print, and keep the committed result")
    given = parser.parse_args()
    sources = {"now": Path(__file__).parents[1] / "src"}
    if given.before is not None:
        sources = {"before": given.before, **sources}
    timings = measure(given.folders, sources, given.rounds)
    print(json.dumps(timings, indent=1))
    if not given.dry:
        headline = flat(timings)
        write(
            RESULT, shaped("python -m benchmarks.encoder", headline, seconds_of_one_build=timings)
        )


if __name__ == "__main__":
    main()
