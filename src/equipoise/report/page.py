"""The HTML page: what ``report.html.j2`` is given, and how it writes numbers.

The template escapes everything; the page loads nothing, and its content policy would not let it.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from equipoise.evaluate.metrics import chance_leakage, median_floor, untouched_floor
from equipoise.report.canvas import (
    Picture,
    ceiling_name,
    judges_name,
    label,
    number,
    written,
)
from equipoise.report.data import Report
from equipoise.report.figures_data import ODD, fluency_gaps, widest_gap
from equipoise.report.render import cells_name
from equipoise.report.sampler import Sampler
from equipoise.stats import Estimate
from equipoise.store.shards import to_plain

LATE = 2.0
"""A stage that took so many times what was planned, and a minute more, is named."""


def page(report: Report, pictures: Mapping[str, Sequence[Picture]], sampler: Sampler | None) -> str:
    """Return the whole page.

    Args:
        report: What to show.
        pictures: Figure name to its panels and legends.
        sampler: Completions to turn the dials over; ``None`` for a page without text.
    """
    environment = Environment(
        loader=PackageLoader("equipoise.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        label=label,
        number=number,
        count=count,
        written=written,
        uri=_uri,
        having=_having,
    )
    script = resources.files("equipoise.report").joinpath("page.js").read_text("utf-8")
    n_cells = report.levels ** len(report.attributes)
    return environment.get_template("report.html.j2").render(
        report=report,
        pictures=pictures,
        sampler=sampler,
        script=script,
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        headline=_headline(report),
        best=report.best(),
        judges_name=judges_name(report),
        ceiling_name=ceiling_name(report),
        share=_share,
        cell_pictures={
            name: cells_name(name) for name in report.methods if cells_name(name) in pictures
        },
        has_checks=any(
            (
                report.intersections,
                report.reward_models,
                report.pool,
                report.skipped,
                report.moec,
                report.stages,
            )
        ),
        floors=[median_floor(report.levels), untouched_floor(report.levels)],
        chance=chance_leakage(n_cells),
        odd=ODD,
        gap=widest_gap(report) if fluency_gaps(report) else None,
        late=_late(report),
        recipe=json.dumps(to_plain(report.recipe), indent=1, ensure_ascii=False),
    )


def _headline(report: Report) -> str | None:
    """Return the method that the headline is about."""
    measured = list(report.swept())
    return "tuned" if "tuned" in measured else measured[-1] if measured else None


def _share(found: Estimate | None, best: Estimate | None) -> str:
    """Return an estimate as a share of the ceiling's; empty where that says nothing."""
    value, limit = number(found)[0], number(best)[0]
    return written(value / limit, "{:.0%}") if limit > 0 and not math.isnan(value) else ""


def _late(report: Report) -> list[str]:
    """Return the stages that took far longer than was planned."""
    spent = {name: minutes for name, minutes in report.stages.items() if minutes is not None}
    return [
        name
        for name, planned in report.planned.items()
        if spent.get(name, 0.0) > max(LATE * planned, planned + 1)
    ]


def _having(found: Mapping[str, Any], part: str) -> dict[str, Any]:
    """Return that part of each item that has it."""
    parts = {name: getattr(item, part) for name, item in found.items()}
    return {name: value for name, value in parts.items() if value is not None}


def count(value: Any) -> str:
    """Return a count with thousands marked; anything else as it is, and nothing as a dash."""
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else str(value)


def _uri(picture: Picture) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(picture.svg.encode()).decode()}"
