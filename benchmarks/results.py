"""One shape for every committed result, and the machine and commit that it came from.

A result begins with ``made_by``, ``commit``, ``machine``, ``seeds`` and ``headline``, which maps
names to numbers and is flat. What an old result did not record is null, and ``unknown`` says why.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent
DOCS = ROOT.parent / "docs"


def machine() -> dict[str, Any]:
    """Return processor, cores, versions and how busy the machine is."""
    import torch
    import transformers

    return {
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "load_average": [round(value, 2) for value in os.getloadavg()],
    }


def processor() -> str:
    """Return the processor's name, which ``platform`` does not know on Linux."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.is_file() else []
    names = [line.split(": ")[1] for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def commit() -> str:
    """Return the commit of this checkout, with ``+`` behind it where its code was changed."""

    def git(*arguments: str) -> str:
        run = ["git", "-C", str(ROOT), *arguments]
        return subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()

    changed = git("status", "--porcelain", "-uno", "--", "../src", "*.py")
    return git("rev-parse", "HEAD") + ("+" if changed else "")


def here() -> dict[str, Any]:
    """Return this commit and machine, for a part of a result that is measured by itself."""
    return {"commit": commit(), "machine": machine()}


def agreed(parts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the commit and machine of all parts, null where they have none or several."""
    found: dict[str, Any] = {}
    unknown = {}
    for name in ("commit", "machine"):
        values = [part.get(name) for part in parts]
        if name == "machine":  # how busy it was changes from part to part
            passing = ("load_average", "threads")
            values = [v and {k: own for k, own in v.items() if k not in passing} for v in values]
        found[name] = values[0] if all(value == values[0] for value in values) else None
        if None in values:
            unknown[name] = f"{values.count(None)} of {len(values)} parts did not record it"
        elif found[name] is None:
            unknown[name] = "the parts have several"
    return {**found, "unknown": unknown} if unknown else found


def shaped(
    made_by: str,
    headline: Mapping[str, Any],
    *,
    seeds: Sequence[int] = (),
    made_at: Mapping[str, Any] | None = None,
    **rest: Any,
) -> dict[str, Any]:
    """Return a result, of this commit and machine unless ``made_at`` says another."""
    place = here() if made_at is None else made_at
    return {
        "made_by": made_by,
        **place,
        "seeds": list(seeds),
        "headline": dict(headline),
        **rest,
    }


def flat(found: Mapping[str, Any], *, without: Sequence[str] = ()) -> dict[str, float]:
    """Return the numbers of nested mappings by dotted name."""
    return dict(_numbers(found, without))


def _numbers(found: Mapping[str, Any], without: Sequence[str]) -> Iterator[tuple[str, float]]:
    for name, value in found.items():
        key = str(name).replace(" ", "_")
        if name in without:
            continue
        if isinstance(value, Mapping):
            yield from ((f"{key}.{inner}", n) for inner, n in _numbers(value, without))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            yield key, value


def read(file: Path) -> Any:
    """Return the JSON of a file."""
    return json.loads(file.read_text("utf-8"))


def write(file: Path, result: Any, *, indent: int | None = 1) -> None:
    """Write a result; it appears whole or not at all."""
    separators = None if indent else (",", ":")
    text = json.dumps(result, indent=indent, separators=separators)
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(".tmp")
    temporary.write_text(text + "\n", "utf-8")
    temporary.replace(file)
    print(f"wrote {file}", flush=True)
