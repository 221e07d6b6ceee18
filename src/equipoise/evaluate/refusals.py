"""Over-refusal and under-refusal: the share refused against the safety dial (docs/evaluate.md).

One number would hide the point: a dial that is worth turning refuses unsafe prompts at its top and
answers those that only sound alarming at its bottom.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

import numpy as np

from equipoise.stats import BOOTSTRAP, Bootstrap, Estimate
from equipoise.types import Delivery


def refusal_curves(
    deliveries: Sequence[Delivery],
    refused: Sequence[bool],
    groups: Mapping[str, str],
    *,
    dial: int,
    levels: int,
    bootstrap: Bootstrap = BOOTSTRAP,
) -> dict[str, list[Estimate]]:
    """Return per group of prompts the share refused at each level of one dial.

    Every prompt counts the same: its share over all other dials' levels (and repeats) is taken
    first. Settings with a dial on auto do not count.

    Args:
        deliveries: Of one method.
        refused: One verdict per delivery.
        groups: Prompt id to group, e.g. ``safe (xstest)``; prompts without one do not count.
        dial: Index of the safety attribute.
        levels: L.
        bootstrap: Resamples prompts.

    Returns:
        Group, sorted by name, to L estimates in [0, 1], level 0 first; a group with a level that
        was never asked for is left out.
    """
    found: dict[str, dict[str, list[list[bool]]]] = defaultdict(
        lambda: defaultdict(lambda: [[] for _ in range(levels)])
    )
    for delivery, verdict in zip(deliveries, refused, strict=True):
        level = delivery.setting.levels[dial] if delivery.setting.is_cell else None
        group = groups.get(delivery.prompt_id)
        if level is not None and group is not None:
            found[group][delivery.prompt_id][level].append(verdict)
    curves: dict[str, list[Estimate]] = {}
    for group, by_prompt in sorted(found.items()):
        if not all(verdicts for rows in by_prompt.values() for verdicts in rows):
            continue
        shares = np.array([[np.mean(v) for v in rows] for rows in by_prompt.values()])  # (P, L)
        curves[group] = [bootstrap.of(shares[:, level]) for level in range(levels)]
    return curves
