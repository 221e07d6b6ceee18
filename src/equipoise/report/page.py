"""The HTML page: headline, figures with one sentence each, tables, glossary.

Everything that comes from outside (names, counts, recipe) is escaped here; the page loads nothing,
and its content policy would not let it.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from html import escape
from importlib import resources
from string import Template
from typing import Any

from equipoise.report.canvas import ceiling_name, judges_name, label, number, written
from equipoise.report.captions import CAPTIONS, GLOSSARY
from equipoise.report.checks import check_tables
from equipoise.report.tables import count, method_tables, quality_tables, words

Json = Mapping[str, Any]


def page(report: Json, judge: str, pictures: Mapping[str, str], sampler: str) -> str:
    """Return the whole page.

    Args:
        report: See :mod:`equipoise.report.render`; already plain JSON.
        judge: The judge whose figures are shown.
        pictures: Figure name to SVG.
        sampler: HTML of the sampler, already escaped; empty for none.
    """
    script = _asset("page.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
    policy += f"script-src 'sha256-{digest}'"
    recipe = report["recipe"]
    name = escape(str(recipe.get("name", "run")))
    groups = [
        ("How well the dials are followed", ["control", "response", "posterior", "coverage"]),
        ("What should stay apart", ["leakage"]),
        ("What the dials learnt from", ["pool", "backdoor", "losses"]),
        ("What it costs in language", ["fluency"]),
        ("Who is refused", ["refusals"]),
    ]
    body = [
        f"<h1>Equipoise report: {name}</h1>",
        f'<p class="lead">{escape(str(recipe.get("description", "")))}</p>',
        _headline(report, judge),
    ]
    if sampler:
        body.append(f"<h2>Turn the dials</h2><p>{escape(CAPTIONS['sampler'])}</p>{sampler}")
    for title, names in groups:
        shown = [_figure(one, pictures[one]) for one in names if one in pictures]
        if shown:
            body += [f"<h2>{title}</h2>", *shown]
        if names[0] == "control":
            body.append(method_tables(report))
    body += [
        quality_tables(report),
        _cells(pictures),
        check_tables(report),
        _glossary(),
        _recipe(recipe),
    ]
    return Template(_asset("page.html")).substitute(
        policy=policy, title=f"Equipoise: {name}", body="\n".join(body), script=script
    )


def _asset(name: str) -> str:
    return resources.files("equipoise.report").joinpath(name).read_text("utf-8")


def _headline(report: Json, judge: str) -> str:
    measured = [name for name, parts in report["methods"].items() if parts.get(judge)]
    if not measured:
        return "<p>No method was measured.</p>"
    method = "tuned" if "tuned" in measured else measured[-1]
    control = report["methods"][method][judge]
    best = (report.get("ceiling") or {}).get(judge)
    attributes, named = report["recipe"]["attributes"], ceiling_name(report)
    cards = "".join(_card(name, control, best, named) for name in attributes)
    counts = " · ".join(
        f"{escape(str(key))}: {escape(count(value))}"
        for key, value in (report.get("n") or {}).items()
    )
    gaps = "".join(
        f"<li>{escape(pair)}, {escape(name)}: {words(found)}</li>"
        for pair, by in (report.get("differences") or {}).items()
        for name, found in by.items()
    )
    compared = f"<p>Differences in control, paired by prompt:</p><ul>{gaps}</ul>" if gaps else ""
    seen = judges_name(report) if judge == "generalization" else "the training judges"
    return (
        f"<p>Method: <b>{escape(label(method))}</b>, scored by {escape(seen)}.</p>"
        f"{_warning(report)}"
        f'<div class="cards">{cards}</div><p class="muted">{counts}</p>{compared}'
    )


def _warning(report: Json) -> str:
    """Return what a reader has to know before any figure: which judges are no judges."""
    found = report.get("judges_in_training") or {}
    same = "".join(
        f"<li>judge {escape(judge)} is {escape(model)}</li>" for judge, model in found.items()
    )
    said = escape(CAPTIONS["judges_in_training"])
    return f'<div class="warning"><p>{said}</p><ul>{same}</ul></div>' if same else ""


def _card(name: str, control: Json, best: Json | None, named: str) -> str:
    value, lower, upper = number(control["mp"][name])
    low, high = (number(control["response"][name][end])[0] for end in (0, -1))
    limit = number(best["mp"][name])[0] if best else 0.0
    share = f"{escape(named)}: {written(limit)}; " if best else ""
    if limit > 0 and value > 0:
        share = f"{value / limit:.0%} of the {escape(named)}, {written(limit)}; "
    return (
        f'<div class="card"><span class="muted">{escape(name)} dial: control</span>'
        f'<b class="big">{written(value)}</b><small>{share}95 % interval {written(lower)} to '
        f"{written(upper)} over {control['n_prompts']} unseen prompts; 0 = deaf, 1 = exact</small>"
        f"<p>Turned from bottom to top, the dial moves the delivered {escape(name)} score from "
        f"<b>{low:.2f}</b> to <b>{high:.2f}</b> on a scale from 0 to 1. Of two completions to one "
        f"prompt, asked for at both ends, the higher request wins in "
        f"<b>{number(control['bt'][name])[0]:.0%}</b>.</p></div>"
    )


def _figure(name: str, svg: str, *, caption: str | None = None) -> str:
    data = base64.b64encode(svg.encode()).decode()
    said = escape(caption or CAPTIONS[name])
    return (
        f'<figure><img alt="{said}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{said}</figcaption></figure>"
    )


def _cells(pictures: Mapping[str, str]) -> str:
    shown = [
        f"<details><summary>{escape(label(name[6:]))}</summary>"
        f"{_figure(name, svg, caption=CAPTIONS['cells'])}</details>"
        for name, svg in pictures.items()
        if name.startswith("cells_")
    ]
    return f"<h2>Every cell in full</h2>{''.join(shown)}" if shown else ""


def _glossary() -> str:
    terms = "".join(f"<dt>{escape(t)}</dt><dd>{escape(d)}</dd>" for t, d in GLOSSARY.items())
    return f"<h2>Glossary</h2><dl>{terms}</dl>"


def _recipe(recipe: Json) -> str:
    shown = escape(json.dumps(recipe, indent=1, ensure_ascii=False))
    summary = "<summary>Every field of this run</summary>"
    return f"<h2>Recipe</h2><details>{summary}<pre>{shown}</pre></details>"
