"""The figure of over- and under-refusal: share refused against the safety dial."""

from __future__ import annotations

from collections.abc import Mapping
from textwrap import fill
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from equipoise.evaluate.canvas import colours, label, markers, number, panels

Json = Mapping[str, Any]


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
