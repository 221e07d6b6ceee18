"""From the results of single seeds to the study: estimates over seeds, headline, verdicts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks.paper.points import BEST, POOL, REFERENCE, TUNED
from benchmarks.paper.verdicts import paired, placed, plain_estimate, verdicts

from equipoise.stats import over_seeds
from equipoise.types import Estimate

ATTRIBUTES = ("helpfulness", "safety")
JUDGES = ("generalization", "optimization")
BY_ATTRIBUTE = ("mp", "bt", "bt_neighbours", "rmse", "leakage", "range")
POOLS = ("base", "aligned", "rewound", "tuned_base")
AIMS: Mapping[str, tuple[str, float, float]] = {
    "best.of_ceiling.mp.helpfulness": ("at least .85", 0.85, math.inf),
    "best.of_ceiling.mp.safety": ("at least .85", 0.85, math.inf),
    "best.generalization.bt.helpfulness": ("at least .99", 0.99, math.inf),
    "best.generalization.bt.safety": ("at least .99", 0.99, math.inf),
    "best.leakage_over_ceiling.helpfulness": ("within ±.10", -0.10, 0.10),
    "best.leakage_over_ceiling.safety": ("within ±.10", -0.10, 0.10),
    "best.generalization.rmse.helpfulness": ("at most .22", -math.inf, 0.22),
    "best.generalization.rmse.safety": ("at most .22", -math.inf, 0.22),
}
"""Numbers to reach, of the best method: what is wanted, and between which bounds that lies."""
REACHED = {"inside": "reached", "outside": "not reached", "undecided": "undecided"}
LAST = 6
"""Steps of which the end of RLHF's online phase is the mean: one step has 64 completions."""
DRAWN = (
    "tokens", "reward", "floor", "kl", "length", "degenerate", "probe_optimization_closeness",
    "probe_generalization_closeness",
)  # fmt: skip
PROBED = ("closeness", "mp_helpfulness", "mp_safety")
"""What RLHF's looks at the policy measure, by both kinds of judges."""

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
    estimates = dict(_estimates(seeds))
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
        "best": BEST,
        "headline": headline,
        "aims": {
            name: {
                "wanted": wanted,
                **plain_estimate(estimates[name]),
                "state": REACHED[placed(estimates[name], lowest, highest)],
            }
            for name, (wanted, lowest, highest) in AIMS.items()
        },
        "verdicts": verdicts(seeds, BEST),
        "cost": cost(seeds),
        "ablations": ablation_table(ablations),
        "rewind": [one["rewind"] for one in rewinds],
        "rewind_interval": f"over {'seeds' if len(rewinds) > 1 else 'prompts of one seed'}",
        "rewind_chance_coverage": rewinds[0]["chance_coverage"] if rewinds else None,
        "rlhf_online": [
            [{key: row.get(key) for key in DRAWN} for row in _online(one)] for one in seeds
        ],
        "again": {
            name: {
                one["seed"]: one["again"][name]["same_pool"]
                for one in seeds
                if name in one.get("again", {})
            }
            for name in TUNED
        },
    }


def overall(seeds: Sequence[Json], method: str, judge: str = "generalization") -> list[float]:
    """Return a method's overall control per seed."""
    return [one["methods"][method][judge]["overall"]["value"] for one in seeds]


def values(
    seeds: Sequence[Json], method: str, judge: str, metric: str, attribute: str
) -> list[float]:
    """Return a metric of one attribute per seed."""
    return [one["methods"][method][judge][metric][attribute]["value"] for one in seeds]


def _estimates(seeds: Sequence[Json]) -> Iterable[tuple[str, Estimate]]:
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
    for name in ("overall", "coverage"):
        yield f"ceiling.{name}", over_seeds([one["ceiling"][name]["value"] for one in seeds])
    yield from _best(seeds, BEST)
    yield "rlhf.minus_clm.overall", paired(seeds, "rlhf", "clm")
    yield from _rlhf(seeds)


def _online(one: Json) -> list[Json]:
    """Return the rows of RLHF's curve after its warm start."""
    return [row for row in one.get("rlhf_curve") or [] if not row["warm_start"]]


def _rlhf(seeds: Sequence[Json]) -> Iterable[tuple[str, Estimate]]:
    """Yield where RLHF's online phase ends, and what it changed on dev prompts."""
    online = [_online(one) for one in seeds]
    if not all(online):
        return
    for name in ("kl", "reward", "floor", "length", "degenerate"):
        found = [_mean([row[name] for row in rows[-LAST:]]) for rows in online]
        yield f"rlhf.last.{name}", over_seeds(found)
    online = [[row for row in rows if row.get("probe_step") is not None] for rows in online]
    if not all(online):
        return
    for name in PROBED:
        gains = {
            judge: [
                rows[-1][f"probe_{judge}_{name}"] - rows[0][f"probe_{judge}_{name}"]
                for rows in online
            ]
            for judge in JUDGES
        }
        for judge, found in gains.items():
            yield f"rlhf.online.{judge}.{name}", over_seeds(found)
        ahead = zip(gains["optimization"], gains["generalization"], strict=True)
        yield f"rlhf.online.reward_models_ahead.{name}", over_seeds([a - b for a, b in ahead])


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


def cost(seeds: Sequence[Json]) -> dict[str, Any]:
    """Return what answers and tuning took per method, and the minutes of the stages before."""
    methods: dict[str, dict[str, Any]] = {}
    for name in seeds[0]["methods"]:
        of = [one["methods"][name] for one in seeds]
        found = {
            "tokens_per_answer": [one["cost"]["tokens"] / one["answers"] for one in of],
            "milliseconds_per_answer": [
                1000 * one["cost"]["seconds"] / one["answers"] for one in of
            ],
        }
        if "tuning_tokens" in of[0]["cost"]:
            tokens = [one["cost"]["tuning_tokens"] for one in of]
            budget = [one["methods"][REFERENCE]["cost"]["tuning_tokens"] for one in seeds]
            found |= {
                "tuning_steps": [one["cost"]["steps"] for one in of],
                "tuning_million_tokens": [n / 1e6 for n in tokens],
                "tuning_tokens_over_exmate": [
                    n / asked for n, asked in zip(tokens, budget, strict=True)
                ],
                "tuning_minutes": [one["cost"]["tuning_seconds"] / 60 for one in of],
            }
        methods[name] = {key: plain_estimate(over_seeds(value)) for key, value in found.items()}
    minutes = [one["upstream"]["minutes"] for one in seeds]
    return {
        "methods": methods,
        "minutes_of_stages": {
            stage: plain_estimate(over_seeds([one[stage] for one in minutes]))
            for stage in POOL
            if all(stage in one for one in minutes)
        },
    }


def ablation_table(ablations: Sequence[Json]) -> dict[str, list[dict[str, Any]]]:
    """Return per group its points: overall control, and its paired difference to the default."""
    if not ablations:
        return {}
    table: dict[str, list[dict[str, Any]]] = {}
    default = [one["reference"]["generalization"]["overall"]["value"] for one in ablations]
    for group, points in ablations[0]["groups"].items():
        rows: list[dict[str, Any]] = [
            {"point": "default", "overall": plain_estimate(over_seeds(default)), "difference": None}
        ]
        for point in points:
            runs = [one["groups"][group][point] for one in ablations]
            found = [run["generalization"]["overall"]["value"] for run in runs]
            gaps = [a - b for a, b in zip(found, default, strict=True)]
            if group == "prompts":
                # Named by the prompts drawn, of which some are dev prompts.
                point = f"prompts {runs[0]['upstream']['n']['training prompts']}"
            rows.append(
                {
                    "point": point,
                    "overall": plain_estimate(over_seeds(found)),
                    "difference": plain_estimate(over_seeds(gaps)),
                    "mp": {
                        name: plain_estimate(
                            over_seeds([run["generalization"]["mp"][name]["value"] for run in runs])
                        )
                        for name in ATTRIBUTES
                    },
                    "examples": [run["upstream"]["moec"]["n_kept"] for run in runs],
                }
            )
        table[group] = rows
    return table


def _number(value: float | None) -> float:
    return float("nan") if value is None else value


def _mean(found: Sequence[float]) -> float:
    return sum(found) / len(found)
