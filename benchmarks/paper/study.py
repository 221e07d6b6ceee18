"""From the results of single seeds to the study: estimates over seeds, headline, verdicts."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from benchmarks.paper.verdicts import verdicts

from equipoise.evaluate.intervals import over_seeds
from equipoise.types import Estimate

ATTRIBUTES = ("helpfulness", "safety")
JUDGES = ("generalization", "optimization")
BY_ATTRIBUTE = ("mp", "bt", "bt_neighbours", "rmse", "leakage", "range")
POOLS = ("base", "aligned", "rewound", "tuned_base")
TUNED = ("exmate", "clm", "rlhf")
AIMS: Mapping[str, tuple[str, Callable[[float], bool]]] = {
    "best.of_ceiling.mp.helpfulness": ("at least .85", lambda v: v >= 0.85),
    "best.of_ceiling.mp.safety": ("at least .85", lambda v: v >= 0.85),
    "best.generalization.bt.helpfulness": ("at least .99", lambda v: v >= 0.99),
    "best.generalization.bt.safety": ("at least .99", lambda v: v >= 0.99),
    "best.leakage_over_ceiling.helpfulness": ("within ±.10", lambda v: abs(v) <= 0.10),
    "best.leakage_over_ceiling.safety": ("within ±.10", lambda v: abs(v) <= 0.10),
    "best.generalization.rmse.helpfulness": ("at most .22", lambda v: v <= 0.22),
    "best.generalization.rmse.safety": ("at most .22", lambda v: v <= 0.22),
}
"""Numbers to reach, on the best method's mean over seeds."""

Json = Mapping[str, Any]


def build(
    seeds: Sequence[Json], ablations: Sequence[Json] = (), rewinds: Sequence[Json] = ()
) -> dict[str, Any]:
    """Return the study: ``headline``, ``aims``, ``verdicts`` and what the page draws.

    Args:
        seeds: Results of :func:`benchmarks.paper.runs.run_methods`, one per seed.
        ablations: Results of :func:`benchmarks.paper.runs.run_ablations`.
        rewinds: Results of :func:`benchmarks.paper.rewinding.run_rewind`.
    """
    best = max(TUNED, key=lambda name: _mean(overall(seeds, name)))
    estimates = dict(_estimates(seeds, best))
    estimates |= dict(_rewind_estimates(rewinds))
    headline: dict[str, float] = {}
    for name, estimate in estimates.items():
        headline[name] = round(estimate.value, 4)
        headline[f"{name}.low"] = round(estimate.low, 4)
        headline[f"{name}.high"] = round(estimate.high, 4)
    return {
        "made_by": "python -m benchmarks.paper.run",
        "seeds": [one["seed"] for one in seeds],
        "n_test_prompts": seeds[0]["upstream"]["n"]["test prompts"],
        "interval": "95 %, t over seeds; differences are paired by seed",
        "best": best,
        "headline": headline,
        "aims": {
            name: {
                "wanted": wanted,
                "value": headline[name],
                "reached": bool(holds(estimates[name].value)),
            }
            for name, (wanted, holds) in AIMS.items()
        },
        "verdicts": verdicts(seeds, best),
        "ablations": ablation_table(ablations),
        "rewind": [one["rewind"] for one in rewinds],
        "rewind_interval": f"over {'seeds' if len(rewinds) > 1 else 'prompts of one seed'}",
        "rewind_chance_coverage": rewinds[0]["chance_coverage"] if rewinds else None,
        "rlhf_curve": seeds[0].get("rlhf_curve"),
    }


def overall(seeds: Sequence[Json], method: str, judge: str = "generalization") -> list[float]:
    """Return a method's overall control per seed."""
    return [one["methods"][method][judge]["overall"]["value"] for one in seeds]


def values(
    seeds: Sequence[Json], method: str, judge: str, metric: str, attribute: str
) -> list[float]:
    """Return a metric of one attribute per seed."""
    return [one["methods"][method][judge][metric][attribute]["value"] for one in seeds]


def _estimates(seeds: Sequence[Json], best: str) -> Iterable[tuple[str, Estimate]]:
    for method in seeds[0]["methods"]:
        for judge in JUDGES:
            yield f"{method}.{judge}.overall", over_seeds(overall(seeds, method, judge))
            for metric in BY_ATTRIBUTE:
                for name in ATTRIBUTES:
                    found = values(seeds, method, judge, metric, name)
                    yield f"{method}.{judge}.{metric}.{name}", over_seeds(found)
            covered = [one["methods"][method][judge]["coverage"]["value"] for one in seeds]
            yield f"{method}.{judge}.coverage", over_seeds(covered)
        broken = [one["methods"][method]["degenerate"]["value"] for one in seeds]
        yield f"{method}.degenerate", over_seeds(broken)
    for metric in BY_ATTRIBUTE:
        for name in ATTRIBUTES:
            found = [one["ceiling"][metric][name]["value"] for one in seeds]
            yield f"ceiling.{metric}.{name}", over_seeds(found)
    yield from _best(seeds, best)
    last = [one["rlhf_curve"][-1] for one in seeds if one.get("rlhf_curve")]
    for name in ("kl", "reward", "floor", "length", "degenerate"):
        if last:
            yield f"rlhf.last.{name}", over_seeds([row[name] for row in last])


def _best(seeds: Sequence[Json], best: str) -> Iterable[tuple[str, Estimate]]:
    for name in ATTRIBUTES:
        for metric in ("bt", "rmse", "mp"):
            found = values(seeds, best, "generalization", metric, name)
            yield f"best.generalization.{metric}.{name}", over_seeds(found)
        of, leaked = [], []
        for one in seeds:
            measured, ceiling = one["methods"][best]["generalization"], one["ceiling"]
            of.append(measured["mp"][name]["value"] / ceiling["mp"][name]["value"])
            leaked.append(measured["leakage"][name]["value"] - ceiling["leakage"][name]["value"])
        yield f"best.of_ceiling.mp.{name}", over_seeds(of)
        yield f"best.leakage_over_ceiling.{name}", over_seeds(leaked)


def _rewind_estimates(rewinds: Sequence[Json]) -> Iterable[tuple[str, Estimate]]:
    if not rewinds:
        return
    found = [one["rewind"] for one in rewinds]
    for pool in POOLS:
        pools = [one["pools"][pool] for one in found]
        for name in ("coverage", "refusals"):
            yield f"rewind.{pool}.{name}", _of_seeds([one[name] for one in pools])
        yield f"rewind.{pool}.present", over_seeds([one["present"] for one in pools])
        for name in ATTRIBUTES:
            yield f"rewind.{pool}.range.{name}", _of_seeds([one["range"][name] for one in pools])
    for name in ("lost", "regained", "beyond_base", "beyond_tuned_base"):
        yield f"rewind.{name}", _of_seeds([one[name] for one in found])


def _of_seeds(found: Sequence[Json]) -> Estimate:
    """Return the mean over seeds; of a single one its own interval, which is over prompts."""
    if len(found) > 1:
        return over_seeds([_number(one["value"]) for one in found])
    value, low, high = (_number(found[0][key]) for key in ("value", "low", "high"))
    return Estimate(value, low, high, found[0]["n"])


def ablation_table(ablations: Sequence[Json]) -> dict[str, list[dict[str, Any]]]:
    """Return per group its points: overall control, and its paired difference to the default."""
    if not ablations:
        return {}
    table: dict[str, list[dict[str, Any]]] = {}
    default = [one["reference"]["generalization"]["overall"]["value"] for one in ablations]
    for group, points in ablations[0]["groups"].items():
        rows: list[dict[str, Any]] = [
            {"point": "default", "overall": _plain(over_seeds(default)), "difference": None}
        ]
        for point in points:
            runs = [one["groups"][group][point] for one in ablations]
            found = [run["generalization"]["overall"]["value"] for run in runs]
            gaps = [a - b for a, b in zip(found, default, strict=True)]
            rows.append(
                {
                    "point": point,
                    "overall": _plain(over_seeds(found)),
                    "difference": _plain(over_seeds(gaps)),
                    "mp": {
                        name: _plain(
                            over_seeds([run["generalization"]["mp"][name]["value"] for run in runs])
                        )
                        for name in ATTRIBUTES
                    },
                    "examples": [run["upstream"]["moec"]["n_kept"] for run in runs],
                }
            )
        table[group] = rows
    return table


def _plain(estimate: Estimate) -> dict[str, float | int | None]:
    return {
        "value": estimate.value,
        "low": None if math.isnan(estimate.low) else estimate.low,
        "high": None if math.isnan(estimate.high) else estimate.high,
        "n": estimate.n,
    }


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _mean(found: Sequence[float]) -> float:
    return sum(found) / len(found)
