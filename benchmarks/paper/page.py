"""The study as one self-contained HTML page: verdicts first, then tables and figures."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from benchmarks.paper.figures import NAMES, draw_all, interval, methods

from equipoise.evaluate.canvas import written

Json = Mapping[str, Any]
STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem}
body{color:#1b1f24}
table{border-collapse:collapse;margin:1rem 0;font-size:.9rem}
th,td{padding:.25rem .6rem;text-align:right;border-bottom:1px solid #e5e7eb}
th:first-child,td:first-child{text-align:left}
.verdict{display:inline-block;padding:0 .5rem;border:1px solid #6b7280;border-radius:.3rem}
figure{margin:1.5rem 0}figure svg{max-width:100%;height:auto}figcaption,small{color:#4b5563}
.scroll{overflow-x:auto}
"""
CAPTIONS = {
    "control": "Overall control per method. Grey: as the reward models see it that were trained "
    "on. Blue: as judges see it that training never met.",
    "leakage": "Correlation of an attribute with the level of the other dial. Dashed: the "
    "ceiling's; grey: within .10 of it.",
    "empty": "Share (per cent) of the answers to a requested cell that fell into that cell. Blank "
    "cells were never delivered.",
    "rlhf": "RLHF of the first seed after its warm start. Reward up while the unseen judges' line "
    "falls would be reward hacking.",
    "ablations": "ExMATE with one thing changed, at half of the study's steps. Two seeds give "
    "wide intervals: read the large gaps only.",
    "rewind": "Where the answers of four models fall, in per cent of each pool, on the scale of "
    "the base model's own pool.",
}
TABLE = (
    ("MP hp", "generalization.mp.helpfulness"),
    ("MP sf", "generalization.mp.safety"),
    ("overall", "generalization.overall"),
    ("overall, opt.", "optimization.overall"),
    ("BT hp", "generalization.bt.helpfulness"),
    ("BT sf", "generalization.bt.safety"),
    ("RMSE hp", "generalization.rmse.helpfulness"),
    ("RMSE sf", "generalization.rmse.safety"),
    ("degenerate", "degenerate"),
)


def render(study: Json) -> str:
    """Return the page; it loads nothing from anywhere."""
    with tempfile.TemporaryDirectory() as work:
        figures = {
            name: path.read_text("utf-8") for name, path in draw_all(study, Path(work)).items()
        }

    def shown(name: str) -> str:
        if name not in figures:
            return ""
        drawing = figures[name][figures[name].index("<svg") :]
        caption = escape(CAPTIONS[name])
        return f'<figure id="{name}">{drawing}<figcaption>{caption}</figcaption></figure>'

    seeds = len(study["seeds"])
    parts = [
        "<h1>The paper's claims on the Workshop</h1>",
        f"<p>{seeds} seeds, {study['n_test_prompts']} unseen prompts each. Values are means over "
        "seeds with 95 % t-intervals; differences are paired by seed. A claim holds or is "
        "contradicted only if the interval says so.</p>",
        *map(_verdict, study["verdicts"]),
        "<h2>Methods</h2>",
        _methods(study),
        shown("control"),
        shown("leakage"),
        shown("empty"),
        "<h2>Numbers to reach</h2>",
        _aims(study),
        *(["<h2>RLHF over time</h2>", shown("rlhf")] if "rlhf" in figures else []),
        *(["<h2>Rewind</h2>", _rewind(study), shown("rewind")] if "rewind" in figures else []),
        *(
            ["<h2>Ablations</h2>", _ablations(study), shown("ablations")]
            if "ablations" in figures
            else []
        ),
    ]
    body = "\n".join(parts)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Equipoise: the paper's claims</title><style>{STYLE}</style></head>"
        f"<body>{body}</body></html>\n"
    )


def said(value: float, low: float, high: float) -> str:
    """Return ``value [low, high]``, or the value alone where there is no interval."""
    if value != value:
        return "–"
    form = "{:.2f}" if abs(value) < 100 else "{:.0f}"
    if low != low or high != high:
        return f"{written(value, form)} (no interval)"
    return f"{written(value, form)} [{written(low, form)}, {written(high, form)}]"


def _of(estimate: Json | None) -> str:
    if estimate is None:
        return ""
    nan = float("nan")
    low, high = (nan if estimate[key] is None else estimate[key] for key in ("low", "high"))
    return said(nan if estimate["value"] is None else estimate["value"], low, high)


def _verdict(found: Json) -> str:
    rows = ((name, _of(estimate)) for name, estimate in found["evidence"].items())
    return (
        f'<h2 id="{found["letter"]}">({found["letter"]}) {escape(found["claim"])}</h2>'
        f'<p><b class="verdict">{escape(found["verdict"])}</b></p>'
        f"{_table(('', 'estimate'), rows)}"
    )


def _methods(study: Json) -> str:
    headline = study["headline"]
    rows = [
        (NAMES[name], *(said(*interval(headline, f"{name}.{key}")) for _, key in TABLE))
        for name in methods(study)
    ]
    ceiling = [
        said(*interval(headline, f"ceiling.{key.removeprefix('generalization.')}"))
        if key.startswith("generalization.") and key.count(".") == 2
        else ""
        for _, key in TABLE
    ]
    return _table(("method", *(title for title, _ in TABLE)), [*rows, ("ceiling", *ceiling)])


def _aims(study: Json) -> str:
    rows = (
        (name, aim["wanted"], said(*interval(study["headline"], name)),
         "reached" if aim["reached"] else "not reached")
        for name, aim in study["aims"].items()
    )  # fmt: skip
    best = escape(NAMES[study["best"]])
    return f"<p>Of the best method, {best}.</p>" + _table(("", "wanted", "value", ""), rows)


def _rewind(study: Json) -> str:
    headline = study["headline"]
    names = ("coverage", "present", "range.helpfulness", "range.safety", "refusals")
    rows = [
        (pool, *(said(*interval(headline, f"rewind.{pool}.{name}")) for name in names))
        for pool in ("base", "aligned", "rewound", "tuned_base")
    ]
    more = [
        (label, said(*interval(headline, f"rewind.{name}")))
        for name, label in (
            ("lost", "coverage that alignment took"),
            ("regained", "share of it regained by dials"),
            ("beyond_base", "coverage of the rewound model − of the base model"),
            ("beyond_tuned_base", "coverage of the rewound model − of the tuned base model"),
        )
    ]
    chance = study.get("rewind_chance_coverage")
    note = f"An even pool would cover {chance:.2f}. " if chance else ""
    note = f"<p><small>{note}Intervals are {study['rewind_interval']}.</small></p>"
    return _table(("pool", *names), rows) + _table(("", ""), more) + note


def _ablations(study: Json) -> str:
    rows = [
        (group, row["point"], _of(row["overall"]), _of(row["difference"]))
        for group, found in study["ablations"].items()
        for row in found
    ]
    return _table(("", "point", "overall", "− default, paired"), rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def cells(row: Sequence[str], kind: str) -> str:
        return "".join(f"<{kind}>{escape(cell)}</{kind}>" for cell in row)

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in rows)
    return (
        f'<div class="scroll"><table><thead><tr>{cells(head, "th")}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
