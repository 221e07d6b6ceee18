"""The tables of the page: methods by metric, cost, quality. All text is escaped here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from equipoise.evaluate.metrics import chance_leakage, median_floor, untouched_floor
from equipoise.report.canvas import ceiling_name, judges_name, label, number, written
from equipoise.report.captions import CAPTIONS

Json = Mapping[str, Any]


def main_judge(report: Json) -> str:
    """Return the judge that the page shows: generalization where any method has it."""
    parts = report["methods"].values()
    return "generalization" if any(p.get("generalization") for p in parts) else "optimization"


def estimate(found: Json | None, form: str = "{:.2f}") -> str:
    """Return the cell of an estimate: the value, and its interval in small print."""
    value, low, high = number(dict(found) if found else None)
    if math.isnan(value):
        return "–"
    if math.isnan(low):
        return written(value, form)
    return f"{written(value, form)}<small>{written(low, form)} to {written(high, form)}</small>"


def words(found: Json) -> str:
    """Return an estimate with its interval as a phrase."""
    value, low, high = map(written, number(dict(found)))
    return f"{value} ({low} to {high})"


def count(value: Any) -> str:
    """Return a count with thousands marked; anything else as it is."""
    return f"{value:,}" if isinstance(value, int) else str(value)


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a table; head and rows are HTML already."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    table = f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll">{table}</div>'


_COLUMNS = {
    "control (MP)": "mp",
    "extremes (BT)": "bt",
    "neighbours (BT)": "bt_neighbours",
    "error (RMSE)": "rmse",
    "leakage": "leakage",
    "leakage, absolute": "leakage_absolute",
    "range": "range",
}


def method_tables(report: Json) -> str:
    """Return one table per judge and attribute, then cost."""
    attributes, levels = report["recipe"]["attributes"], report["recipe"]["levels"]
    judges = {
        "generalization": f"by {judges_name(report)} (generalization)",
        "optimization": "by the reward models used in training (optimization)",
    }
    parts = []
    for judge, said in judges.items():
        shown = {label(m): p[judge] for m, p in report["methods"].items() if p.get(judge)}
        best = (report.get("ceiling") or {}).get(judge)
        if shown and best:
            shown[ceiling_name(report)] = best
        for attribute in attributes if shown else ():
            rows = [
                [
                    escape(name),
                    *(estimate(control[key].get(attribute)) for key in _COLUMNS.values()),
                    _share(control["range"], (best or {}).get("range"), attribute),
                    estimate(control["coverage"]),
                ]
                for name, control in shown.items()
            ]
            head = ["method", *_COLUMNS, "of the ceiling's range", "coverage"]
            parts.append(f"<h3>{escape(attribute)}, {escape(said)}</h3>{table(head, rows)}")
    floors = (
        f"To read the tables by, at {levels} levels: the error of a model that always answers at "
        f"the median is {median_floor(levels):.3f}, that of the untouched model about "
        f"{untouched_floor(levels):.3f}; the absolute leakage of a model deaf to all dials is "
        f"{chance_leakage(levels ** len(attributes)):.2f}. Small print: 95 % intervals over "
        "prompts."
    )
    return f'{"".join(parts)}{_bound(report)}<p class="muted">{floors}</p>{_cost(report)}'


def _share(found: Json, of: Json | None, attribute: str) -> str:
    value, best = number(found.get(attribute))[0], number((of or {}).get(attribute))[0]
    known = best > 0 and not math.isnan(value)
    return written(value / best, "{:.0%}") if known else "–"


def _bound(report: Json) -> str:
    """Return how far reward model and judge agree on the pool."""
    key = "within_prompt_judge_correlation"
    found = {a: (report.get("pool") or {}).get(a) or {} for a in report["recipe"]["attributes"]}
    known = {a: facts[key] for a, facts in found.items() if facts.get(key) is not None}
    if not known:
        return ""
    listed = ", ".join(f"{escape(a)} <b>{written(value)}</b>" for a, value in known.items())
    return f"<p>Agreement of reward model and judge: {listed}. {escape(CAPTIONS['bound'])}</p>"


def _cost(report: Json) -> str:
    attributes = report["recipe"]["attributes"]
    judge = main_judge(report)
    rows = []
    for method, found in report["methods"].items():
        control, cost = found.get(judge), found.get("cost") or {}
        figures: list[Json | None] = [None] * (1 + 2 * len(attributes))
        if control:
            figures = [control["overall"]]
            figures += [
                control[key].get(a) for key in ("auto_mp", "never_moves") for a in attributes
            ]
        spent = [cost.get(key) for key in ("seconds", "tokens", "steps")]
        rows.append(
            [
                escape(label(method)),
                *map(estimate, figures),
                *("–" if value is None else count(round(value)) for value in spent),
            ]
        )
    head = ["method", "overall control"]
    head += [f"{escape(a)}, rest on auto (MP)" for a in attributes]
    head += [f"{escape(a)} never moves" for a in attributes]
    return f"<h3>Overall, auto, and cost</h3>{table([*head, 'seconds', 'tokens', 'steps'], rows)}"


def quality_tables(report: Json) -> str:
    """Return what each method kept of the language; empty if it was not measured."""
    found = {m: p["quality"] for m, p in report["methods"].items() if p.get("quality")}
    if not found:
        return ""
    head = ["method", "degenerate", "log-likelihood per token", "perplexity, dials on auto"]
    head += ["beside the untouched model's"]
    rows = [
        [
            escape(label(method)),
            estimate(q.get("degenerate"), "{:.1%}"),
            estimate(q.get("fluency_mean")),
            estimate(q.get("perplexity")),
            estimate(q.get("perplexity_ratio")),
        ]
        for method, q in found.items()
    ]
    kept = f"<h3>Quality kept</h3>{table(head, rows)}"
    return kept + _drift(found) + _lengths(report, found)


def _drift(found: Json) -> str:
    rows = [
        [escape(label(method)), escape(attribute), escape(judge), estimate(moved, "{:+.2f}")]
        for method, q in found.items()
        for judge, by in (q.get("drift") or {}).items()
        for attribute, moved in by.items()
    ]
    head = ["method, dials on auto", "score", "by", "minus the untouched model, benign prompts"]
    return table(head, rows) if rows else ""


def _lengths(report: Json, found: Json) -> str:
    measured = {m: q["length"] for m, q in found.items() if q.get("length")}
    if not measured:
        return ""
    attributes, levels = report["recipe"]["attributes"], report["recipe"]["levels"]
    head = [
        "tokens per completion",
        *(str(k) if k else f"{escape(a)} 0" for a in attributes for k in range(levels)),
    ]
    rows = [
        [escape(label(m)), *(f"{number(e)[0]:.0f}" for a in attributes for e in by[a])]
        for m, by in measured.items()
    ]
    return table(head, rows)
