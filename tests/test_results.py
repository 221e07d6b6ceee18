"""Committed results: one shape for all, and nothing in them that nobody knows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from benchmarks.results import ROOT, agreed, flat, read, shaped, write

SINGLE = ("architectures", "damaged", "decoder", "encoder", "lora", "threads")
FILES = [*ROOT.glob("*/results.json"), *(ROOT / f"{name}.json" for name in SINGLE)]


def test_no_result_lies_elsewhere() -> None:
    assert {file.parent.name for file in ROOT.glob("*/results.json")} == {
        "paper",
        "serve",
        "smollm2",
        "workshop",
    }
    assert {file.stem for file in ROOT.glob("*.json")} == set(SINGLE)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_a_result_says_what_it_found_where_and_of_which_commit(file: Path) -> None:
    found = read(file)
    assert found["made_by"].startswith("python -m benchmarks.")
    assert found["headline"], "a result without a headline"
    for name, value in found["headline"].items():
        assert value is None or type(value) in (int, float), name
    assert all(type(seed) is int for seed in found["seeds"])
    for name in ("commit", "machine"):
        # Known, or a reason why not; never neither, and never both.
        assert (found[name] is None) == bool(found.get("unknown", {}).get(name)), name


def test_parts_agree_on_a_machine_whatever_else_it_did() -> None:
    def part(**changes: Any) -> dict[str, Any]:
        machine = {"cores": 2, "threads": 1, "load_average": [0.1]}
        return {"commit": "abc", "machine": {**machine, **changes.pop("machine", {})}, **changes}

    busy = part(machine={"load_average": [2.0], "threads": 2})
    assert agreed([part(), busy]) == {"commit": "abc", "machine": {"cores": 2}}
    several = agreed([part(), part(commit="def", machine={"cores": 4})])
    assert several["commit"] is several["machine"] is None
    assert several["unknown"] == dict.fromkeys(("commit", "machine"), "the parts have several")
    lost = agreed([part(), {}])
    assert lost["unknown"]["commit"] == "1 of 2 parts did not record it"


@pytest.mark.skipif(not (ROOT.parent / ".git").exists(), reason="not a checkout")
def test_a_new_result_names_its_commit_and_machine(tmp_path: Path) -> None:
    write(tmp_path / "new.json", shaped("python -m benchmarks.new", {"n": 1}, seeds=[3]))
    found = read(tmp_path / "new.json")
    assert len(found["commit"].rstrip("+")) == 40 and found["machine"]["cores"] >= 1
    assert list(found) == ["made_by", "commit", "machine", "seeds", "headline"]
    assert [path.name for path in tmp_path.iterdir()] == ["new.json"]


def test_numbers_are_found_by_their_dotted_name() -> None:
    found = {"a b": {"n": 1, "x": {"y": 0.5}}, "machine": {"cores": 2}, "said": "no", "ok": True}
    assert flat(found, without=("machine",)) == {"a_b.n": 1, "a_b.x.y": 0.5}
