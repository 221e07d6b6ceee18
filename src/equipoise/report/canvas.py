"""Look of the figures: size, colours, names, files. No pyplot, so no global state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray

INK, MUTED, FAINT = "#1b1f24", "#6b7280", "#e5e7eb"
# Okabe and Ito's palette: told apart with any of the common colour-vision deficiencies.
_CYCLE = ("#0072B2", "#CC79A7", "#D55E00", "#56B4E9", "#6A3D9A")
_MARKERS = "osD^vPX"
STYLE: Any = {
    "font.size": 10,
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "legend.frameon": False,
    "svg.fonttype": "path",
    "svg.hashsalt": "equipoise",
    "figure.facecolor": "white",
}


def label(method: str) -> str:
    """Return a method's name as a stranger reads it."""
    names = {"start": "untouched model", "prompting": "prompting", "tuned": "tuned dials"}
    if method.startswith("rerank") and method[6:].isdigit():
        return f"reranking, N = {method[6:]}"
    return names.get(method, method)


def judges_name(report: Mapping[str, Any]) -> str:
    """Return what the judges of generalization are called: unseen by training, where that is so."""
    seen = report.get("judges_in_training") or {}
    if not seen:
        return "judges that no training saw"
    if set(seen) >= set(report["recipe"]["attributes"]):
        return "judges that are the training reward models"
    return f"judges, of which {' and '.join(seen)} took part in training"


def ceiling_name(report: Mapping[str, Any]) -> str:
    """Return what the ceiling of this report is called: attainable, or best of the pool."""
    return str((report.get("ceiling") or {}).get("name", "ceiling"))


def colours(methods: Sequence[str]) -> dict[str, str]:
    """Return one colour per method, the same in every figure of a report."""
    fixed = {"start": "#8c8c8c", "prompting": "#009E73"}
    rerank = iter(("#E69F00", "#9c6b00", "#f3cf80"))
    cycle = iter(_CYCLE * (1 + len(methods) // len(_CYCLE)))
    chosen = {}
    for method in methods:
        if method.startswith("rerank"):
            chosen[method] = next(rerank, "#E69F00")
        else:
            chosen[method] = fixed.get(method) or next(cycle)
    return chosen


def markers(methods: Sequence[str]) -> dict[str, str]:
    """Return one marker per method, so that colour never carries the meaning alone."""
    return {method: _MARKERS[i % len(_MARKERS)] for i, method in enumerate(methods)}


def save(draw: Callable[[], Figure], name: str, folder: Path) -> list[Path]:
    """Draw a figure and write it as PNG and SVG; the same input gives the same bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context(STYLE):
        figure = draw()
        FigureCanvasAgg(figure)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # laid out once, not once more for each of the files
        paths = [folder / f"{name}.svg", folder / f"{name}.png"]
        figure.savefig(paths[0], metadata={"Date": None})
        figure.savefig(paths[1], dpi=140, metadata={"Software": None})
    return paths


def panels(rows: int, columns: int, *, width: float, height: float) -> tuple[Figure, Any]:
    """Return a figure and its axes (rows, columns); width and height of one panel in inches."""
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def written(value: float, form: str = "{:.2f}") -> str:
    """Return a number as text, with a real minus sign and never a negative zero."""
    text = form.format(value)
    if not any(digit in text for digit in "123456789"):
        text = text.lstrip("+-")
    return text.replace("-", "\N{MINUS SIGN}")


def number(estimate: dict[str, Any] | None) -> tuple[float, float, float]:
    """Return (value, low, high) of an estimate read from JSON; NaN where there is none."""
    found = estimate or {}
    value, low, high = (found.get(key) for key in ("value", "low", "high"))
    nan = float("nan")
    return (
        nan if value is None else value,
        nan if low is None else low,
        nan if high is None else high,
    )


def heatmap(
    axes: Axes,
    values: NDArray[np.float64],
    *,
    form: str = "{:.0f}",
    top: float | None = None,
    size: float = 8,
) -> None:
    """Draw values (x, y) as a square map with a number in every cell; 0 and NaN stay blank.

    Args:
        axes: Where to draw.
        values: Shape (L along x, L along y), y upwards; >= 0.
        form: Format of the numbers; empty for none.
        top: Value of the darkest colour; the largest value by default.
        size: Font size of the numbers.
    """
    blank = ~np.isfinite(values) | (values == 0)
    shown = np.ma.masked_where(blank, values)
    limit = top or float(shown.max() if shown.count() else 1.0) or 1.0
    axes.imshow(
        shown.T, origin="lower", cmap="Blues", vmin=-0.12 * limit, vmax=limit, aspect="equal"
    )
    n_x, n_y = values.shape
    if form:
        for x, y in np.ndindex(n_x, n_y):
            if not blank[x, y]:
                dark = values[x, y] > 0.55 * limit
                axes.text(
                    x,
                    y,
                    "<1" if form == "{:.0f}" and values[x, y] < 1 else form.format(values[x, y]),
                    ha="center",
                    va="center",
                    fontsize=size,
                    color="white" if dark else INK,
                )
    axes.set_xticks(range(n_x))
    axes.set_yticks(range(n_y))
    axes.set_xticks(np.arange(n_x + 1) - 0.5, minor=True)
    axes.set_yticks(np.arange(n_y + 1) - 0.5, minor=True)
    axes.grid(which="minor", color=FAINT, linewidth=0.8)
    axes.tick_params(which="both", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
