"""Fields of recipes that went, and defaults that changed: how a recipe stored before is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Place = tuple[str | int, ...]


@dataclass(frozen=True)
class Gone:
    """A field that went."""

    still: Any
    """Its value that asked for what is still done."""
    advice: str


GONE: Mapping[Place, Gone] = {
    ("tune", "weight_relative"): Gone(False, "leave it out, and say with `tune.weight` how much"),
    ("tune", "weight_warm_up"): Gone(0, "leave it out: `tune.weight` counts from the first step"),
    ("tune", "n_counterfactuals"): Gone(1, "leave it out: every example has one counterfactual"),
}
GONE_VALUES: Mapping[Place, tuple[str, str]] = {
    ("tune", "counterfactual"): ("far", "it went; use `uniform` or `one_attribute`"),
}
"""A field to its value that went, and what to do."""
FORMER_DEFAULTS: Mapping[Place, Any] = {("steer", "directions"): "difference_of_means"}
"""What was done where a stored recipe does not say; today's default is another."""


def advice(place: Place, value: object = None) -> str | None:
    """Return what to do about a key, or a value of it, that went; none if it never was one."""
    if place in GONE:
        return f"it went: {GONE[place].advice}"
    went, hint = GONE_VALUES.get(place, (None, None))
    return hint if value == went else None


def in_todays_fields(stored: Mapping[str, Any]) -> dict[str, Any]:
    """Return a stored recipe, or top-level fields of one, that asks for the same today.

    A field that went is left out if it held what is still done, and kept, to be refused, if not.
    """
    plain: dict[Any, Any] = {
        name: dict(part) if isinstance(part, dict) else part for name, part in stored.items()
    }
    for (section, name), gone in GONE.items():
        part = plain.get(section)
        if isinstance(part, dict) and name in part and part[name] == gone.still:
            del part[name]
    for (section, name), value in FORMER_DEFAULTS.items():
        if isinstance(plain.get(section), dict):
            plain[section].setdefault(name, value)
    return plain


def refused(stored: Mapping[str, Any]) -> list[str]:
    """Return one line for every field of a stored recipe that asks for what is no longer done."""
    held: dict[Place, Any] = {
        (section, name): value
        for section, part in in_todays_fields(stored).items()
        if isinstance(part, dict)
        for name, value in part.items()
    }
    asked = [place for place, value in held.items() if advice(place, value)]
    return [f"{'.'.join(map(str, place))}: {held[place]!r} is no longer offered" for place in asked]
