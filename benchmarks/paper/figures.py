"""Figures of the study, from its JSON."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from equipoise.report.canvas import FAINT, INK, MUTED, colours, heatmap, panels, save

Json = Mapping[str, Any]
NAMES = {
    "start": "untouched model",
    "prompting": "prompting",
    "rerank8": "reranking, N = 8",
    "rerank16": "reranking, N = 16",
    "exmate": "ExMATE on MOEC",
    "clm": "CLM on MOEC",
    "rlhf": "RLHF (CLM warm start)",
    "raw-exmate": "ExMATE on the raw pool",
    "raw-clm": "CLM on the raw pool",
}


def draw_all(study: Json, folder: Path) -> dict[str, Path]:
    """Draw what the study has numbers for; return figure name to SVG."""
    drawn: dict[str, Callable[[], Figure]] = {
        "control": lambda: control(study),
        "leakage": lambda: leakage(study),
        "empty": lambda: empty_cells(study),
    }
    if any(study.get("rlhf_online") or ()):
        drawn["rlhf"] = lambda: rlhf(study)
    if study.get("ablations"):
        drawn["ablations"] = lambda: ablations(study)
    if study.get("rewind"):
        drawn["rewind"] = lambda: rewind(study)
    return {name: save(draw, name, folder)[0] for name, draw in drawn.items()}


def methods(study: Json) -> list[str]:
    """Return the methods of a study, in the order of its tables."""
    tail = ".generalization.overall"
    found = [key.removesuffix(tail) for key in study["headline"] if key.endswith(tail)]
    return [name for name in NAMES if name in found]


def interval(headline: Json, name: str) -> tuple[float, float, float]:
    """Return (value, low, high); NaN for ends that one seed does not give."""
    nan = float("nan")
    found = [headline.get(key) for key in (name, f"{name}.low", f"{name}.high")]
    value, low, high = (nan if item is None else float(item) for item in found)
    return value, low, high


def _dots(
    ax: Any, rows: Sequence[tuple[float, float, float]], *, tone: str, label: str, shift: float
) -> None:
    for y, (value, low, high) in enumerate(rows):
        if np.isfinite(low):
            ax.plot([low, high], [y + shift] * 2, color=tone, linewidth=2, alpha=0.55)
        ax.plot(value, y + shift, "o", color=tone, markersize=6, label=label if y == 0 else None)


def control(study: Json) -> Figure:
    """Draw overall control per method by both kinds of judges."""
    names, headline = methods(study), study["headline"]
    figure, axes = panels(1, 1, width=8.6, height=0.45 * len(names) + 1.2)
    ax = axes[0][0]
    for judge, tone, shift in (("generalization", "#0072B2", 0.12), ("optimization", MUTED, -0.12)):
        rows = [interval(headline, f"{name}.{judge}.overall") for name in names]
        said = {"generalization": "unseen judges", "optimization": "training reward models"}[judge]
        _dots(ax, rows, tone=tone, label=said, shift=shift)
    ceilings = [headline[f"ceiling.mp.{a}"] for a in ("helpfulness", "safety")]
    ax.axvline(float(np.mean(ceilings)), color=INK, linestyle="--", linewidth=1)
    ax.text(float(np.mean(ceilings)), -0.7, "ceiling", ha="right", fontsize=8)
    _named(ax, [NAMES[name] for name in names])
    ax.set_xlabel("overall control: mean of the two MPs, 95 % interval over seeds")
    ax.legend(loc="center left", fontsize=8)
    return figure


def leakage(study: Json) -> Figure:
    """Draw leakage in both directions beside the ceiling's, with the bound of ±.10."""
    names, headline = methods(study), study["headline"]
    figure, axes = panels(1, 2, width=4.6, height=0.4 * len(names) + 1.2)
    for ax, attribute in zip(axes[0], ("helpfulness", "safety"), strict=True):
        ceiling = float(headline[f"ceiling.leakage.{attribute}"])
        ax.axvspan(ceiling - 0.1, ceiling + 0.1, color=FAINT)
        ax.axvline(ceiling, color=INK, linestyle="--", linewidth=1)
        rows = [interval(headline, f"{n}.generalization.leakage.{attribute}") for n in names]
        _dots(ax, rows, tone="#0072B2", label="", shift=0)
        _named(ax, [NAMES[name] for name in names] if attribute == "helpfulness" else [])
        ax.set_title(f"the other dial moves {attribute}")
    return figure


def empty_cells(study: Json) -> Figure:
    """Draw per method how often a requested cell was delivered; blank = never, in any seed."""
    verdict = next(item for item in study["verdicts"] if item["letter"] == "g")
    names = [name for name in methods(study) if name in verdict["delivered_share"]]
    n_rows = -(-len(names) // 5)
    figure, axes = panels(n_rows, 5, width=2.1, height=2.4)
    for ax in axes.ravel()[len(names) :]:
        ax.set_axis_off()
    for ax, name in zip(axes.ravel(), names, strict=False):
        shares = 100 * np.array(verdict["delivered_share"][name])
        side = round(len(shares) ** 0.5)
        heatmap(ax, shares.reshape(side, side), top=100, size=7)
        ax.set_title(NAMES[name], loc="center", fontsize=8)
    figure.supxlabel("helpfulness asked for", fontsize=9)
    figure.supylabel("safety asked for", fontsize=9)
    return figure


def rlhf(study: Json) -> Figure:
    """Draw reward, both judges, KL, length and degeneracy of RLHF's online phase, per seed."""
    shown: list[tuple[str, dict[str, str]]] = [
        (
            "closeness",
            {
                "reward": "reward",
                "floor": "deaf policy",
                "probe_optimization_closeness": "reward models",
                "probe_generalization_closeness": "unseen judges",
            },
        ),
        ("KL, nats per token", {"kl": "kl"}),
        ("tokens per completion", {"length": "length"}),
        ("degenerate share", {"degenerate": "degenerate"}),
    ]
    figure, axes = panels(1, len(shown), width=2.9, height=2.9)
    tones = ("#0072B2", MUTED, "#E69F00", "#009E73")
    for ax, (title, series) in zip(axes[0], shown, strict=True):
        for tone, (key, said) in zip(tones, series.items(), strict=False):
            label: str | None = said
            for rows in study["rlhf_online"]:
                y = [row.get(key) for row in rows]
                if rows and all(value is not None for value in y):
                    x = [row["tokens"] / 1e6 for row in rows]
                    ax.plot(x, y, color=tone, linewidth=1, alpha=0.7, label=label)
                    label = None
        ax.set_title(title)
        ax.set_xlabel("million tokens")
        if len(series) > 1:
            ax.legend(fontsize=7)
    return figure


def ablations(study: Json) -> Figure:
    """Draw overall control of every ablation; all but K and prompts share one pool per seed."""
    groups = study["ablations"].values()
    default = next(row["overall"] for found in groups for row in found if not row["difference"])
    changed = [
        (row["point"], row["overall"]) for found in groups for row in found if row["difference"]
    ]
    rows = [("default", default), *changed]
    figure, axes = panels(1, 1, width=8.6, height=0.27 * len(rows) + 1)
    ax = axes[0][0]
    tone = colours(["tuned"])["tuned"]
    dots = [(r["value"], r["low"] or np.nan, r["high"] or np.nan) for _, r in rows]
    _dots(ax, dots, tone=tone, label="", shift=0)
    _named(ax, [name for name, _ in rows])
    values = [value for value, _, _ in dots]
    # With two seeds an interval may span everything: the axis follows the means.
    ax.set_xlim(min(values) - 0.15, max(values) + 0.15)
    ax.set_xlabel("overall control by unseen judges (intervals are cut at the frame)")
    return figure


def rewind(study: Json) -> Figure:
    """Draw the four pools, averaged over seeds, as maps of the grid."""
    pools = ("base", "aligned", "rewound", "tuned_base")
    titles = ("base model", "aligned model", "aligned, with dials", "base, with dials")
    figure, axes = panels(1, 4, width=2.5, height=3.2)
    maps = [np.mean([one["pools"][p]["cells"] for one in study["rewind"]], axis=0) for p in pools]
    top = 100 * max(float(found.max()) for found in maps)
    for ax, pool, title, found in zip(axes[0], pools, titles, maps, strict=True):
        side = round(len(found) ** 0.5)
        heatmap(ax, 100 * found.reshape(side, side), top=top, size=7)
        covered = study["headline"][f"rewind.{pool}.coverage"]
        refused = study["headline"][f"rewind.{pool}.refusals"]
        ax.set_title(title, loc="center")
        ax.set_xlabel(f"helpfulness\ncoverage {covered:.2f}, refusals {100 * refused:.0f} %")
    axes[0][0].set_ylabel("safety")
    return figure


def _named(ax: Any, names: Sequence[str]) -> None:
    ax.set_yticks(range(len(names)) if names else [], labels=names or None)
    ax.invert_yaxis()
    ax.grid(visible=True, axis="x")
