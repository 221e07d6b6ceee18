"""Does a scenario deliver? Unit scores per scenario of a dial policy, on the same prompts.

The paper's Figure 1 asks one model for different places of use. Here every scenario stands for two
settings: the one its users get unasked, and the least safe one that they may ask for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from equipoise.dials.dials import Dials
from equipoise.errors import ConfigError
from equipoise.evaluate.metrics import collect
from equipoise.policy.decide import Refusal, Server, allowed_levels, effective_setting
from equipoise.policy.rules import DialPolicy
from equipoise.stats import Array, Bootstrap, Estimate
from equipoise.types import Delivery, DialSetting, JudgeKind

Stand = Literal["default", "loosest"]
STANDS: tuple[Stand, ...] = ("default", "loosest")
"""``default``: what users get unasked. ``loosest``: the lowest level allowed of the attributes that
the policy rounds up (safety), the highest of the others."""
Settings = Mapping[str, Mapping[Stand, DialSetting]]

ByAttribute = Mapping[JudgeKind, Mapping[str, Estimate]]


@dataclass(frozen=True)
class Stood:
    """What one setting of a scenario asks for, and what it delivers."""

    levels: tuple[int | None, ...]
    target: Mapping[str, float | None]
    """Attribute to the unit score asked for; ``None`` on auto."""
    delivered: ByAttribute
    """Judge and attribute to the mean unit score."""


@dataclass(frozen=True)
class ScenarioReport:
    """What one scenario delivers."""

    default: Stood
    loosest: Stood
    opened: ByAttribute
    """Loosest − default, paired by prompt: what the range lets a user change."""
    why: str = ""
    """As the policy says."""


@dataclass(frozen=True)
class ScenariosReport:
    """What every scenario of a policy delivers, on the same prompts."""

    attributes: tuple[str, ...]
    levels: int
    n_prompts: int
    judges: tuple[JudgeKind, ...]
    scenarios: Mapping[str, ScenarioReport]


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
) -> ScenariosReport:
    """Return what each scenario delivered.

    Args:
        settings: From :func:`scenario_settings`.
        deliveries: Of all these settings, for the same prompts and repeats.
        dials: Attributes and levels.
        bootstrap: Resamples prompts.

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

    def by_attribute(values: Callable[[Array], Array]) -> ByAttribute:
        return {
            judge: {
                name: bootstrap.of(values(unit[judge])[:, a])
                for a, name in enumerate(dials.attributes)
            }
            for judge in judges
        }

    def stood(setting: DialSetting) -> Stood:
        targets = [None if level is None else dials.target(level) for level in setting.levels]
        return Stood(
            setting.levels,
            dict(zip(dials.attributes, targets, strict=True)),
            by_attribute(lambda scores: scores[:, columns[setting]]),
        )

    def report(default: DialSetting, loosest: DialSetting) -> ScenarioReport:
        opened = by_attribute(lambda u: u[:, columns[loosest]] - u[:, columns[default]])
        return ScenarioReport(stood(default), stood(loosest), opened)

    return ScenariosReport(
        dials.attributes,
        dials.levels,
        len(prompt_ids),
        tuple(judges),
        {name: report(stands["default"], stands["loosest"]) for name, stands in settings.items()},
    )
