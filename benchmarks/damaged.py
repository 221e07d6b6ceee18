"""Damaged model directories: one seeded change each, and what loading makes of it.

    python -m benchmarks.damaged            writes benchmarks/damaged.json

A change removes, retypes or replaces a value of a JSON file, or cuts, renames, empties or swaps a
file. Loading refuses it with a clear error, or loads a model whose weights are those of the file.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from benchmarks.results import flat, shaped, write
from benchmarks.small_models import (
    adapter,
    foreign,
    reward,
    sharded,
    tuned,
    use_dials,
    use_policy,
    use_reward,
)

from equipoise.dials.manifest import file_hashes
from equipoise.errors import EquipoiseError

OUT = Path(__file__).with_name("damaged.json")
N_CHANGES, SEED = 200, 0
UNUSED = ("README.md",)
"""Files of a model directory that nothing reads."""
LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a2146\nsize 135\n"
RETYPED: tuple[Any, ...] = ("text", 7, None, [1, "a"], True, {"a": {"b": 1}})
EDGES: tuple[Any, ...] = (0, -1, 10**12, "", float("nan"), [])
FILE_KINDS = ("cut", "emptied", "renamed", "swapped", "pointer")
JSON_KINDS = ("removed", "retyped", "edge value")


NAMES = ("tuned, full weights", "tuned, LoRA", "foreign", "foreign, shards", "foreign, LoRA",
         "reward model")  # fmt: skip
Kept = tuple[Path, int, Callable[[Path], None]]


@dataclass(frozen=True)
class Change:
    """One change of one file."""

    file: str
    kind: str
    what: str
    apply: Callable[[Path], None]


def changes(directory: Path, n: int, *, seed: int) -> list[Change]:
    """Return n changes of a directory, the same for the same files, kinds and files in turn."""
    draw = random.Random(seed)
    files = sorted(file.name for file in directory.iterdir())
    slots = [(file, kind) for file in files for kind in FILE_KINDS]
    slots += [
        (file, kind)
        for file in files
        if file.endswith((".json", ".safetensors"))
        for kind in JSON_KINDS
        for _ in range(4)
    ]
    found: dict[str, Change] = {}
    while len(found) < n:
        draw.shuffle(slots)
        for file, kind in slots:
            change = _change(directory, file, kind, files, draw)
            found.setdefault(f"{file} {change.what}", change)
    return list(found.values())[:n]


def _change(
    directory: Path, file: str, kind: str, files: Sequence[str], draw: random.Random
) -> Change:
    if kind in JSON_KINDS:
        return _json_change(directory, file, kind, draw)
    other = draw.choice([name for name in files if name != file])

    def apply(place: Path) -> None:
        path = place / file
        content = path.read_bytes()
        if kind == "renamed":
            path.rename(place / f"{file}.old")
        else:
            path.write_bytes(
                {
                    "cut": content[: len(content) // 2],
                    "emptied": b"",
                    "swapped": (directory / other).read_bytes(),
                    "pointer": LFS.encode(),
                }[kind]
            )

    return Change(file, kind, f"{kind} {other if kind == 'swapped' else ''}".strip(), apply)


def _json_change(directory: Path, file: str, kind: str, draw: random.Random) -> Change:
    plain = _read(directory / file)
    path = draw.choice(list(_paths(plain)))
    before = plain
    for key in path:
        before = before[key]
    values = RETYPED if kind == "retyped" else EDGES
    value = draw.choice([one for one in values if json.dumps(one) != json.dumps(before)])

    def apply(place: Path) -> None:
        edited = _read(place / file)
        owner = edited
        for key in path[:-1]:
            owner = owner[key]
        if kind == "removed":
            del owner[path[-1]]
        else:
            owner[path[-1]] = value
        _write(place / file, edited)

    to = "" if kind == "removed" else f" to {json.dumps(value)}"
    return Change(file, kind, f"{kind}: {'.'.join(map(str, path))}{to}", apply)


def _paths(value: Any, before: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to every value; of long lists and tables the first few."""
    items = list(value.items() if isinstance(value, dict) else enumerate(value))
    for key, inner in items if len(items) < 40 else items[:3]:
        yield (*before, key)
        if isinstance(inner, dict | list):
            yield from _paths(inner, (*before, key))


def _read(file: Path) -> Any:
    """Return the JSON of a file, or of the header of a weights file."""
    data = file.read_bytes()
    if file.suffix != ".safetensors":
        return json.loads(data)
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def _write(file: Path, plain: Any) -> None:
    text = json.dumps(plain).encode()
    if file.suffix == ".safetensors":
        data = file.read_bytes()
        rest = data[8 + int.from_bytes(data[:8], "little") :]
        text = len(text).to_bytes(8, "little") + text + rest
    file.write_bytes(text)


def verdict(place: Path, use: Callable[[Path], None]) -> str:
    """Return ``refused`` or ``loaded``; whatever else is raised is the fault that is looked for."""
    try:
        use(place)
    except EquipoiseError as error:
        if not (error.what and error.why and error.fix):
            raise AssertionError("an error without cause or cure") from error
        return "refused"
    return "loaded"


def trial(
    directory: Path, found: Sequence[Change], use: Callable[[Path], None], work: Path
) -> list[tuple[Change, str]]:
    """Return what became of every change; ``raw: ...`` where something unclear was raised."""
    results = []
    for number, change in enumerate(found):
        place = work / str(number)
        shutil.copytree(directory, place)
        change.apply(place)
        try:
            result = verdict(place, use)
        except Exception as error:  # looked for: an error that names neither cause nor cure
            result = f"raw: {type(error).__name__}: {error}"
        results.append((change, result))
        shutil.rmtree(place)
    return results


def hashed(directory: Path) -> set[str]:
    """Return the files that decide what a model does."""
    return set(file_hashes(directory))


def count(results: Sequence[tuple[Change, str]]) -> dict[str, Any]:
    """Return the numbers of a trial, by kind of change."""
    kinds: dict[str, Counter[str]] = {}
    for change, result in results:
        name = "unused" if result == "loaded" and change.file in UNUSED else result
        kinds.setdefault(change.kind, Counter())[name.partition(":")[0]] += 1
    total = sum(kinds.values(), Counter[str]())
    return {
        "n": len(results),
        **{name: total[name] for name in ("refused", "unused", "loaded", "raw")},
        "kinds": {name: dict(sorted(kinds[name].items())) for name in sorted(kinds)},
    }


def directories(root: Path) -> dict[str, Kept]:
    """Make the model directories: name to (place, number of changes, how it is used)."""
    base = foreign(root / "base")
    made: list[Kept] = [
        (tuned(root / "full", base, rank=0), N_CHANGES, use_dials),
        (tuned(root / "lora", base, rank=2), N_CHANGES, use_dials),
        (foreign(root / "foreign"), N_CHANGES, use_policy),
        (sharded(root / "shards"), 70, use_policy),
        (adapter(root / "adapter", base), 70, use_policy),
        (reward(root / "reward"), 70, use_reward),
    ]
    return dict(zip(NAMES, made, strict=True))


def main() -> None:
    """Damage, load, count; write the table."""
    torch.set_num_threads(1)
    table = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (place, n, use) in directories(Path(folder)).items():
            results = trial(place, changes(place, n, seed=SEED), use, Path(folder) / "work")
            table[name] = count(results)
            for change, result in results:
                if result.startswith("raw") or "-v" in sys.argv:
                    print(f"{name}: {change.file} {change.what}: {result}")
            print(name, {key: table[name][key] for key in ("n", "refused", "unused", "loaded")})
    headline = flat(table, without=("kinds",))
    write(OUT, shaped("python -m benchmarks.damaged", headline, seeds=[SEED], trials=table))


if __name__ == "__main__":
    main()
