"""The HTML page: headline, figures with one sentence each, tables, glossary.

Everything that comes from outside (names, counts, recipe) is escaped here; the page loads nothing,
and its content policy would not let it.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from html import escape
from importlib import resources
from string import Template
from typing import Any

from equipoise.evaluate.canvas import label, number
from equipoise.evaluate.captions import CAPTIONS, GLOSSARY
from equipoise.evaluate.metrics import median_floor, untouched_floor

Json = Mapping[str, Any]


def page(report: Json, judge: str, pictures: Mapping[str, str], sampler: str) -> str:
    """Return the whole page.

    Args:
        report: See :mod:`equipoise.evaluate.report`; already plain JSON.
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
            body.append(_methods(report))
    body += [
        _quality(report),
        _cells(pictures),
        _checks(report),
        _glossary(report),
        _recipe(recipe),
    ]
    return Template(_asset("page.html")).substitute(
        policy=policy, title=f"Equipoise: {name}", body="\n".join(body), script=script
    )


def _asset(name: str) -> str:
    return resources.files("equipoise.evaluate").joinpath(name).read_text("utf-8")


def _estimate(found: Json | None, form: str = "{:.2f}") -> str:
    value, low, high = number(dict(found) if found else None)
    if value != value:
        return "–"
    interval = "" if low != low else f"<small>{form.format(low)} to {form.format(high)}</small>"
    return form.format(value) + interval


def _words(found: Json | None) -> str:
    value, low, high = number(dict(found) if found else None)
    return f"{value:.2f} ({low:.2f} to {high:.2f})" if low == low else f"{value:.2f}"


def _headline(report: Json, judge: str) -> str:
    method = next(
        (
            m
            for m in ("tuned", *reversed(report["methods"]))
            if (report["methods"].get(m) or {}).get(judge)
        ),
        None,
    )
    if method is None:
        return "<p>No method was measured.</p>"
    control = report["methods"][method][judge]
    best = (report.get("ceiling") or {}).get(judge)
    cards = []
    for name in report["recipe"]["attributes"]:
        low, high = (number(control["response"][name][end])[0] for end in (0, -1))
        line = (
            f"<p>Turned from bottom to top, it moves the delivered {escape(name)} score from "
            f"<b>{low:.2f}</b> to <b>{high:.2f}</b> on a scale from 0 to 1. Of two completions to "
            f"one prompt, asked for at both ends, the higher request wins in "
            f"<b>{number(control['bt'][name])[0]:.0%}</b>.</p>"
        )
        against = f" of at most {number(best['mp'][name])[0]:.2f}" if best else ""
        value, lower, upper = number(control["mp"][name])
        cards.append(
            f'<div class="card"><span class="muted">{escape(name)} dial: control</span>'
            f'<b class="big">{value:.2f}</b><small>95 % interval {lower:.2f} to {upper:.2f}, '
            f"n = {control['n_prompts']} unseen prompts{against}; 0 = deaf, 1 = exact</small>"
            f"{line}</div>"
        )
    counts = " · ".join(
        f"{escape(str(key))}: {escape(_count(value))}" for key, value in report.get("n", {}).items()
    )
    gaps = "".join(
        f"<li>{escape(pair)}, {escape(name)}: {_words(found)}</li>"
        for pair, by in (report.get("differences") or {}).items()
        for name, found in by.items()
    )
    compared = f"<p>Paired differences in control (MP):</p><ul>{gaps}</ul>" if gaps else ""
    seen = "judges that no training saw" if judge == "generalization" else "the training judges"
    return (
        f"<p>Method: <b>{escape(label(method))}</b>, scored by {seen}.</p>"
        f'<div class="cards">{"".join(cards)}</div><p class="muted">{counts}</p>{compared}'
    )


def _count(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) else str(value)


def _figure(name: str, svg: str, *, caption: str | None = None) -> str:
    data = base64.b64encode(svg.encode()).decode()
    said = escape(caption or CAPTIONS[name])
    return (
        f'<figure><img alt="{said}" src="data:image/svg+xml;base64,{data}">'
        f"<figcaption>{said}</figcaption></figure>"
    )


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    table = f"<table><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table>"
    return f'<div class="scroll">{table}</div>'


def _methods(report: Json) -> str:
    attributes = report["recipe"]["attributes"]
    columns = [
        ("control (MP)", "mp"),
        ("extremes (BT)", "bt"),
        ("neighbours (BT)", "bt_neighbours"),
        ("error (RMSE)", "rmse"),
        ("leakage", "leakage"),
        ("range", "range"),
    ]
    parts = []
    for judge, title in (
        ("generalization", "Generalization: judges that no training saw"),
        ("optimization", "Optimization: the reward models used in training"),
    ):
        found = {m: p[judge] for m, p in report["methods"].items() if p.get(judge)}
        best = (report.get("ceiling") or {}).get(judge)
        if not found:
            continue
        shown = {label(m): (c, report["methods"][m].get("cost") or {}) for m, c in found.items()}
        if best:
            shown[str(report["ceiling"].get("name", "ceiling"))] = (best, {})
        for attribute in attributes:
            head = [
                escape(attribute),
                *(name for name, _ in columns),
                "coverage",
                "never moves",
                "other dial on auto (MP)",
                "seconds",
                "tokens",
                "steps",
            ]
            rows = [
                [
                    escape(name),
                    *(_estimate(control[key].get(attribute)) for _, key in columns),
                    _estimate(control["coverage"]),
                    _estimate(control["never_moves"].get(attribute)),
                    _estimate(control["auto_mp"].get(attribute)),
                    *(
                        _count(round(cost[k])) if cost.get(k) is not None else "–"
                        for k in ("seconds", "tokens", "steps")
                    ),
                ]
                for name, (control, cost) in shown.items()
            ]
            parts.append(f"<h3>{title}: {escape(attribute)}</h3>{_table(head, rows)}")
    levels = report["recipe"]["levels"]
    floors = (
        f"To read the table by, at {levels} levels: the error of a model that always answers at "
        f"the median is {median_floor(levels):.3f}, that of the untouched model about "
        f"{untouched_floor(levels):.3f}. Small print: 95 % intervals over prompts."
    )
    return "".join(parts) + f'<p class="muted">{floors}</p>'


def _quality(report: Json) -> str:
    found = {m: p["quality"] for m, p in report["methods"].items() if p.get("quality")}
    if not found:
        return ""
    head = ["method", "degenerate", "log-likelihood per token", "perplexity, dials on auto"]
    rows = [
        [
            escape(label(method)),
            _estimate(q.get("degenerate"), "{:.1%}"),
            _estimate(q.get("fluency_mean")),
            _estimate(q.get("perplexity")),
        ]
        for method, q in found.items()
    ]
    return f"<h3>Quality kept</h3>{_table(head, rows)}{_lengths(report, found)}"


def _lengths(report: Json, found: Json) -> str:
    measured = {m: q["length"] for m, q in found.items() if q.get("length")}
    if not measured:
        return ""
    attributes, levels = report["recipe"]["attributes"], report["recipe"]["levels"]
    head = [
        "tokens per completion",
        *(f"{escape(a)} {k}" for a in attributes for k in range(levels)),
    ]
    rows = [
        [escape(label(m)), *(f"{number(e)[0]:.0f}" for a in attributes for e in by[a])]
        for m, by in measured.items()
    ]
    return _table(head, rows)


def _cells(pictures: Mapping[str, str]) -> str:
    shown = [
        f"<details><summary>{escape(label(name[6:]))}</summary>"
        f"{_figure(name, svg, caption=CAPTIONS['cells'])}</details>"
        for name, svg in pictures.items()
        if name.startswith("cells_")
    ]
    return f"<h2>Every cell in full</h2>{''.join(shown)}" if shown else ""


def _checks(report: Json) -> str:
    parts = []
    if report.get("intersections") is not None:
        rows = [[escape(k), _count(v)] for k, v in report["intersections"].items()]
        parts.append(f"<p>{CAPTIONS['intersections']}</p>{_table(['set', 'shared prompts'], rows)}")
    if report.get("moec"):
        moec = report["moec"]
        rows = [["completions in the pool", _count(moec.get("n_pool"))]]
        rows += [[f"dropped: {escape(k)}", _count(v)] for k, v in moec.get("dropped", {}).items()]
        rows.append(["kept as examples", _count(moec.get("n_kept"))])
        parts.append("<p>What the distilling step kept.</p>" + _table(["", "count"], rows))
    if report.get("stages"):
        rows = [[escape(k), f"{v:.1f}"] for k, v in report["stages"].items() if v is not None]
        parts.append("<p>How long each stage took.</p>" + _table(["stage", "minutes"], rows))
    return "<h2>Checks and counts</h2>" + "".join(parts) if parts else ""


def _glossary(report: Json) -> str:
    terms = "".join(f"<dt>{escape(t)}</dt><dd>{escape(d)}</dd>" for t, d in GLOSSARY.items())
    return f"<h2>Glossary</h2><dl>{terms}</dl>"


def _recipe(recipe: Json) -> str:
    shown = escape(json.dumps(recipe, indent=1, ensure_ascii=False))
    summary = "<summary>Every field of this run</summary>"
    return f"<h2>Recipe</h2><details>{summary}<pre>{shown}</pre></details>"
