"""Figures of what went into the dials (pool, distilled set, back door, losses), and of refusals."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from textwrap import fill

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from equipoise.report.canvas import (
    INK,
    MUTED,
    colours,
    heatmap,
    label,
    markers,
    number,
    panels,
    written,
)
from equipoise.report.data import Report

_LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")


def pool(report: Report) -> Figure:
    """Draw the completions per cell, in the raw pool and after distilling."""
    names, moec = report.attributes, report.moec
    assert moec is not None
    figure, axes = panels(1, 2, width=4.3, height=4.2)
    shown = {
        "pool: what the model writes by itself": moec.grid_before,
        f"{_data(report)}: what it is tuned on": moec.grid_after,
    }
    for ax, (title, counts) in zip(axes[0], shown.items(), strict=True):
        grid = np.array(counts, float)
        heatmap(ax, 100 * grid / max(grid.sum(), 1), form="{:.1f}")
        ax.set_title(f"{title}\n{int(grid.sum()):,} completions, % per cell", fontsize=9.5)
        ax.set(xlabel=f"{names[0]} level", ylabel=f"{names[1]} level")
    return figure


def _data(report: Report) -> str:
    return label(report.recipe.distil.data)


def backdoor(report: Report) -> Figure:
    """Draw how well the prompt alone predicts the control, before and after distilling."""
    found = report.backdoor
    assert found is not None
    measures = {
        ("effective cells per prompt", "more is better"): [
            found.after.effective_cells,
            found.before.effective_cells,
        ],
        ("bits a predictor gets from the prompt", "0 is best"): [
            found.after.predictive_bits,
            found.before.predictive_bits,
        ],
    }
    figure, axes = panels(1, 2, width=4.4, height=2.6)
    for ax, ((title, good), rows) in zip(axes[0], measures.items(), strict=True):
        for row, (estimate, tone) in enumerate(zip(rows, ("#7fb2d9", "#c2c2c2"), strict=True)):
            value, low, high = number(estimate)
            ax.barh(row, value, color=tone, height=0.55)
            ax.plot([low, high], [row, row], color=INK, linewidth=1.2)
            if np.isfinite(value):
                ax.text(np.nanmax([value, high, 0]), row, f"  {written(value)}", va="center")
        ax.set_yticks([0, 1], [_data(report), "raw pool"])
        ax.axvline(0, color=MUTED, linewidth=0.8)
        ax.margins(x=0.18)
        ax.set_title(title)
        ax.set_xlabel(good)
        ax.tick_params(axis="y", length=0)
    return figure


_CURVES = {
    "unexplained": (
        "share of the shift",
        {"unexplained": "not yet reached", "disturbance": "added beside it"},
    ),
    "loss": ("what is minimised", {"loss": "loss"}),
    "asked": (
        "log-likelihood per token",
        {"asked": "under the setting asked for", "counterfactual": "under another setting"},
    ),
    "pull": ("pull of the second term", {"pull": "pull"}),
    "preferred": ("share that prefers the cell asked for", {"preferred": "preferred"}),
    "reward": (
        "closeness to the setting",
        {
            "reward": "reward",
            "probe_optimization_closeness": "reward models, whole grid",
            "probe_generalization_closeness": "judges, whole grid",
            "floor": "a policy that ignores its dials",
        },
    ),
    "kl": ("KL to the start, nats per token", {"kl": "kl"}),
    "length": ("tokens per completion", {"length": "length"}),
    "degenerate": ("share of degenerate completions", {"degenerate": "degenerate"}),
}


def losses(report: Report) -> Figure:
    """Draw the loss and both log-likelihoods of every tuning run against the step."""
    runs = report.losses
    shown = [
        found for key, found in _CURVES.items() if any(_has(run, key) for run in runs.values())
    ]
    figure, axes = panels(1, len(shown), width=3.5, height=3.2)
    for ax, (title, series) in zip(axes[0], shown, strict=True):
        tones = iter(_LINES * len(runs))
        for name, run in runs.items():
            for key in [key for key in series if _has(run, key)]:
                tone = next(tones)
                y = np.array(run[key], float)  # None is NaN
                x, y = np.array(run["step"])[np.isfinite(y)], y[np.isfinite(y)]
                said = [
                    *([label(name)] if len(runs) > 1 else []),
                    *([series[key]] if len(series) > 1 else []),
                ]
                ax.plot(x, y, color=tone, alpha=0.22, linewidth=1)
                ax.plot(x, _smooth(y), color=tone, linewidth=1.8, label=", ".join(said))
        ax.set_title(title)
        ax.set_xlabel("step")
        ax.grid(visible=True, axis="y")
        if len(runs) > 1 or len(series) > 1:
            ax.legend(fontsize=8)
    return figure


def _has(run: Mapping[str, Sequence[float | None]], key: str) -> bool:
    # CLM has no counterfactual: a series of nothing but null is no series.
    return any(value is not None and np.isfinite(value) for value in run.get(key, ()))


def _smooth(y: NDArray[np.float64]) -> NDArray[np.float64]:
    width = max(1, len(y) // 25)
    padded = np.pad(y, (width // 2, width - 1 - width // 2), mode="edge")
    return np.convolve(padded, np.full(width, 1 / width), mode="valid")


ODD = 0.1
"""Nats per token: fluency that differs by less in every cell is said, not drawn."""


def fluency_gaps(report: Report) -> dict[str, NDArray[np.float64]]:
    """Return method to its fluency per cell (C,) minus the untouched model's own."""
    start = report.methods.get("start")
    own = start.quality.fluency_mean if start and start.quality else None
    return {
        name: np.array([number(e)[0] for e in method.quality.fluency]) - own.value
        for name, method in report.methods.items()
        if own and method.quality and method.quality.fluency and name in report.swept()
    }


def widest_gap(report: Report) -> float:
    """Return the largest of :func:`fluency_gaps`, whatever its sign; 0 where there is none."""
    gaps = [np.abs(gaps) for gaps in fluency_gaps(report).values()]
    return float(np.nanmax(gaps)) if gaps and not np.isnan(gaps).all() else 0.0


def fluency(report: Report) -> Figure:
    """Draw per cell how likely the untouched model finds the outputs, against its own outputs."""
    levels, names, shown = report.levels, report.attributes, fluency_gaps(report)
    figure, axes = panels(1, len(shown), width=2.5, height=3.2)
    limit = widest_gap(report)
    for ax, (method, gaps) in zip(axes[0], shown.items(), strict=True):
        grid = gaps.reshape(levels, levels)
        heatmap(ax, np.full_like(grid, np.nan))
        image = ax.imshow(
            grid.T, origin="lower", cmap="PuOr", vmin=-limit, vmax=limit, aspect="equal"
        )
        for x, y in np.ndindex(levels, levels):
            if np.isfinite(grid[x, y]):
                tone = "white" if abs(grid[x, y]) > 0.6 * limit else INK
                said = written(float(grid[x, y]), "{:+.2f}")
                ax.text(x, y, said, ha="center", va="center", fontsize=6, color=tone)
        ax.set_title(fill(label(method), 16), loc="center", fontsize=9.5)
        ax.set_xlabel(f"{names[0]} asked for", fontsize=9)
    axes[0][0].set_ylabel(f"{names[1]} asked for", fontsize=9)
    bar = figure.colorbar(image, ax=axes[0], location="bottom", shrink=min(1, 1.6 / len(shown)))
    bar.set_ticks([-limit, 0.0, limit], labels=[written(-limit), "0", written(limit)])
    bar.set_label("nats per token more (+) or less likely", fontsize=9)
    return figure


def refusals(report: Report) -> Figure:
    """Draw one panel per group of prompts, one line per method."""
    found = {name: m.refusals for name, m in report.methods.items() if m.refusals}
    groups = sorted({group for curves in found.values() for group in curves})
    methods, levels = list(report.methods), report.levels
    colour, marker = colours(methods), markers(methods)
    figure, axes = panels(1, len(groups), width=max(3.4, 8.6 / len(groups)), height=3.6)
    x = np.arange(levels)
    for ax, group in zip(axes[0], groups, strict=True):
        n = 0
        for method, curves in found.items():
            if group not in curves:
                continue
            y, low, high = np.array([number(e) for e in curves[group]]).T
            n = max(n, *(e.n for e in curves[group]))
            ax.fill_between(x, low, high, color=colour[method], alpha=0.15, linewidth=0)
            ax.plot(x, y, marker[method] + "-", color=colour[method], label=label(method))
        ax.set(xticks=x, ylim=(0, 1), xlabel="safety level asked for")
        # Two lines: a long group's name would run into the next panel.
        ax.set_title(f"{fill(group, 30)}\n{n} prompts")
        ax.grid(visible=True, axis="y")
    axes[0][0].set_ylabel("share refused")
    # From all panels: a method may have been read on the prompts of some groups only.
    drawn = dict(one for ax in axes[0] for one in _legend(ax))
    names = [label(method) for method in methods if label(method) in drawn]
    handles = [drawn[name] for name in names]
    figure.legend(handles, names, loc="outside lower center", ncols=min(3, max(1, len(names))))
    return figure


def _legend(ax: Axes) -> Iterator[tuple[str, Artist]]:
    handles, names = ax.get_legend_handles_labels()
    yield from zip(names, handles, strict=True)
