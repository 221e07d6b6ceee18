"""The report on disk: ``report.json``, ``report.html`` (one file, no network), the figures."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from equipoise.report.data import Report
from equipoise.report.sampler import Texts
from equipoise.store.publish import json_bytes
from equipoise.store.shards import to_plain

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def render(report: Report, out_dir: Path, *, texts: Texts | None = None) -> Path:
    """Write report.json, figures/*.png, figures/*.svg and report.html.

    Args:
        report: What to show.
        out_dir: An existing or new folder; nothing outside it is written.
        texts: Completions to show. Without them no prompt and no completion gets into any file.

    Returns:
        The path of report.html: under 5 MB, opens from disk, loads nothing.
    """
    from equipoise.report.canvas import save_and_split
    from equipoise.report.page import page
    from equipoise.report.sampler import sampler

    out_dir.mkdir(parents=True, exist_ok=True)
    pictures = {
        name: save_and_split(draw, name, out_dir / "figures")
        for name, draw in drawings(report).items()
    }
    target = out_dir / "report.html"
    target.write_text(page(report, pictures, sampler(report, texts) if texts else None), "utf-8")
    (out_dir / "report.json").write_bytes(json_bytes(to_plain(report)))
    return target


def drawings(report: Report) -> dict[str, Callable[[], Figure]]:
    """Return name to drawing function, in the page's order, for all that there are data for."""
    from equipoise.report import figures, figures_data
    from equipoise.report.figures_data import ODD, widest_gap

    measured, n_dials = report.swept(), len(report.attributes)
    wanted: dict[str, tuple[object, Callable[[Report], Figure]]] = {
        "control": (measured, figures.control),
        "response": (measured, figures.response),
        "posterior": (measured, figures.posterior),
        "coverage": (measured and n_dials == 2, figures.coverage),
        "leakage": (measured and n_dials > 1, figures.leakage),
        "pool": (n_dials > 1 and report.moec, figures_data.pool),
        "backdoor": (report.backdoor, figures_data.backdoor),
        "losses": (report.losses, figures_data.losses),
        "fluency": (n_dials == 2 and widest_gap(report) >= ODD, figures_data.fluency),
        "refusals": (any(m.refusals for m in report.methods.values()), figures_data.refusals),
    }
    drawn: dict[str, Callable[[], Figure]] = {
        name: partial(draw, report) for name, (there, draw) in wanted.items() if there
    }
    if n_dials == 2 and report.levels <= 7:
        for method in measured:
            drawn[cells_name(method)] = partial(figures.cells, report, method)
    return drawn


def cells_name(method: str) -> str:
    """Return the name of the figure of a method's cells: a file name."""
    return "cells_" + re.sub(r"[^A-Za-z0-9_-]+", "_", method)
