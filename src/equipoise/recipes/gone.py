"""Fields of recipes that went, and defaults that changed: how a recipe stored before is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from equipoise.errors import RunError

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


def readable(stored: Any, path: Path) -> Any:
    """Return what a run directory's recipe holds, in today's fields.

    Raises:
        RunError: It asks for what is no longer done.
    """
    if not isinstance(stored, dict):
        return stored
    plain = in_todays_fields(stored)
    held: dict[Place, Any] = {
        (section, name): value
        for section, part in plain.items()
        if isinstance(part, dict)
        for name, value in part.items()
    }
    asked = [place for place, value in held.items() if advice(place, value)]
    if asked:
        lines = [f"{'.'.join(map(str, place))}: {held[place]!r}" for place in asked]
        raise RunError(
            f"{path} was made with an option that went",
            why="\n".join(f"{line} is no longer offered" for line in lines),
            fix=f"make it anew, by a recipe without it: equipoise run RECIPE --dir {path} --fresh",
        )
    return plain
