"""Look of the figures: size, colours, names, files. No pyplot, so no global state."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.transforms import Bbox
from numpy.typing import NDArray

from equipoise.report.data import Report
from equipoise.stats import Estimate

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


NAMES = {
    "start": "untouched model",
    "tuned": "tuned dials",
    "exmate": "ExMATE",
    "clm": "CLM",
    "rlhf": "RLHF",
    "moec": "MOEC",
    "raw": "raw pool",
    "denoised": "denoised pool",
    "steered start": "steering distilled into control tokens",
}
"""Names of the code that read badly."""


def label(name: str) -> str:
    """Return the name of a method, of a difference of two, or of a set of data, in plain words."""
    if " − " in name:
        return " − ".join(label(part) for part in name.split(" − "))
    if name.startswith("rerank") and name[6:].isdigit():
        return f"reranking, best of {name[6:]}"
    return NAMES.get(name, name)


def judges_name(report: Report) -> str:
    """Return what the judges of generalization are called: unseen by training, where that is so."""
    seen = report.judges_in_training
    if not seen:
        return "judges that no training saw"
    if set(seen) >= set(report.attributes):
        return "judges that are the training reward models"
    return f"judges, of which {' and '.join(seen)} took part in training"


def ceiling_name(report: Report) -> str:
    """Return what the ceiling of this report is called: attainable, or best of the pool."""
    return "ceiling" if report.ceiling is None else report.ceiling.name


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


@dataclass(frozen=True)
class Picture:
    """A panel or a legend of a figure, by itself: on a narrow screen panels stand in a column."""

    svg: str
    width: int
    """In CSS pixels, at its natural size."""
    row: int
    """Of the figure: panels of different rows do not share a line of the page."""


@contextmanager
def _drawn(draw: Callable[[], Figure]) -> Iterator[Figure]:
    with matplotlib.rc_context(STYLE):
        figure = draw()
        FigureCanvasAgg(figure)
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # laid out once, not once more for each of the files
        yield figure


def _write(figure: Figure, name: str, folder: Path) -> list[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.svg", folder / f"{name}.png"]
    figure.savefig(paths[0], metadata={"Date": None})
    figure.savefig(paths[1], dpi=140, metadata={"Software": None})
    return paths


def save(draw: Callable[[], Figure], name: str, folder: Path) -> list[Path]:
    """Draw a figure and write it as SVG and PNG; the same input gives the same bytes."""
    with _drawn(draw) as figure:
        return _write(figure, name, folder)


def save_and_split(draw: Callable[[], Figure], name: str, folder: Path) -> list[Picture]:
    """Draw a figure, write it as :func:`save` does, and return its panels and legends in order."""
    with _drawn(draw) as figure:
        _write(figure, name, folder)
        parts: list[Artist] = [ax for ax in figure.axes if ax.get_visible()]
        boxes = {part: part.get_tightbbox() for part in [*parts, *figure.legends]}
        for part in boxes:
            part.set_visible(False)
        return [_cut_out(figure, part, box) for part, box in boxes.items() if box]


def _cut_out(figure: Figure, part: Artist, box: Bbox) -> Picture:
    inches = box.transformed(figure.dpi_scale_trans.inverted()).padded(0.04)
    drawn = StringIO()
    part.set_visible(True)
    figure.savefig(drawn, format="svg", bbox_inches=inches, metadata={"Date": None})
    part.set_visible(False)
    place = part.get_subplotspec() if isinstance(part, Axes) else None
    below = len(figure.axes)  # legends and colour bars stand below all panels
    return Picture(
        drawn.getvalue(), round(96 * inches.width), place.rowspan.start if place else below
    )


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


def number(found: Estimate | None) -> tuple[float, float, float]:
    """Return (value, low, high) of an estimate; NaN where there is none."""
    return (math.nan,) * 3 if found is None else (found.value, found.low, found.high)


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
