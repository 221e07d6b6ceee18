"""The dials of a conversation: what was asked for, what the scenario makes of it, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from equipoise.dials.dials import Dials
from equipoise.errors import ConfigError
from equipoise.policy.decide import (
    DialPolicy,
    Range,
    Refusal,
    Scenario,
    Server,
    allowed_levels,
    effective_setting,
)
from equipoise.types import DialSetting

OPEN = "open"
"""The scenario without a policy: every dial is free, and at its top until it is turned."""


class DialPanel:
    """Scenario and dials between two inputs.

    Args:
        dials: The model's.
        policy: The operator's rules; without them every dial is free.
    """

    def __init__(self, dials: Dials, policy: DialPolicy | None = None) -> None:
        self.attributes, self.levels = dials.attributes, dials.levels
        self.dials: dict[str, object] = {}
        """What was asked for, by attribute; the rest is the scenario's default."""
        ranges = policy.server if policy is not None else {}
        round_up = policy.round_up if policy is not None else ("safety",)
        self._server = Server(dials, ranges, round_up)
        self.scenarios: Mapping[str, Scenario] = (
            policy.scenarios if policy is not None else {OPEN: _open(dials.attributes)}
        )
        self.scenario = policy.default_scenario if policy is not None else OPEN

    def setting(self, asked: Mapping[str, object] | None = None) -> DialSetting:
        """Return the setting in force, or the one that other dials would get.

        Raises:
            ConfigError: The policy refuses it; the message names the allowed range.
        """
        dials = self.dials if asked is None else asked
        found = effective_setting(dials, {}, self.scenarios[self.scenario], self._server)
        if isinstance(found, Refusal):
            raise ConfigError(
                f"the {found.attribute} dial cannot be set so",
                why=found.message,
                fix=f"see /dials for what scenario {self.scenario} allows",
            )
        return found

    def turn(self, attribute: str, asked: object) -> DialSetting:
        """Turn a dial and return the setting in force; a refused turn changes nothing."""
        dials = {**self.dials, attribute: asked}
        found = self.setting(dials)
        self.dials = dials
        return found

    def enter(self, scenario: str) -> DialSetting:
        """Change the scenario, dials back to its defaults; return the setting in force."""
        if scenario not in self.scenarios:
            raise ConfigError(
                f"no scenario called {scenario}",
                why=f"the policy has {', '.join(self.scenarios)}",
                fix="name one of these",
            )
        self.scenario, self.dials = scenario, {}
        return self.setting()

    def allowed(self, attribute: str) -> range:
        """Return the levels that the scenario allows."""
        scenario = self.scenarios[self.scenario]
        return allowed_levels(attribute, {}, scenario, self._server)

    def described(self, setting: DialSetting) -> str:
        """Return a setting in words: the value of every dial, or auto."""
        return ", ".join(
            f"{attribute} auto" if level is None else f"{attribute} {self.value(level)}"
            for attribute, level in zip(self.attributes, setting.levels, strict=True)
        )

    def value(self, level: int) -> str:
        """Return the dial value of a level, as people write it."""
        return f"{level / (self.levels - 1):.4g}"


def _open(attributes: Sequence[str]) -> Scenario:
    return Scenario(
        why="No policy was given, and the model's files are at hand.",
        ranges={attribute: Range() for attribute in attributes},
        default=dict.fromkeys(attributes, 1.0),
    )
