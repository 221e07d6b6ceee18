"""The study as one self-contained HTML page: verdicts first, then tables and figures."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from benchmarks.paper import tables
from benchmarks.paper.figures import NAMES, draw_all

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
    "rlhf": "RLHF after its warm start, a line per seed. Reward up while the unseen judges' lines "
    "fall would be reward hacking.",
    "ablations": "ExMATE with one thing changed, at half of the study's steps. Two seeds give "
    "wide intervals: read the large gaps only.",
    "rewind": "Where the answers of four models fall, in per cent of each pool, on the scale of "
    "the base model's own pool.",
}


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
        _html(tables.control(study)),
        shown("control"),
        _html(tables.precision(study)),
        _html(tables.reach(study)),
        _html(tables.leakage(study)),
        shown("leakage"),
        _html(tables.empty(study)),
        shown("empty"),
        "<h2>Numbers to reach</h2>",
        f"<p>Of the best method, {escape(NAMES[study['best']])}.</p>",
        _html(tables.aims(study)),
        "<h2>Cost</h2>",
        _html(tables.cost(study)),
        "<p>Minutes of what all methods of a seed share:</p>",
        _html(tables.stages(study)),
    ]
    if "rlhf" in figures:
        parts += ["<h2>RLHF</h2>", _html(tables.against(study)), _html(tables.rlhf(study))]
        parts.append(shown("rlhf"))
    if "rewind" in figures:
        chance = study["rewind_chance_coverage"]
        parts += [
            "<h2>Rewind</h2>",
            _html(tables.rewind(study)),
            _html(tables.regained(study)),
            f"<p><small>An even pool would cover {chance:.2f}. Intervals are "
            f"{study['rewind_interval']}.</small></p>",
            shown("rewind"),
        ]
    if "ablations" in figures:
        parts += ["<h2>Ablations</h2>", _html(tables.ablations(study)), shown("ablations")]
    body = "\n".join(parts)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>Equipoise: the paper's claims</title><style>{STYLE}</style></head>"
        f"<body>{body}</body></html>\n"
    )


def _verdict(found: Json) -> str:
    return (
        f'<h2 id="{found["letter"]}">({found["letter"]}) {escape(found["claim"])}</h2>'
        f'<p><b class="verdict">{escape(found["verdict"])}</b></p>'
        f"{_html(tables.evidence(found))}"
    )


def _html(table: tables.Table) -> str:
    def cells(row: Sequence[str], kind: str) -> str:
        return "".join(f"<{kind}>{escape(cell)}</{kind}>" for cell in row)

    body = "".join(f"<tr>{cells(row, 'td')}</tr>" for row in table.rows)
    return (
        f'<div class="scroll"><table><thead><tr>{cells(table.head, "th")}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )
