"""The report: ``report.json``, ``report.html`` (one file, no network) and PNG + SVG figures.

Layout of ``report.json``; every part but ``recipe`` and ``methods`` may be missing, and what is
missing is left out of the page. ``E`` is an estimate ``{"value", "low", "high", "n"}``, ``CONTROL``
is :func:`plain` of a :class:`~equipoise.evaluate.measure.ControlReport`::

    {"recipe": Recipe.model_dump(),             # name, description, seed, attributes, levels, …
     "n": {"test prompts": 40, …},              # counts, printed under the headline as they are
     "intersections": {"training prompts": 0, …},          # stages/unseen.py
     "methods": {NAME: {
         "optimization": CONTROL or null,
         "generalization": CONTROL or null,
         "cost": {"seconds": 1.0, "tokens": 1, "steps": 0},
         "quality": {"degenerate": E,           # quality.degenerate_share
                     "perplexity": E,           # tuned model, all dials on auto
                     "perplexity_ratio": E,     # of the tuned over the untouched model, paired
                     "fluency": [E, …],         # one per control cell, in the order of cells()
                     "fluency_mean": E,         # over all outputs of this method
                     "drift": {JUDGE: {ATTRIBUTE: E}},     # tuned model on auto, benign prompts
                     "length": {ATTRIBUTE: [E, …]}},       # one per level
         "refusals": {GROUP: [E, …]}}},         # share refused, one per level of safety
     "ceiling": {"name": "attainable ceiling", "generalization": CONTROL},
     "judges_in_training": {ATTRIBUTE: "reward model safety"},  # judges that are no judges
     "pool": {ATTRIBUTE: {…}},                  # pool.calibrate.calibration_report
     "skipped": {STAGE: {"count": 2, "first": ["a.jsonl, row 7: …"]}},     # on_bad_row: skip
     "moec": asdict(MoecReport),                # grid_before, grid_after: (L, L), [hp][sf]
     "backdoor": {"before": asdict(BackDoor), "after": asdict(BackDoor)},
     "losses": {RUN: {"step": […], "loss": […], "asked": […], "counterfactual": […], "pull": […]}},
     "differences": {"tuned − rerank16": {ATTRIBUTE: E}},  # measure.compare_mp
     "reward_models": {NAME: {…}},              # a table of the checks
     "stages": {STAGE: minutes},
     "planned": {STAGE: minutes}}               # by plan.py, before the run

Figures are drawn from this JSON alone; the sampler of completions needs the deliveries.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from equipoise.types import Delivery, Prompt

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Json = Mapping[str, Any]


def plain(value: Any) -> Any:
    """Return ``value`` with dataclasses, arrays and tuples turned into JSON; NaN becomes null."""
    if is_dataclass(value) and not isinstance(value, type):
        return plain(asdict(value))
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, np.ndarray):
        return plain(value.tolist())
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, np.generic):
        return plain(value.item())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def _figures(report: Json, judge: str) -> dict[str, Callable[[], Figure]]:
    """Return name to drawing function, in the page's order, for all that there are data for."""
    from equipoise.report import figures, figures_data
    from equipoise.report import figures_data as figures_refusals

    measured = figures.swept(report, judge)
    n_dials = len(report["recipe"]["attributes"])
    fluent = {
        name for name in measured if (report["methods"][name].get("quality") or {}).get("fluency")
    }
    own = (report["methods"].get("start", {}).get("quality") or {}).get("fluency_mean")
    wanted: dict[str, tuple[Any, Any]] = {
        "control": (measured, figures.control),
        "response": (measured, figures.response),
        "posterior": (measured, figures.posterior),
        "coverage": (measured and n_dials == 2, figures.coverage),
        "leakage": (measured and n_dials > 1, figures.leakage),
        "pool": (n_dials > 1 and report.get("moec"), figures_data.pool),
        "backdoor": (report.get("backdoor"), figures_data.backdoor),
        "losses": (report.get("losses"), figures_data.losses),
        "fluency": (n_dials == 2 and fluent and own, figures_data.fluency),
        "refusals": (figures_refusals.has_refusals(report), figures_refusals.refusals),
    }
    drawn: dict[str, Callable[[], Figure]] = {
        name: partial(draw, report, judge) for name, (there, draw) in wanted.items() if there
    }
    if n_dials == 2 and report["recipe"]["levels"] <= 7:
        for method in measured:
            drawn[f"cells_{_file_name(method)}"] = partial(figures.cells, report, judge, method)
    return drawn


def _file_name(method: str) -> str:
    return re.sub(r"[^A-Za-z0-9_-]+", "_", method)


def render(
    report: Json,
    out_dir: Path,
    *,
    text: bool,
    deliveries: Mapping[str, Sequence[Delivery]] | None = None,
    prompts: Mapping[str, Prompt] | None = None,
) -> Path:
    """Write report.json, figures/*.png, figures/*.svg and report.html.

    Args:
        report: See the module docstring.
        out_dir: An existing or new folder; nothing outside it is written.
        text: Show completions. Without it no prompt and no completion gets into any file.
        deliveries: Method to its deliveries, for the sampler; read only with ``text``.
        prompts: Prompt id to prompt, for the sampler; read only with ``text``.

    Returns:
        The path of report.html: under 5 MB, opens from disk, loads nothing.
    """
    from equipoise.report.canvas import save
    from equipoise.report.page import page
    from equipoise.report.sampler import sampler
    from equipoise.report.tables import main_judge

    report = plain(report)
    judge = main_judge(report)
    out_dir.mkdir(parents=True, exist_ok=True)
    pictures = {
        name: save(draw, name, out_dir / "figures")[0].read_text("utf-8")
        for name, draw in _figures(report, judge).items()
    }
    shown = sampler(report, judge, deliveries or {}, prompts or {}) if text else ""
    target = out_dir / "report.html"
    target.write_text(page(report, judge, pictures, shown), "utf-8")
    (out_dir / "report.json").write_text(
        json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False) + "\n", "utf-8"
    )
    return target
