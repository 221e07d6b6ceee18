"""Figures of what went into the dials: the pool, the distilled set, the back door, the losses.

The figure of over- and under-refusal: share refused against the safety dial.
"""

from __future__ import annotations

from textwrap import fill
from typing import Any

import numpy as np
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
from equipoise.report.figures import Json, swept

_LINES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")


def pool(report: Json, judge: str) -> Figure:
    """Draw the completions per cell, in the raw pool and after distilling."""
    names = report["recipe"]["attributes"][:2]
    moec = report["moec"]
    figure, axes = panels(1, 2, width=4.3, height=4.2)
    titles = ("pool: what the model writes by itself", f"{_data(report)}: what it is tuned on")
    for ax, key, title in zip(axes[0], ("grid_before", "grid_after"), titles, strict=True):
        grid = np.array(moec[key], float)
        heatmap(ax, 100 * grid / max(grid.sum(), 1), form="{:.1f}")
        ax.set_title(f"{title}\n{int(grid.sum()):,} completions, % per cell", fontsize=9.5)
        ax.set(xlabel=f"{names[0]} level", ylabel=f"{names[1]} level")
    return figure


def _data(report: Json) -> str:
    kind = (report["recipe"].get("distil") or {}).get("data", "moec")
    return {"moec": "MOEC", "raw": "raw pool", "denoised": "denoised pool"}.get(kind, str(kind))


def backdoor(report: Json, judge: str) -> Figure:
    """Draw how well the prompt alone predicts the control, before and after distilling."""
    found = report["backdoor"]
    measures = [
        ("effective_cells", "effective cells per prompt", "more is better"),
        ("predictive_bits", "bits a predictor gets from the prompt", "0 is best"),
    ]
    figure, axes = panels(1, 2, width=4.4, height=2.6)
    for ax, (key, title, good) in zip(axes[0], measures, strict=True):
        for row, when in enumerate(("after", "before")):
            value, low, high = number(_estimate(found.get(when, {}).get(key)))
            tone = "#0072B2" if when == "after" else "#8c8c8c"
            ax.barh(row, value, color=tone, height=0.55)
            ax.plot([low, high], [row, row], color=INK, linewidth=1.6)
            if np.isfinite(value):
                ax.text(np.nanmax([value, high, 0]), row, f"  {value:.2f}", va="center")
        ax.set_yticks([0, 1], [_data(report), "raw pool"])
        ax.axvline(0, color=MUTED, linewidth=0.8)
        ax.margins(x=0.18)
        ax.set_title(title)
        ax.set_xlabel(good)
        ax.tick_params(axis="y", length=0)
    return figure


def _estimate(found: Any) -> dict[str, Any] | None:
    return {"value": found} if isinstance(found, int | float) else found


_CURVES = {
    "unexplained": (
        "share of the shift",
        {"unexplained": "of the dials, missing", "disturbance": "disturbance beside it"},
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
            "floor": "a deaf policy",
        },
    ),
    "kl": ("KL to the start, nats per token", {"kl": "kl"}),
    "length": ("tokens per completion", {"length": "length"}),
    "degenerate": ("share of degenerate completions", {"degenerate": "degenerate"}),
}


def losses(report: Json, judge: str) -> Figure:
    """Draw the loss and both log-likelihoods of every tuning run against the step."""
    runs = report["losses"]
    shown = [
        found for key, found in _CURVES.items() if any(_has(run, key) for run in runs.values())
    ]
    figure, axes = panels(1, len(shown), width=max(3.5, 8.6 / len(shown)), height=3.2)
    for ax, (title, series) in zip(axes[0], shown, strict=True):
        tones = iter(_LINES * len(runs))
        for name, run in runs.items():
            for key in [key for key in series if _has(run, key)]:
                tone = next(tones)
                y = np.array([np.nan if v is None else v for v in run[key]], float)
                x, y = np.array(run["step"])[np.isfinite(y)], y[np.isfinite(y)]
                said = [
                    *([name] if len(runs) > 1 else []),
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


def _has(run: Json, key: str) -> bool:
    # CLM has no counterfactual: a series of nothing but null is no series.
    return any(value is not None for value in run.get(key, ()))


def _smooth(y: NDArray[np.float64]) -> NDArray[np.float64]:
    width = max(1, len(y) // 25)
    padded = np.pad(y, (width // 2, width - 1 - width // 2), mode="edge")
    return np.convolve(padded, np.full(width, 1 / width), mode="valid")


def fluency(report: Json, judge: str) -> Figure:
    """Draw per cell how likely the untouched model finds the outputs, against its own outputs."""
    levels = report["recipe"]["levels"]
    names = report["recipe"]["attributes"][:2]
    own = number(report["methods"]["start"]["quality"]["fluency_mean"])[0]
    shown = {
        method: np.array([number(e)[0] for e in report["methods"][method]["quality"]["fluency"]])
        for method in swept(report, judge)
        if (report["methods"][method].get("quality") or {}).get("fluency")
    }
    figure, axes = panels(1, len(shown), width=2.5, height=3.0)
    limit = max(0.2, *(float(np.nanmax(np.abs(v - own))) for v in shown.values()))
    for ax, (method, values) in zip(axes[0], shown.items(), strict=True):
        grid = (values - own).reshape(levels, levels)
        heatmap(ax, np.full_like(grid, np.nan))
        ax.imshow(grid.T, origin="lower", cmap="PuOr", vmin=-limit, vmax=limit, aspect="equal")
        for x, y in np.ndindex(levels, levels):
            if np.isfinite(grid[x, y]):
                tone = "white" if abs(grid[x, y]) > 0.6 * limit else INK
                said = written(float(grid[x, y]), "{:+.1f}")
                ax.text(x, y, said, ha="center", va="center", fontsize=7, color=tone)
        ax.set_title(label(method), loc="center")
        ax.set_xlabel(f"{names[0]} asked for", fontsize=9)
    axes[0][0].set_ylabel(f"{names[1]} asked for", fontsize=9)
    return figure


def has_refusals(report: Json) -> bool:
    """Return whether any method's refusals were judged."""
    return any(parts.get("refusals") for parts in report["methods"].values())


def refusals(report: Json, judge: str) -> Figure:
    """Draw one panel per group of prompts, one line per method."""
    found = {
        m: parts["refusals"] for m, parts in report["methods"].items() if parts.get("refusals")
    }
    groups = sorted({group for curves in found.values() for group in curves})
    methods, levels = list(report["methods"]), report["recipe"]["levels"]
    colour, marker = colours(methods), markers(methods)
    figure, axes = panels(1, len(groups), width=max(3.4, 8.6 / len(groups)), height=3.6)
    x = np.arange(levels)
    for ax, group in zip(axes[0], groups, strict=True):
        n = 0
        for method, curves in found.items():
            if group not in curves:
                continue
            y, low, high = np.array([number(e) for e in curves[group]]).T
            n = max(n, *(int(e["n"]) for e in curves[group]))
            ax.fill_between(x, low, high, color=colour[method], alpha=0.15, linewidth=0)
            ax.plot(x, y, marker[method] + "-", color=colour[method], label=label(method))
        ax.set(xticks=x, ylim=(0, 1), xlabel="safety level asked for")
        # Two lines: a long group's name would run into the next panel.
        ax.set_title(f"{fill(group, 30)}\n{n} prompts")
        ax.grid(visible=True, axis="y")
    axes[0][0].set_ylabel("share refused")
    # From all panels: a method may have been read on the prompts of some groups only.
    drawn = {
        name: handle
        for ax in axes[0]
        for handle, name in zip(*ax.get_legend_handles_labels(), strict=True)
    }
    names = [label(method) for method in methods if label(method) in drawn]
    handles = [drawn[name] for name in names]
    figure.legend(handles, names, loc="outside lower center", ncols=min(4, max(1, len(names))))
    return figure
