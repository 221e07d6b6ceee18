"""The tables of ``docs/smollm2.md``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from statistics import fmean

from benchmarks.tables import PERCENT, Column, Json, Table, both, methods, table

from equipoise.report.canvas import written

GROUPS = {
    "unsafe (xstest)": "unsafe, XSTest",
    "unsafe (harmbench_standard)": "unsafe, HarmBench",
    "safe (xstest)": "safe but alarming, XSTest",
    "safe (toxicchat)": "safe, ToxicChat",
}


def control(judge: str, result: Json) -> Table:
    """Return control and leakage of every method by one kind of judges."""
    found = table(
        result,
        "method",
        methods(result),
        *both("control,", f"{{}}.{judge}.mp"),
        *both("BT,", f"{{}}.{judge}.bt"),
        *both("leakage into", f"{{}}.{judge}.leakage"),
    )
    bounds = [written(result["headline"][f"bound.{a}"]) for a in ("helpfulness", "safety")]
    bound = [("*agreement*", *bounds, "", "", "", "")] if judge == "generalization" else []
    return Table(found.head, [*found.rows, *bound])


def models(result: Json) -> Table:
    """Return how good reward models and judges are on held-out rows."""
    kinds = {"model": "model", "length_only": "length only", "bag_of_words": "bag of words"}
    columns = [Column(title, f"reward_models.{{}}.{kind}") for kind, title in kinds.items()]
    found = table(result, "model", {name: name for name in result["reward_models"]}, *columns)
    rows = [
        (name, str(held["model"]["n"]), held["metric"], *cells)
        for held, (name, *cells) in zip(result["reward_models"].values(), found.rows, strict=True)
    ]
    return Table(("model", "held-out rows", "measure", *kinds.values()), rows)


def refusals(result: Json) -> Table:
    """Return the share refused at every level of safety."""
    best, start = (result["refusals"][name] for name in ("best", "start"))
    rows = [
        (
            title,
            str(best[group][0]["n"]),
            written(fmean(level["value"] for level in start[group])),
            ", ".join(written(level["value"]) for level in best[group]),
        )
        for group, title in GROUPS.items()
    ]
    return Table(("", "n", "untouched model, mean", "dials, least to most safe"), rows)


def minutes(result: Json) -> Table:
    """Return the planned and spent minutes of the recipe's stages."""
    found = result["minutes"]["best"]
    planned = found["planned"] or {}
    rows = [
        (stage, f"{planned[stage]:.1f}" if stage in planned else "–", f"{spent:.1f}")
        for stage, spent in found["spent"].items()
        if spent > 0
    ]
    return Table(("stage", "planned", "spent"), rows)


def costs(result: Json) -> Table:
    """Return what every tuning cost."""
    rows = []
    for key, name in methods(result).items():
        if key in result["tuning"]:
            cost = result["tuning"][key]["cost"]
            tokens = f"{cost['tuning_tokens'] / 1000:,.0f}"
            took = (cost["tuning_seconds"] / 60, result["minutes"][key]["spent"]["evaluate"])
            rows.append((name, tokens, *(f"{minutes:.1f}" for minutes in took)))
    head = ("method", "thousand tokens of tuning", "minutes", "minutes of evaluation")
    return Table(head, rows)


TABLES: Mapping[str, Callable[[Json], Table]] = {
    "optimization": partial(control, "optimization"),
    "generalization": partial(control, "generalization"),
    "fluency": lambda result: table(
        result,
        "method",
        methods(result),
        Column("below the untouched model's own, mean", "{}.fluency_drop.mean"),
        Column("worst corner", "{}.fluency_drop.worst_corner"),
        Column("degenerate", "{}.degenerate", PERCENT),
    ),
    **{made.__name__: made for made in (models, refusals, minutes, costs)},
}
