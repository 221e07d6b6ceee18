"""Does a scenario deliver? Unit scores per scenario of a dial policy, on the same prompts.

The paper's Figure 1 asks one model for different places of use. Here every scenario stands for two
settings: the one its users get unasked, and the least safe one that they may ask for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from equipoise.dials.dials import Dials
from equipoise.errors import ConfigError
from equipoise.evaluate.metrics import collect
from equipoise.policy.decide import Refusal, Server, allowed_levels, effective_setting
from equipoise.policy.rules import DialPolicy
from equipoise.stats import Array, Bootstrap
from equipoise.types import Delivery, DialSetting, JudgeKind

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Stand = Literal["default", "loosest"]
STANDS: tuple[Stand, ...] = ("default", "loosest")
"""``default``: what users get unasked. ``loosest``: the lowest level allowed of the attributes that
the policy rounds up (safety), the highest of the others."""
Settings = Mapping[str, Mapping[Stand, DialSetting]]

_NAMES = {"default": "unasked (the default)", "loosest": "the least safe that may be asked for"}
_COLOURS = {"default": "#0072B2", "loosest": "#D55E00"}


def scenario_settings(policy: DialPolicy, dials: Dials) -> Settings:
    """Return scenario to its two settings, by the server's own policy function.

    Raises:
        ConfigError: A scenario of the policy has no setting for this model.
    """
    server = Server(dials, policy.server, policy.round_up)
    found: dict[str, dict[Stand, DialSetting]] = {}
    for name, scenario in policy.scenarios.items():
        ends: dict[str, object] = {}
        for attribute in dials.attributes:
            allowed = allowed_levels(attribute, {}, scenario, server)
            if allowed:
                at = allowed[0] if attribute in policy.round_up else allowed[-1]
                ends[attribute] = {"level": at}
        found[name] = {}
        for stand in STANDS:
            request = ends if stand == "loosest" else {}
            setting = effective_setting(request, {}, scenario, server)
            if isinstance(setting, Refusal):
                raise ConfigError(
                    f"scenario {name} has no setting for this model",
                    why=f"{setting.attribute}: {setting.message}",
                    fix="correct its ranges in the policy",
                )
            found[name][stand] = setting
    return found


def measure_scenarios(
    settings: Settings,
    deliveries: Sequence[Delivery],
    *,
    dials: Dials,
    bootstrap: Bootstrap,
) -> dict[str, Any]:
    """Return what each scenario delivered, as JSON.

    Args:
        settings: From :func:`scenario_settings`.
        deliveries: Of all these settings, for the same prompts and repeats.
        dials: Attributes and levels.
        bootstrap: Resamples prompts.

    Returns:
        ``scenarios``: per name and stand the ``levels``, the ``target`` unit scores (null on auto)
        and per judge and attribute the ``delivered`` mean unit score with its interval; and
        ``opened``: the paired difference loosest − default.

    Raises:
        DataError: A prompt lacks a setting or a repeat.
    """
    wanted = dict.fromkeys(s for stands in settings.values() for s in stands.values())
    columns = {setting: c for c, setting in enumerate(wanted)}
    judges: list[JudgeKind] = sorted({kind for d in deliveries for kind in d.unit})
    unit: dict[JudgeKind, Array] = {}
    prompt_ids: tuple[str, ...] = ()
    for judge in judges:
        scores, prompt_ids = collect(deliveries, columns, judge, dials.attributes)
        unit[judge] = scores.mean(axis=0)  # (P, C, A); one mean per prompt, so intervals hold

    def of(judge: JudgeKind, setting: DialSetting, a: int) -> Array:
        column: Array = unit[judge][:, columns[setting], a]
        return column

    scenarios: dict[str, Any] = {}
    for name, stands in settings.items():
        scenarios[name] = {
            stand: {
                "levels": list(setting.levels),
                "target": {
                    attribute: None if level is None else dials.target(level)
                    for attribute, level in zip(dials.attributes, setting.levels, strict=True)
                },
                "delivered": {
                    judge: {
                        attribute: bootstrap.of(of(judge, setting, a))
                        for a, attribute in enumerate(dials.attributes)
                    }
                    for judge in judges
                },
            }
            for stand, setting in stands.items()
        }
        scenarios[name]["opened"] = {
            judge: {
                attribute: bootstrap.difference(
                    of(judge, stands["loosest"], a), of(judge, stands["default"], a)
                )
                for a, attribute in enumerate(dials.attributes)
            }
            for judge in judges
        }
    return {
        "attributes": list(dials.attributes),
        "levels": dials.levels,
        "n_prompts": len(prompt_ids),
        "judges": judges,
        "scenarios": scenarios,
    }


def figure(measured: Mapping[str, Any]) -> Figure:
    """Draw the delivered unit scores of every scenario, one panel per attribute.

    Args:
        measured: From :func:`measure_scenarios`, also after a round through JSON.
    """
    from matplotlib.lines import Line2D

    from equipoise.report.canvas import FAINT, INK, MUTED, panels

    names, attributes = list(measured["scenarios"]), measured["attributes"]
    judges = [kind for kind in ("generalization", "optimization") if kind in measured["judges"]]
    made, axes = panels(1, len(attributes), width=4.9, height=1.9 + 0.62 * len(names))
    for ax, attribute in zip(axes[0], attributes, strict=True):
        for edge in np.arange(1, measured["levels"]) / measured["levels"]:
            ax.axvline(edge, color=FAINT, linewidth=0.8, zorder=0)
        for row, name in enumerate(names):
            y = len(names) - 1 - row
            for stand in STANDS:
                _draw_stand(ax, measured["scenarios"][name][stand], attribute, judges, stand, y)
        ax.set_yticks(range(len(names)), names[::-1])
        ax.set(xlim=(0, 1), ylim=(-0.6, len(names) - 0.4))
        ax.set_title(f"{attribute} delivered")
        ax.set_xlabel("unit score: rank among the untouched model's own answers")
        ax.tick_params(axis="y", length=0)
    marks = [
        Line2D([], [], marker="o", color=_COLOURS[stand], label=_NAMES[stand]) for stand in STANDS
    ]
    marks.append(Line2D([], [], marker="|", color=INK, linestyle="", markersize=11, label="asked"))
    if len(judges) > 1:
        faces = {"generalization": MUTED, "optimization": "white"}
        said = {"generalization": "judges unseen in training", "optimization": "training's judges"}
        marks += [
            Line2D(
                [],
                [],
                marker="o",
                linestyle="",
                color=MUTED,
                markerfacecolor=faces[k],
                label=said[k],
            )
            for k in judges
        ]
    made.legend(handles=marks, loc="outside lower center", ncols=3, fontsize=8)
    return made


def _draw_stand(
    ax: Any, found: Mapping[str, Any], attribute: str, judges: Sequence[str], stand: str, y: float
) -> None:
    from equipoise.report.canvas import INK, number

    colour = _COLOURS[stand]
    up = 0.15 if stand == "default" else -0.15
    asked = found["target"][attribute]
    if asked is not None:
        ax.plot(asked, y + up, "|", color=INK, markersize=11)
    for judge in judges:
        value, low, high = number(found["delivered"][judge][attribute])
        at = y + up + (0.0 if judge == judges[0] else -0.09)
        ax.plot([low, high], [at, at], color=colour, linewidth=1.8, solid_capstyle="round")
        face = colour if judge == judges[0] else "white"
        ax.plot(value, at, "o", color=colour, markersize=5.5, markerfacecolor=face)
