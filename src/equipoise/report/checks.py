"""The end of the page: is the comparison fair, are the judges good, what was kept, how long."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from typing import Any

from equipoise.report.canvas import written
from equipoise.report.captions import CAPTIONS
from equipoise.report.tables import count, estimate, table

Json = Mapping[str, Any]


def check_tables(report: Json) -> str:
    """Return intersections, judges, scale, counts and minutes; each only where it is known."""
    parts = [part(report) for part in (_unseen, _judging, _scale, _skipped, _kept, _minutes)]
    return "<h2>Checks and counts</h2>" + "".join(parts) if any(parts) else ""


def _said(caption: str, made: str) -> str:
    return f"<p>{escape(caption)}</p>{made}"


def _unseen(report: Json) -> str:
    found = report.get("intersections") or {}
    rows = [[escape(k), "not known" if v is None else count(v)] for k, v in found.items()]
    return _said(CAPTIONS["intersections"], table(["set", "shared prompts"], rows)) if rows else ""


def _judging(report: Json) -> str:
    rows = []
    for name, card in (report.get("reward_models") or {}).items():
        held = card.get("held_out")
        if held:
            figures = [estimate(held.get(key)) for key in ("model", "length_only", "bag_of_words")]
            rows.append([escape(name), escape(str(held.get("metric", ""))), *figures])
    head = ["model", "measure", "held out", "length only", "bag of words"]
    return _said(CAPTIONS["judging"], table(head, rows)) if rows else ""


def _scale(report: Json) -> str:
    keys = {
        "n": "completions",
        "between_prompt_share": "variance between prompts",
        "within_prompt_judge_correlation": "agrees with the judge within a prompt",
        "top_tie": "share tied at the top",
    }
    found = {a: p for a, p in (report.get("pool") or {}).items() if isinstance(p, Mapping)}
    rows = [
        [
            escape(attribute),
            *(
                "–" if v is None else count(v) if isinstance(v, int) else written(v)
                for v in (facts.get(key) for key in keys)
            ),
        ]
        for attribute, facts in found.items()
    ]
    return _said(CAPTIONS["scale"], table(["attribute", *keys.values()], rows)) if rows else ""


def _skipped(report: Json) -> str:
    rows = [
        [escape(stage), count(facts["count"]), "<br>".join(map(escape, facts["first"]))]
        for stage, facts in (report.get("skipped") or {}).items()
    ]
    head = ["stage", "rows skipped", "the first"]
    return _said(CAPTIONS["skipped"], table(head, rows)) if rows else ""


def _kept(report: Json) -> str:
    moec = report.get("moec")
    if not moec:
        return ""
    rows = [["completions in the pool", count(moec.get("n_pool"))]]
    rows += [[f"dropped: {escape(k)}", count(v)] for k, v in moec.get("dropped", {}).items()]
    rows.append(["kept as examples", count(moec.get("n_kept"))])
    return _said("What the distilling step kept.", table(["", "count"], rows))


def _minutes(report: Json) -> str:
    found, planned = report.get("stages") or {}, report.get("planned") or {}
    rows = [
        [escape(k), f"{planned[k]:.1f}" if k in planned else "–", f"{v:.1f}"]
        for k, v in found.items()
        if v is not None
    ]
    heads = ["stage", "planned minutes", "minutes"]
    return _said(CAPTIONS["minutes"], table(heads, rows)) if rows else ""
