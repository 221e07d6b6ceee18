"""Who may set what: the operator's rules, and the one function that applies them.

Every surface (server, terminal chat, scenario evaluation) calls :func:`effective_setting`. It does
no I/O, it answers every input (also one that is no number at all), it never leaves the range that
key, scenario and server allow together, and it rounds toward safe (docs/serving.md).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple

from equipoise.dials.dials import Dials
from equipoise.policy.rules import DialPolicy, Key, Level, Range, Ranges, Scenario
from equipoise.types import DialSetting

_WHOLE = Range()
# 0.6 * (L - 1) may fall just beside a level in floats; such a value is on the grid.
_GRID_SLACK = 1e-9


@dataclass(frozen=True)
class Server:
    """What is the same for every request: the model's dials and the ceiling."""

    dials: Dials
    ranges: Ranges
    round_up: tuple[str, ...] = ("safety",)


class Refusal(NamedTuple):
    """Why a request gets no setting."""

    attribute: str
    """As the request spells it; it may be no attribute at all."""
    message: str
    """Names the allowed range; holds no value of the request."""


def effective_setting(
    request: Mapping[str, object], ranges: Ranges, scenario: Scenario, server: Server
) -> DialSetting | Refusal:
    """Return the setting that a request gets.

    A number is a dial value in [0, 1] (1 is the top level whatever L is), ``{"level": k}`` a level,
    ``"auto"`` leaves the attribute free where its range is the whole dial, and is the default
    elsewhere. An attribute that is not named gets the default.

    Args:
        request: Attribute to what was asked for: any JSON value.
        ranges: Of the caller's key; none for a caller without one.
        scenario: Of the request.
        server: The model's dials and the ceiling.

    Returns:
        A level in key ∩ scenario ∩ server (or auto) per attribute, in the model's order; or the
        reason why there is none.
    """
    for name in request:
        if name not in server.dials.attributes:
            return Refusal(
                str(name), f"unknown dial; the dials are {', '.join(server.dials.attributes)}"
            )
    levels = []
    for attribute in server.dials.attributes:
        level = _effective_level(attribute, request, ranges, scenario, server)
        if isinstance(level, Refusal):
            return level
        levels.append(level)
    return DialSetting(tuple(levels))


def allowed_levels(attribute: str, ranges: Ranges, scenario: Scenario, server: Server) -> range:
    """Return the levels that key, scenario and server allow together; may be empty."""
    if attribute not in scenario.ranges:
        return range(0)
    low, high = _ends(attribute, ranges, scenario, server)
    top = server.dials.levels - 1
    return range(math.ceil(low * top - _GRID_SLACK), math.floor(high * top + _GRID_SLACK) + 1)


def _ends(
    attribute: str, ranges: Ranges, scenario: Scenario, server: Server
) -> tuple[float, float]:
    """Return the dial values at which key ∩ scenario ∩ server ends; they may be off the grid."""
    parts = [r.get(attribute, _WHOLE) for r in (ranges, scenario.ranges, server.ranges)]
    return max(part.min for part in parts), min(part.max for part in parts)


def _lies_within(value: float, ends: tuple[float, float]) -> bool:
    return ends[0] - _GRID_SLACK <= value <= ends[1] + _GRID_SLACK


def describe_levels(allowed: range, levels: int) -> str:
    """Return an allowed range in the words of the API: dial values, then levels."""
    top = levels - 1
    low, high = allowed[0], allowed[-1]
    return f"{low / top:.4g} to {high / top:.4g} (level {low} to {high})"


def scenario_for(policy: DialPolicy, key: Key, asked: str | None) -> str | None:
    """Return the name of the scenario that a key gets, or ``None`` if it may not have it.

    Args:
        policy: The rules.
        key: Of the caller.
        asked: The scenario's name, or ``None`` for the key's own default.
    """
    permitted = key.scenarios or (policy.default_scenario,)
    name = permitted[0] if asked is None else asked
    return name if name in permitted and name in policy.scenarios else None


def policy_faults(policy: DialPolicy, dials: Dials) -> list[str]:
    """Return what is wrong with a policy for a model with these dials; all faults at once."""
    faults: list[str] = []
    known = set(dials.attributes)
    server = Server(dials, policy.server, policy.round_up)
    faults += [f"server: unknown dial {name!r}" for name in policy.server if name not in known]
    rounded = policy.round_up if "round_up" in policy.model_fields_set else ()
    faults += [f"round_up: unknown dial {name!r}" for name in rounded if name not in known]
    for name, scenario in policy.scenarios.items():
        where = f"scenarios.{name}"
        for field, named in (("ranges", set(scenario.ranges)), ("default", set(scenario.default))):
            faults += [f"{where}.{field}: {one!r} is missing" for one in sorted(known - named)]
            faults += [f"{where}.{field}: unknown dial {one!r}" for one in sorted(named - known)]
        for attribute in dials.attributes:
            if attribute in scenario.ranges and attribute in scenario.default:
                fault = _default_fault(attribute, scenario, server)
                faults += [f"{where}.{attribute}: {fault}"] if fault else []
    return faults


def _default_fault(attribute: str, scenario: Scenario, server: Server) -> str | None:
    allowed = allowed_levels(attribute, {}, scenario, server)
    if not allowed:
        return f"no level of {server.dials.levels} lies in its range and the server's"
    default = scenario.default[attribute]
    if default == "auto":
        whole = len(allowed) == server.dials.levels
        return None if whole else "default auto needs the whole dial as range"
    value = _asked_value(_plain(default), server)
    if value is not None and _lies_within(value, _ends(attribute, {}, scenario, server)):
        return None
    return f"the default is outside of {describe_levels(allowed, server.dials.levels)}"


def _effective_level(
    attribute: str,
    request: Mapping[str, object],
    ranges: Ranges,
    scenario: Scenario,
    server: Server,
) -> int | Refusal | None:
    allowed = allowed_levels(attribute, ranges, scenario, server)
    if not allowed:
        return Refusal(attribute, "no level is allowed: the ranges of key, scenario and server")
    whole = len(allowed) == server.dials.levels
    asked = request.get(attribute, "auto")
    given = attribute in request
    if asked == "auto" and (not given or not whole):
        # Not asked for, or auto where the dial is not free: the operator's default.
        asked, given = _plain(scenario.default.get(attribute, "auto")), False
    if asked == "auto":
        # A default of auto, but the key narrows the range: its top, which for safety is the safest.
        return None if whole else allowed[-1]
    value = _asked_value(asked, server)
    if value is None:
        return Refusal(
            attribute,
            'must be a number from 0 to 1, {"level": k} or "auto"; allowed here: '
            + describe_levels(allowed, server.dials.levels),
        )
    # What was asked for is judged, not what it is rounded to, which may be out of a range it is in.
    within = _lies_within(value, _ends(attribute, ranges, scenario, server))
    if not within and given and scenario.outside == "refuse":
        return Refusal(attribute, f"allowed here: {describe_levels(allowed, server.dials.levels)}")
    rounding: Literal["up", "nearest"] = "up" if attribute in server.round_up else "nearest"
    level = server.dials.level_for_value(value, rounding=rounding)
    return min(max(level, allowed[0]), allowed[-1])


def _asked_value(asked: object, server: Server) -> float | None:
    """Return the dial value that a JSON value stands for, or ``None`` if it stands for none."""
    if isinstance(asked, Mapping):
        level = asked.get("level")
        if (
            set(asked) != {"level"}
            or type(level) is not int
            or not 0 <= level < server.dials.levels
        ):
            return None
        return level / (server.dials.levels - 1)
    if type(asked) not in (int, float):  # a bool is an int to isinstance
        return None
    assert isinstance(asked, int | float)
    if not 0 <= asked <= 1 or math.copysign(1.0, asked) < 0:
        return None
    return asked


def _plain(default: float | Level | Literal["auto"]) -> object:
    return default.model_dump() if isinstance(default, Level) else default
