"""Figures of what the dials do. Each reads the report's JSON only, so a report can be redrawn.

A figure is a function ``(report, judge) -> Figure``; it is drawn only if its data are there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PatchCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from equipoise.report.canvas import (
    FAINT,
    INK,
    MUTED,
    ceiling_name,
    colours,
    heatmap,
    judges_name,
    label,
    markers,
    number,
    panels,
    written,
)

Json = Mapping[str, Any]


def swept(report: Json, judge: str) -> dict[str, Any]:
    """Return method to its control figures by this judge; methods without are left out."""
    methods = report.get("methods", {})
    return {name: parts[judge] for name, parts in methods.items() if parts.get(judge)}


def ceiling(report: Json, judge: str) -> Json | None:
    """Return the control figures of the ceiling by this judge, if it is known."""
    return (report.get("ceiling") or {}).get(judge)


def _dots(
    axes: Axes, methods: Sequence[str], estimates: Mapping[str, Any], *, hollow: bool, shift: float
) -> None:
    colour, marker = colours(methods), markers(methods)
    for row, method in enumerate(methods):
        value, low, high = number(estimates.get(method))
        y = len(methods) - 1 - row + shift
        axes.plot([low, high], [y, y], color=colour[method], linewidth=2, solid_capstyle="round")
        axes.plot(
            value,
            y,
            marker[method],
            color=colour[method],
            markersize=7,
            markerfacecolor="white" if hollow else colour[method],
            markeredgewidth=1.6,
        )
        if not hollow and np.isfinite(value):
            axes.annotate(
                written(value),
                (value, y),
                xytext=(0, 8),
                textcoords="offset points",
                ha="center",
                fontsize=8,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.6, "alpha": 0.8},
            )
    axes.set_yticks(range(len(methods)), [label(method) for method in methods][::-1])
    axes.set_ylim(-0.6, len(methods) - 0.3)
    axes.tick_params(axis="y", length=0)
    axes.grid(visible=True, axis="x")


def control(report: Json, judge: str) -> Figure:
    """Draw how closely each method follows each dial: MP with intervals, beside the ceiling."""
    methods = list(report["methods"])
    attributes = report["recipe"]["attributes"]
    figure, axes = panels(1, len(attributes), width=5.2, height=1.3 + 0.55 * len(methods))
    both = [kind for kind in ("generalization", "optimization") if swept(report, kind)]
    for ax, name in zip(axes[0], attributes, strict=True):
        for kind in both:
            found = {m: c["mp"][name] for m, c in swept(report, kind).items()}
            hollow = kind != judge
            _dots(ax, methods, found, hollow=hollow, shift=-0.22 if hollow else 0.0)
        best = ceiling(report, judge)
        if best:
            ax.axvline(best["mp"][name]["value"], color=INK, linestyle="--", linewidth=1.2)
            ax.text(
                best["mp"][name]["value"],
                len(methods) - 0.32,
                f"{ceiling_name(report)} ",
                ha="right",
                va="top",
                fontsize=8,
            )
        ax.axvline(0, color=MUTED, linewidth=0.8)
        ax.set_xlim(min(-0.15, ax.get_xlim()[0]), 1.05)
        ax.set_title(f"{name} dial")
        ax.set_xlabel("follows the dial: 0 = not at all, 1 = exactly")
    if len(both) > 1:
        marks = [
            Line2D([], [], marker="o", linestyle="", color=MUTED, markerfacecolor=face, label=said)
            for face, said in (
                (MUTED, judges_name(report)),
                ("white", "the reward models used in training"),
            )
        ]
        figure.legend(handles=marks, loc="outside lower center", ncols=2)
    return figure


def response(report: Json, judge: str) -> Figure:
    """Draw the delivered unit score against the requested level, one line per method."""
    found = swept(report, judge)
    attributes, levels = report["recipe"]["attributes"], report["recipe"]["levels"]
    colour, marker = colours(list(report["methods"])), markers(list(report["methods"]))
    figure, axes = panels(1, len(attributes), width=5.0, height=4.4)
    x = np.arange(levels)
    for ax, name in zip(axes[0], attributes, strict=True):
        ax.plot(x, (x + 0.5) / levels, color=INK, linestyle="--", linewidth=1.2, label="asked for")
        best = ceiling(report, judge)
        if best:
            y = [number(e)[0] for e in best["response"][name]]
            ax.plot(x, y, color=INK, linewidth=1, linestyle=":", label=ceiling_name(report))
        for method, figures in found.items():
            y, low, high = np.array([number(e) for e in figures["response"][name]]).T
            ax.fill_between(x, low, high, color=colour[method], alpha=0.18, linewidth=0)
            ax.plot(x, y, marker[method] + "-", color=colour[method], label=label(method))
        ax.set(xticks=x, ylim=(0, 1), xlabel=f"{name} level asked for")
        ax.set_title(f"{name} dial")
        ax.grid(visible=True, axis="y")
    axes[0][0].set_ylabel("mean delivered score (0 = lowest, 1 = highest)")
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(4, len(names)))
    return figure


def posterior(report: Json, judge: str) -> Figure:
    """Draw, for every method and dial, which level came back for which level asked for."""
    found = swept(report, judge)
    attributes = report["recipe"]["attributes"]
    figure, axes = panels(len(attributes), len(found), width=2.35, height=2.55)
    for row, name in enumerate(attributes):
        for column, (method, figures) in enumerate(found.items()):
            ax = axes[row][column]
            heatmap(ax, 100 * np.array(figures["posterior"][name]), top=90, size=7.5)
            for level in range(report["recipe"]["levels"]):
                ax.add_patch(
                    Rectangle((level - 0.5, level - 0.5), 1, 1, fill=False, edgecolor="#D55E00")
                )
            if row == 0:
                ax.set_title(label(method), loc="center")
            ax.set_xlabel(f"{name} asked for", fontsize=9)
            if column == 0:
                ax.set_ylabel(f"{name} delivered", fontsize=9)
    return figure


def coverage(report: Json, judge: str) -> Figure:
    """Draw where the mean delivery of each cell lies in the plane of both scores."""
    found = dict(swept(report, judge))
    best = ceiling(report, judge)
    colour = colours(list(report["methods"]))
    shown = {**found, **({ceiling_name(report): best} if best else {})}
    names, levels = report["recipe"]["attributes"][:2], report["recipe"]["levels"]
    columns = min(3, len(shown))
    figure, axes = panels(-(-len(shown) // columns), columns, width=3.5, height=3.6)
    for ax in axes.flat[len(shown) :]:
        ax.set_visible(False)
    for ax, (method, figures) in zip(axes.flat, shown.items(), strict=False):
        mean = np.array(figures["cell_means"]).reshape(levels, levels, -1)  # (L, L, A)
        tone = colour.get(method, INK)
        for level, goal in product(range(levels), range(levels)):
            corner = (level / levels, goal / levels)
            hit = np.abs(mean[level, goal, :2] * levels - (level + 0.5, goal + 0.5)).max() <= 0.5
            fill = {"facecolor": tone, "alpha": 0.22} if hit else {"facecolor": "none"}
            ax.add_patch(Rectangle(corner, 1 / levels, 1 / levels, edgecolor=FAINT, **fill))
        for k in range(levels):
            ax.plot(*mean[k, :, :2].T, color=tone, linewidth=0.9, alpha=0.7)
            ax.plot(*mean[:, k, :2].T, color=tone, linewidth=0.9, alpha=0.7)
        ax.plot(*mean[..., :2].reshape(-1, 2).T, "o", color=tone, markersize=3.5)
        share = number(figures["coverage"])[0]
        ax.set_title(f"{label(method)}: {share:.0%} of cells")
        ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
        ax.set(xlabel=f"{names[0]} delivered", ylabel=f"{names[1]} delivered")
    return figure


def leakage(report: Json, judge: str) -> Figure:
    """Draw how far each dial moves the *other* score, beside the ceiling's own."""
    found = swept(report, judge)
    methods = list(report["methods"])
    attributes = report["recipe"]["attributes"]
    figure, axes = panels(1, len(attributes), width=5.2, height=1.3 + 0.5 * len(methods))
    best = ceiling(report, judge)
    for ax, name in zip(axes[0], attributes, strict=True):
        if best:
            at = best["leakage"][name]["value"]
            ax.axvspan(at - 0.15, at + 0.15, color=FAINT, zorder=0)
            ax.axvline(at, color=INK, linestyle="--", linewidth=1.2)
        ax.axvline(0, color=MUTED, linewidth=0.8)
        _dots(ax, methods, {m: c["leakage"][name] for m, c in found.items()}, hollow=False, shift=0)
        other = " and ".join(a for a in attributes if a != name)
        ax.set_title(f"{other} dial → {name} score")
        reach = max(0.5, *(abs(x) for x in ax.get_xlim()))
        ax.set_xlim(-reach, reach)
        ax.set_xlabel("correlation: 0 = the dials are independent")
    return figure


def cells(report: Json, judge: str, method: str) -> Figure:
    """Draw, for one method, the full distribution of deliveries for every cell asked for."""
    figures = swept(report, judge)[method]
    levels = report["recipe"]["levels"]
    names = report["recipe"]["attributes"][:2]
    joint = np.array(figures["joint"], float).reshape((levels,) * 4)
    share = joint / np.maximum(joint.sum(axis=(2, 3), keepdims=True), 1)
    pitch = levels + 0.8  # a map and the gap to the next one
    figure, axes = panels(1, 1, width=7.4, height=7.4)
    ax = axes[0][0]
    edges = np.arange(levels + 1) - 0.5
    lines, frames = [], []
    for x, y in product(range(levels), range(levels)):
        left, bottom = x * pitch, y * pitch
        shown = np.ma.masked_equal(share[x, y].T, 0)
        ax.pcolormesh(edges + left, edges + bottom, shown, cmap="Blues", vmin=-0.07, vmax=0.6)
        for edge in edges:
            lines.append([(edge + left, bottom - 0.5), (edge + left, bottom + levels - 0.5)])
            lines.append([(left - 0.5, edge + bottom), (left + levels - 0.5, edge + bottom)])
        frames.append(Rectangle((left + x - 0.5, bottom + y - 0.5), 1, 1))
    ax.add_collection(LineCollection(lines, colors=FAINT, linewidths=0.7))
    ax.add_collection(
        PatchCollection(frames, facecolor="none", edgecolor="#D55E00", linewidth=1.7, zorder=3)
    )
    middle = np.arange(levels) * pitch + (levels - 1) / 2
    ax.set_xticks(middle, [str(level) for level in range(levels)])
    ax.set_yticks(middle, [str(level) for level in range(levels)])
    ax.set(xlabel=f"{names[0]} level asked for", ylabel=f"{names[1]} level asked for")
    ax.set(xlim=(-0.7, levels * pitch - 1.1), ylim=(-0.7, levels * pitch - 1.1), aspect="equal")
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return figure
