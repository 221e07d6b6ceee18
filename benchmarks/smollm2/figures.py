"""The figures of ``docs/smollm2.md`` that its tables do not show, from ``results.json`` alone.

What each budget buys is drawn over examples, since a step of one objective is not a step of
another.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from benchmarks.smollm2.tables import GROUPS
from benchmarks.tables import NAMES, Json, methods
from matplotlib.figure import Figure

from equipoise.report.canvas import INK, MUTED, panels, save

BLUE, RED, VIOLET = "#0072B2", "#D55E00", "#6A3D9A"
TONES = {
    "start": INK,
    "prompting": MUTED,
    "rerank8": "#999933",
    "rerank16": "#882255",
    "steering": "#009E73",
    "exmate": BLUE,
    "clm": RED,
    "raw-clm": VIOLET,
    "best": "#E69F00",
}
STEPS = 40
"""Of the start, per point of its curve."""


def named(name: str) -> str:
    """Return a method's name without Markdown."""
    return NAMES[name].strip("*")


def refusals(result: Json) -> Figure:
    """Draw the share refused over the safety dial, a panel per group of prompts."""
    figure, axes = panels(2, 2, width=4.4, height=3.1)
    for ax, (group, title) in zip(axes.ravel(), GROUPS.items(), strict=True):
        for name in methods(result):
            levels = (result["refusals"][name] or {}).get(group) or []
            y = [level["value"] for level in levels]
            if y:
                ax.plot(y, "o-", color=TONES[name], markersize=3, label=named(name))
                low, high = ([level[end] for level in levels] for end in ("low", "high"))
                ax.fill_between(range(len(y)), low, high, color=TONES[name], alpha=0.08)
        ax.set(ylim=(0, 1), xlabel="level of safety asked for", title=title)
        ax.set_xticks(range(5))
    axes[0][0].legend(fontsize=7)
    return figure


def examples(result: Json) -> Figure:
    """Draw what tuning has learnt over the examples that it has seen."""
    figure, axes = panels(1, 3, width=4.4, height=3.9)
    batch = result["tuning"]["best"]["recipe"]["steered_start"]["batch_size"]
    shares = {
        "unexplained": ("of the dials, missing", BLUE),
        "disturbance": ("disturbance beside it", RED),
    }
    for key, (label, tone) in shares.items():
        y = np.array(result["steered_start"][key], float)
        axes[0][0].plot(batch * (1 + np.arange(len(y))), y, color=tone, alpha=0.2, linewidth=1)
        axes[0][0].plot(*means(y, batch, STEPS), "o-", color=tone, markersize=4, label=label)
    axes[0][0].set(ylim=(0, 2), xlabel="texts seen, each under four settings")
    axes[0][0].set_title("steered start:\nshare of the squared shift")
    _listening(axes[0][1], result["listening"])
    batch = result["tuning"]["exmate"]["recipe"]["batch_size"]
    sides = {
        "asked": ("o-", BLUE, "under the setting asked for"),
        "counterfactual": ("s--", INK, "under another setting"),
    }
    for key, (mark, tone, label) in sides.items():
        y = np.array(result["likelihood"]["exmate"][key], float)
        axes[0][2].plot(*means(y, batch, 200 // batch), mark, color=tone, markersize=4, label=label)
    axes[0][2].set_xlabel("examples seen")
    axes[0][2].set_title("ExMATE on MOEC:\nlog-likelihood per token")
    for ax in axes[0]:
        ax.grid(visible=True, axis="y")
        ax.legend(fontsize=8)
    return figure


def _listening(ax: Any, found: Json) -> None:
    for shift, name in enumerate(("exmate", "clm", "raw-clm")):
        rows = found[name]
        n = np.array([row["looked_at"] for row in rows], float)
        y = np.array([row["preferred"] for row in rows], float)
        reach = 1.96 * np.sqrt(0.25 / n)
        ax.errorbar(
            # Side by side, or the bars would hide each other.
            [row["examples"] + 25 * (shift - 1) for row in rows],
            y,
            yerr=[np.minimum(reach, y), np.minimum(reach, 1 - y)],
            fmt="o-",
            color=TONES[name],
            markersize=4,
            elinewidth=0.8,
            label=f"{named(name)} ({n.sum():,.0f} looked at)",
        )
    ax.axhline(0.5, color=INK, linestyle="--", linewidth=1)
    ax.set(ylim=(0, 1.3), yticks=np.linspace(0, 1, 6), xlabel="examples seen")
    ax.set_title("fresh examples that prefer\nthe cell asked for (½ = chance)")


def means(y: Any, batch: int, steps: int) -> tuple[list[int], list[float]]:
    """Return the examples seen at the end of each window of steps, and the window's mean."""
    starts = range(0, len(y), steps)
    ends = [batch * min(len(y), start + steps) for start in starts]
    return ends, [float(np.nanmean(y[start : start + steps])) for start in starts]


def draw(result: Json, folder: Path) -> None:
    """Draw both figures as ``smollm2-NAME.png``."""
    for drawn in (refusals, examples):
        vector, picture = save(partial(drawn, result), f"smollm2-{drawn.__name__}", folder)
        vector.unlink()  # the repository keeps the PNGs only
        print(f"wrote {picture}")
