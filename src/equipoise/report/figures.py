"""Figures of what the dials do: functions of a report, drawn only if their data are there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from textwrap import fill

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PatchCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Rectangle

from equipoise.evaluate.measures import JUDGES
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
from equipoise.report.data import Report
from equipoise.stats import Estimate


def _dots(
    axes: Axes,
    methods: Sequence[str],
    estimates: Mapping[str, Estimate],
    *,
    hollow: bool,
    shift: float,
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


def control(report: Report) -> Figure:
    """Draw how closely each method follows each dial: MP with intervals, beside the ceiling."""
    methods = list(report.methods)
    figure, axes = panels(1, len(report.attributes), width=5.2, height=1.3 + 0.55 * len(methods))
    both = [kind for kind in JUDGES if report.swept(kind)]
    best = report.best()
    for ax, name in zip(axes[0], report.attributes, strict=True):
        for kind in both:
            found = {method: c.mp[name] for method, c in report.swept(kind).items()}
            hollow = kind != report.judge
            _dots(ax, methods, found, hollow=hollow, shift=-0.22 if hollow else 0.0)
        if best:
            ax.axvline(best.mp[name].value, color=INK, linestyle="--", linewidth=1.2)
            ax.text(
                best.mp[name].value,
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


def response(report: Report) -> Figure:
    """Draw the delivered unit score against the requested level, one line per method."""
    methods, levels, best = list(report.methods), report.levels, report.best()
    colour, marker = colours(methods), markers(methods)
    figure, axes = panels(1, len(report.attributes), width=5.0, height=4.4)
    x = np.arange(levels)
    for ax, name in zip(axes[0], report.attributes, strict=True):
        if best:
            # Wide and pale, below the dashed line that it may lie on.
            y = [e.value for e in best.response[name]]
            ax.plot(x, y, color=MUTED, linewidth=6, alpha=0.35, label=ceiling_name(report))
        ax.plot(x, (x + 0.5) / levels, color=INK, linestyle="--", linewidth=1.2, label="asked for")
        for method, figures in report.swept().items():
            y, low, high = np.array([number(e) for e in figures.response[name]]).T
            ax.fill_between(x, low, high, color=colour[method], alpha=0.18, linewidth=0)
            ax.plot(x, y, marker[method] + "-", color=colour[method], label=label(method))
        ax.set(xticks=x, ylim=(0, 1), xlabel=f"{name} level asked for")
        ax.set_title(f"{name} dial")
        ax.grid(visible=True, axis="y")
    axes[0][0].set_ylabel("mean delivered score (0 = lowest, 1 = highest)")
    handles, names = axes[0][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=min(3, len(names)))
    return figure


def posterior(report: Report) -> Figure:
    """Draw, for every method and dial, which level came back for which level asked for."""
    found = report.swept()
    figure, axes = panels(len(report.attributes), len(found), width=2.35, height=2.55)
    for row, name in enumerate(report.attributes):
        for column, (method, figures) in enumerate(found.items()):
            ax = axes[row][column]
            heatmap(ax, 100 * figures.posterior[name], top=90, size=7.5)
            for level in range(report.levels):
                ax.add_patch(
                    Rectangle((level - 0.5, level - 0.5), 1, 1, fill=False, edgecolor="#D55E00")
                )
            ax.set_title(fill(label(method), 16), loc="center", fontsize=9.5)
            ax.set_xlabel(f"{name} asked for", fontsize=9)
            if column == 0:
                ax.set_ylabel(f"{name} delivered", fontsize=9)
    return figure


def coverage(report: Report) -> Figure:
    """Draw where the mean delivery of each cell lies in the plane of both scores."""
    best, levels = report.best(), report.levels
    colour = colours(list(report.methods))
    shown = {**report.swept(), **({ceiling_name(report): best} if best else {})}
    columns = min(3, len(shown))
    figure, axes = panels(-(-len(shown) // columns), columns, width=3.5, height=3.8)
    goals = (np.array(list(product(range(levels), repeat=2))) + 0.5) / levels  # (C, 2)
    for ax in axes.flat[len(shown) :]:
        ax.set_visible(False)
    for ax, (method, figures) in zip(axes.flat, shown.items(), strict=False):
        means = figures.cell_means[:, :2]  # (C, 2)
        misses = np.abs(means - goals).max(axis=1)
        tone = colour.get(method, INK)
        hit = misses <= 0.5 / levels + 1e-9
        for corner, inside in zip(goals - 0.5 / levels, hit, strict=True):
            face = {"facecolor": tone, "alpha": 0.22} if inside else {"facecolor": "none"}
            ax.add_patch(Rectangle(corner, 1 / levels, 1 / levels, edgecolor=FAINT, **face))
        net = means.reshape(levels, levels, 2)
        for k in range(levels):
            ax.plot(*net[k].T, color=tone, linewidth=0.9, alpha=0.7)
            ax.plot(*net[:, k].T, color=tone, linewidth=0.9, alpha=0.7)
        ax.plot(*means.T, "o", color=tone, markersize=3.5)
        said = f"{hit.sum()} of {len(goals)} targets hit, mean miss {misses.mean():.2f}"
        ax.set_title(f"{label(method)}\n{said}", fontsize=9.5)
        ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
        names = report.attributes
        ax.set(xlabel=f"{names[0]} delivered", ylabel=f"{names[1]} delivered")
    return figure


def leakage(report: Report) -> Figure:
    """Draw how far each dial moves the *other* score, beside the ceiling's own."""
    methods, best = list(report.methods), report.best()
    figure, axes = panels(1, len(report.attributes), width=5.2, height=1.3 + 0.5 * len(methods))
    for ax, name in zip(axes[0], report.attributes, strict=True):
        if best:
            at = best.leakage[name].value
            ax.axvspan(at - 0.15, at + 0.15, color=FAINT, zorder=0)
            ax.axvline(at, color=INK, linestyle="--", linewidth=1.2)
        ax.axvline(0, color=MUTED, linewidth=0.8)
        found = {method: c.leakage[name] for method, c in report.swept().items()}
        _dots(ax, methods, found, hollow=False, shift=0)
        other = " and ".join(a for a in report.attributes if a != name)
        ax.set_title(f"{other} dial → {name} score")
        reach = max(0.5, *(abs(x) for x in ax.get_xlim()))
        ax.set_xlim(-reach, reach)
        ax.set_xlabel("correlation: 0 = the dials are independent")
    return figure


def cells(report: Report, method: str) -> Figure:
    """Draw, for one method, the full distribution of deliveries for every cell asked for."""
    levels, names = report.levels, report.attributes
    joint = report.swept()[method].joint.reshape((levels,) * 4)
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
