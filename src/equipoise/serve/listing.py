"""The list of models: one alias per scenario, each with the ranges that this key gets there."""

from __future__ import annotations

from typing import Any

from equipoise.policy.decide import Key, allowed_levels
from equipoise.policy.reload import Rules
from equipoise.serve.chat import ServedModel


def list_models(
    model: ServedModel, key: Key, rules: Rules, *, created: int
) -> dict[str, dict[str, Any]]:
    """Return alias to entry: the model alone, then ``model@scenario`` for each of the key's.

    Args:
        model: The served model.
        key: Of the caller.
        rules: In force.
        created: Unix seconds at which the server started.
    """
    top = model.dials.levels - 1
    entries: dict[str, dict[str, Any]] = {}
    permitted = key.scenarios or (rules.policy.default_scenario,)
    names = [name for name in permitted if name in rules.policy.scenarios]
    aliases = [(f"{model.name}@{name}", name) for name in names]
    plain = [(model.name, names[0])] if permitted[0] in names else []
    for alias, name in plain + aliases:
        scenario = rules.policy.scenarios[name]
        ranges = {}
        for attribute in model.dials.attributes:
            allowed = allowed_levels(attribute, key.ranges, scenario, rules.server)
            ranges[attribute] = (
                {"min": allowed[0] / top, "max": allowed[-1] / top} if allowed else None
            )
        entries[alias] = {
            "id": alias,
            "object": "model",
            "created": created,
            "owned_by": "operator",
            "scenario": name,
            "why": scenario.why,
            "dials": ranges,
            "levels": model.dials.levels,
        }
    return entries
