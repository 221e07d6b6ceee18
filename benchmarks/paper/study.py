"""From the results of single seeds to the study: estimates over seeds, headline, verdicts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from statistics import fmean
from typing import Any

from benchmarks.paper.points import BEST, POOL, REFERENCE
from benchmarks.paper.verdicts import gaps, minus, per_answer, placed, plain_estimate, verdicts

from equipoise.stats import Estimate, over_seeds

ATTRIBUTES = ("helpfulness", "safety")
JUDGES = ("generalization", "optimization")
BY_ATTRIBUTE = tuple(
    f"{metric}.{name}"
    for metric in ("mp", "bt", "bt_neighbours", "rmse", "leakage", "range")
    for name in ATTRIBUTES
)
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

Json = Mapping[str, Any]
Named = Iterable[tuple[str, Estimate]]


def build(
    seeds: Sequence[Json], ablations: Sequence[Json] = (), rewinds: Sequence[Json] = ()
) -> dict[str, Any]:
    """Return the study: ``headline``, ``aims``, ``verdicts`` and what the tables show.

    Args:
        seeds: Results of :func:`benchmarks.paper.runs.run_methods`, one per seed.
        ablations: Results of :func:`benchmarks.paper.runs.run_ablations`.
        rewinds: Results of :func:`benchmarks.paper.rewinding.run_rewind`.
    """
    estimates = {**dict(_estimates(seeds)), **dict(_rewind_estimates(rewinds))}
    headline: dict[str, float] = {}
    for name, estimate in estimates.items():
        ends = {"": estimate.value, ".low": estimate.low, ".high": estimate.high}
        headline |= {f"{name}{end}": round(value, 4) for end, value in ends.items()}
    return {
        "seeds": [one["seed"] for one in seeds],
        "headline": headline,
        "n_test_prompts": seeds[0]["upstream"]["n"]["test prompts"],
        "interval": "95 %, t over seeds; differences are paired by seed",
        "best": BEST,
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
        # Seeds whose RLHF was run again later, and whether on the same pool.
        "again": {
            str(one["seed"]): one["again"]["rlhf"]["same_pool"] for one in seeds if "again" in one
        },
    }


def over(seeds: Sequence[Json], path: str) -> Estimate:
    """Return the mean over seeds of the estimate that lies at a dotted path of each."""
    return over_seeds([_at(one, path) for one in seeds])


def _at(one: Any, path: str, end: str = "value") -> float:
    for key in (*path.split("."), end):
        one = one[key]
    return math.nan if one is None else float(one)


def _estimates(seeds: Sequence[Json]) -> Named:
    for method in seeds[0]["methods"]:
        for judge in JUDGES:
            for key in ("overall", *BY_ATTRIBUTE, "coverage"):
                yield f"{method}.{judge}.{key}", over(seeds, f"methods.{method}.{judge}.{key}")
        yield f"{method}.degenerate", over(seeds, f"methods.{method}.degenerate")
    for key in (*BY_ATTRIBUTE, "overall", "coverage"):
        yield f"ceiling.{key}", over(seeds, f"ceiling.{key}")
    best = f"methods.{BEST}.generalization"
    for name in ATTRIBUTES:
        for key in (f"bt.{name}", f"rmse.{name}", f"mp.{name}"):
            yield f"best.generalization.{key}", over(seeds, f"{best}.{key}")
        mp, leakage = f"mp.{name}", f"leakage.{name}"
        of = [_at(one, f"{best}.{mp}") / _at(one, f"ceiling.{mp}") for one in seeds]
        yield f"best.of_ceiling.{mp}", over_seeds(of)
        leaked = [_at(one, f"{best}.{leakage}") - _at(one, f"ceiling.{leakage}") for one in seeds]
        yield f"best.leakage_over_ceiling.{name}", over_seeds(leaked)
    yield "rlhf.minus_clm.overall", over_seeds(gaps(seeds, "rlhf", "clm"))
    yield from _rlhf(seeds)


def _rlhf(seeds: Sequence[Json]) -> Named:
    """Yield where RLHF's online phase ends, and what it changed on dev prompts."""
    online = [
        [row for row in one.get("rlhf_curve") or [] if not row["warm_start"]] for one in seeds
    ]
    if not all(online):
        return
    for name in ("kl", "reward", "floor", "length", "degenerate"):
        found = [fmean(row[name] for row in rows[-LAST:]) for rows in online]
        yield f"rlhf.last.{name}", over_seeds(found)
    looks = [[row for row in rows if row.get("probe_step") is not None] for rows in online]
    for name in ("closeness", "mp_helpfulness", "mp_safety") if all(looks) else ():
        probes = {judge: f"probe_{judge}_{name}" for judge in JUDGES}
        gained = {
            judge: [rows[-1][key] - rows[0][key] for rows in looks] for judge, key in probes.items()
        }
        for judge, found in gained.items():
            yield f"rlhf.online.{judge}.{name}", over_seeds(found)
        ahead = minus(gained["optimization"], gained["generalization"])
        yield f"rlhf.online.reward_models_ahead.{name}", over_seeds(ahead)


def _rewind_estimates(rewinds: Sequence[Json]) -> Named:
    keys = ("coverage", "refusals", *(f"range.{name}" for name in ATTRIBUTES))
    for pool in POOLS if rewinds else ():
        for key in keys:
            yield f"rewind.{pool}.{key}", _of_seeds(rewinds, f"rewind.pools.{pool}.{key}")
        present = [one["rewind"]["pools"][pool]["present"] for one in rewinds]
        yield f"rewind.{pool}.present", over_seeds(present)
    for name in ("lost", "regained", "beyond_base", "beyond_tuned_base") if rewinds else ():
        yield f"rewind.{name}", _of_seeds(rewinds, f"rewind.{name}")


def _of_seeds(found: Sequence[Json], path: str) -> Estimate:
    """Return the mean over seeds; of a single one its own interval, which is over prompts."""
    if len(found) > 1:
        return over(found, path)
    value, low, high, n = (_at(found[0], path, end) for end in ("value", "low", "high", "n"))
    return Estimate(value, low, high, int(n))


def cost(seeds: Sequence[Json]) -> dict[str, Any]:
    """Return what answers and tuning took per method, and the minutes of the stages before."""
    minutes = [one["upstream"]["minutes"] for one in seeds]
    shared = [stage for stage in POOL if all(stage in one for one in minutes)]
    return {
        "methods": {
            name: _over_keys([_costs(one, name) for one in seeds]) for name in seeds[0]["methods"]
        },
        "minutes_of_stages": _over_keys([{key: one[key] for key in shared} for one in minutes]),
    }


def _costs(one: Json, name: str) -> dict[str, float]:
    """Return what a method cost on one seed."""
    method, budget = one["methods"][name], one["methods"][REFERENCE]["cost"]["tuning_tokens"]
    found, tokens = method["cost"], method["cost"].get("tuning_tokens")
    answering = {
        "tokens_per_answer": per_answer(one, name),
        "milliseconds_per_answer": 1000 * found["seconds"] / method["answers"],
    }
    if tokens is None:
        return answering
    return {
        **answering,
        "tuning_steps": found["steps"],
        "tuning_million_tokens": tokens / 1e6,
        "tuning_tokens_over_exmate": tokens / budget,
        "tuning_minutes": found["tuning_seconds"] / 60,
    }


def _over_keys(rows: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    """Return the estimate over seeds of each key."""
    return {key: plain_estimate(over_seeds([row[key] for row in rows])) for key in rows[0]}


def ablation_table(ablations: Sequence[Json]) -> dict[str, list[dict[str, Any]]]:
    """Return per group its points: overall control, and its paired difference to the default."""
    overall = "generalization.overall"
    default = [_at(one["reference"], overall) for one in ablations]
    table: dict[str, list[dict[str, Any]]] = {}
    for group, points in ablations[0]["groups"].items() if ablations else ():
        first = {"point": "default", "overall": plain_estimate(over_seeds(default))}
        table[group] = [{**first, "difference": None}]
        for point in points:
            runs = [one["groups"][group][point] for one in ablations]
            found = [_at(run, overall) for run in runs]
            if group == "prompts":
                # Named by the prompts drawn, of which some are dev prompts.
                point = f"prompts {runs[0]['upstream']['n']['training prompts']}"
            table[group].append(
                {
                    "point": point,
                    "overall": plain_estimate(over_seeds(found)),
                    "difference": plain_estimate(over_seeds(minus(found, default))),
                    "mp": {
                        name: plain_estimate(over(runs, f"generalization.mp.{name}"))
                        for name in ATTRIBUTES
                    },
                    "examples": [run["upstream"]["moec"]["n_kept"] for run in runs],
                }
            )
    return table
