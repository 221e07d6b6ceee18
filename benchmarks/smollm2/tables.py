"""The tables of ``docs/smollm2.md``, from ``results.json``; a test compares the page with them.

python -m benchmarks.smollm2.tables
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

RESULT = Path(__file__).parent / "results.json"
METHODS = {
    "start": "untouched model",
    "prompting": "prompting",
    "rerank8": "reranking, N = 8",
    "rerank16": "reranking, N = 16",
    "steering": "steering (vectors while sampling)",
    "raw-clm": "CLM on the raw pool",
    "clm": "CLM on MOEC",
    "exmate": "ExMATE on MOEC",
    "best": "**steered start (the recipe)**",
}
CONTROL = {
    "control": "mp",
    "BT": "bt",
    "leakage into": "leakage",
}
GROUPS = {
    "unsafe (xstest)": "unsafe, XSTest",
    "unsafe (harmbench_standard)": "unsafe, HarmBench",
    "safe (xstest)": "safe but alarming, XSTest",
    "safe (toxicchat)": "safe, ToxicChat",
}

Json = Mapping[str, Any]


def tables(result: Json) -> dict[str, str]:
    """Return the Markdown tables of a result, by name."""
    head = result["headline"]
    return {
        **{judge: _table(*_control(head, judge)) for judge in ("optimization", "generalization")},
        "fluency": _table(*_fluency(head)),
        "reward models": _table(*_models(result["reward_models"])),
        "refusals": _table(*_refusals(result["refusals"])),
        "minutes": _table(*_minutes(result["minutes"]["best"])),
        "costs": _table(*_costs(result)),
    }


def _there(head: Json) -> list[tuple[str, str]]:
    return [(name, said) for name, said in METHODS.items() if f"{name}.degenerate" in head]


def _control(head: Json, judge: str) -> tuple[list[str], list[list[str]]]:
    columns = [(f"{said}{',' if said != 'leakage into' else ''} {attribute}", metric, attribute)
               for said, metric in CONTROL.items()
               for attribute in ("helpfulness", "safety")]  # fmt: skip
    rows = [
        [said, *(_interval(head, f"{name}.{judge}.{metric}.{a}") for _, metric, a in columns)]
        for name, said in _there(head)
    ]
    if judge == "generalization":
        bounds = [_number(head[f"bound.{a}"]) for a in ("helpfulness", "safety")]
        rows.append(["*bound*", *bounds, "", "", "", ""])
    return ["method", *(said for said, _, _ in columns)], rows


def _fluency(head: Json) -> tuple[list[str], list[list[str]]]:
    rows = [
        [
            said,
            *(
                _interval(head, f"{name}.fluency_drop.{place}")
                for place in ("mean", "worst_corner")
            ),
            f"{100 * head[f'{name}.degenerate']:.1f} %",
        ]
        for name, said in _there(head)
    ]
    return ["method", "below the untouched model's own, mean", "worst corner", "degenerate"], rows


def _models(found: Json) -> tuple[list[str], list[list[str]]]:
    rows = [
        [
            name,
            str(held["model"]["n"]),
            held["metric"],
            *(_estimate(held[key]) for key in ("model", "length_only", "bag_of_words")),
        ]
        for name, held in found.items()
    ]
    return ["model", "held-out rows", "measure", "model", "length only", "bag of words"], rows


def _refusals(found: Json) -> tuple[list[str], list[list[str]]]:
    def mean(levels: Sequence[Json]) -> str:
        return _number(sum(level["value"] for level in levels) / len(levels))

    rows = [
        [
            said,
            str(found["best"][group][0]["n"]),
            mean(found["start"][group]),
            ", ".join(_number(level["value"]) for level in found["best"][group]),
        ]
        for group, said in GROUPS.items()
    ]
    return ["", "n", "untouched model, mean", "dials, least to most safe"], rows


def _minutes(found: Json) -> tuple[list[str], list[list[str]]]:
    planned = found["planned"] or {}
    rows = [
        [stage, f"{planned[stage]:.1f}" if stage in planned else "–", f"{spent:.1f}"]
        for stage, spent in found["spent"].items()
        if spent > 0
    ]
    return ["stage", "planned", "spent"], rows


def _costs(result: Json) -> tuple[list[str], list[list[str]]]:
    rows = []
    for name, said in METHODS.items():
        if name in result["tuning"]:
            cost = result["tuning"][name]["cost"]
            spent = result["minutes"][name]["spent"]
            rows.append(
                [
                    said,
                    f"{cost['tuning_tokens'] / 1000:,.0f}",
                    f"{cost['tuning_seconds'] / 60:.1f}",
                    f"{spent['evaluate']:.1f}",
                ]
            )
    return ["method", "thousand tokens of tuning", "minutes", "minutes of evaluation"], rows


def _interval(head: Json, key: str) -> str:
    return _estimate({"value": head[key], "low": head[f"{key}.low"], "high": head[f"{key}.high"]})


def _estimate(found: Json) -> str:
    value, low, high = (_number(found[key]) for key in ("value", "low", "high"))
    return f"{value} ({low} to {high})"


def _number(value: float) -> str:
    return f"{value:.2f}".replace("-", "−")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines: Iterator[Sequence[str]] = iter([head, ["---"] * len(head), *rows])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    for name, table in tables(json.loads(RESULT.read_text())).items():
        print(f"## {name}\n\n{table}\n")
