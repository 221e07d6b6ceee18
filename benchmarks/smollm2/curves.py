"""The figures of ``docs/smollm2.md`` that show all methods, from committed JSON alone.

    python -m benchmarks.smollm2.curves

Two points were measured after ``report/`` was made (``run.py --only add``), so its figures lack
them. A figure is drawn again here where ``results.json`` holds what it needs of them. What each
budget buys is drawn over examples, since a step of one objective is not a step of another.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.smollm2.points import ATTRIBUTES
from benchmarks.smollm2.tables import METHODS, RESULT
from matplotlib.figure import Figure
from numpy.typing import NDArray

from equipoise.report import figures
from equipoise.report import figures_data as figures_refusals
from equipoise.report.canvas import INK, panels, save
from equipoise.report.tables import main_judge

REPORT = RESULT.parent / "report"
JUDGES = ("optimization", "generalization")
STEPS = 40
"""Of the start, per point of its curve."""

Json = Mapping[str, Any]


def said(name: str) -> str:
    """Return a point's name as the page writes it."""
    return METHODS[name].strip("*")


def completed(report: Json, result: Json) -> dict[str, Any]:
    """Return the report with the methods that only the result holds, as far as it holds them."""
    methods = {
        said("exmate") if name == "exmate" else name: parts
        for name, parts in report["methods"].items()
    }
    there = {*report["methods"], "best"}
    for name in (name for name in METHODS if name not in there):
        methods[said(name)] = {
            "refusals": result["refusals"][name],
            **{judge: _scores(result["headline"], f"{name}.{judge}") for judge in JUDGES},
        }
    return {**report, "methods": methods}


def _scores(head: Json, prefix: str) -> dict[str, Any]:
    return {
        metric: {a: _estimate(head, f"{prefix}.{metric}.{a}") for a in ATTRIBUTES}
        for metric in ("mp", "leakage")
    }


def _estimate(head: Json, key: str) -> dict[str, float]:
    return {"value": head[key], "low": head[f"{key}.low"], "high": head[f"{key}.high"]}


def examples(report: Json, result: Json) -> Figure:
    """Draw what tuning has learnt over the examples that it has seen."""
    figure, axes = panels(1, 3, width=4.4, height=3.9)
    _start(axes[0][0], result)
    _listening(axes[0][1], result["listening"])
    batch = result["tuning"]["exmate"]["recipe"]["batch_size"]
    _likelihood(axes[0][2], report["losses"]["exmate"], batch)
    for ax in axes[0]:
        ax.grid(visible=True, axis="y")
        ax.legend(fontsize=8)
    return figure


def _start(ax: Any, result: Json) -> None:
    batch = result["tuning"]["best"]["recipe"]["steered_start"]["batch_size"]
    series = {"unexplained": "of the dials, missing", "disturbance": "disturbance beside it"}
    for (key, name), tone in zip(series.items(), ("#0072B2", "#D55E00"), strict=True):
        y = np.array(result["steered_start"][key], float)
        ax.plot(batch * (1 + np.arange(len(y))), y, color=tone, alpha=0.2, linewidth=1)
        ax.plot(*_means(y, batch, STEPS), "o-", color=tone, markersize=4, label=name)
    ax.set(ylim=(0, 2), xlabel="texts seen, each under four settings")
    ax.set_title("steered start:\nshare of the squared shift")


def _listening(ax: Any, listening: Json) -> None:
    tones = {"exmate": "#0072B2", "clm": "#D55E00", "raw-clm": "#6A3D9A"}
    for shift, (name, tone) in enumerate(tones.items()):
        rows = listening[name]
        n = np.array([row["looked_at"] for row in rows], float)
        y = np.array([row["preferred"] for row in rows], float)
        reach = 1.96 * np.sqrt(0.25 / n)
        ax.errorbar(
            # Side by side, or the bars would hide each other.
            [row["examples"] + 25 * (shift - 1) for row in rows],
            y,
            yerr=[np.minimum(reach, y), np.minimum(reach, 1 - y)],
            fmt="o-",
            color=tone,
            markersize=4,
            elinewidth=0.8,
            label=f"{said(name)} ({n.sum():,.0f} looked at)",
        )
    ax.axhline(0.5, color=INK, linestyle="--", linewidth=1)
    ax.set(ylim=(0, 1.3), yticks=np.linspace(0, 1, 6), xlabel="examples seen")
    ax.set_title("fresh examples that prefer\nthe cell asked for (½ = deaf)")


def _likelihood(ax: Any, run: Json, batch: int) -> None:
    series = {"asked": "under the setting asked for", "counterfactual": "under another setting"}
    for (key, name), mark in zip(series.items(), ("o-", "s--"), strict=True):
        x, y = _means(np.array(run[key], float), batch, 200 // batch)
        ax.plot(x, y, mark, color=INK if mark == "s--" else "#0072B2", markersize=4, label=name)
    ax.set_xlabel("examples seen")
    ax.set_title("ExMATE on MOEC:\nlog-likelihood per token")


def _means(y: NDArray[np.float64], batch: int, steps: int) -> tuple[list[int], list[float]]:
    """Return the examples seen at the end of each window of steps, and the window's mean."""
    windows: Sequence[NDArray[np.float64]] = [
        y[start : start + steps] for start in range(0, len(y), steps)
    ]
    ends = [batch * min(len(y), start + steps) for start in range(0, len(y), steps)]
    return ends, [float(np.nanmean(window)) for window in windows]


def drawings(report: Json, result: Json) -> dict[str, Callable[[], Figure]]:
    """Return name to drawing function."""
    whole, judge = completed(report, result), main_judge(dict(report))
    return {
        "control": partial(figures.control, whole, judge),
        "leakage": partial(figures.leakage, whole, judge),
        "refusals": partial(figures_refusals.refusals, whole, judge),
        "examples": partial(examples, report, result),
    }


def main() -> None:
    """Draw into the report's folder of figures."""
    report = json.loads((REPORT / "report.json").read_text("utf-8"))
    folder: Path = REPORT / "figures"
    for name, draw in drawings(report, json.loads(RESULT.read_text("utf-8"))).items():
        vector, picture = save(draw, name, folder)
        vector.unlink()  # the repository keeps the PNGs only
        print(f"wrote {picture}")


if __name__ == "__main__":
    main()
