"""The tables of ``docs/paper-study.md``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from benchmarks.tables import Column, Json, Table, both, methods, said, table

CEILING = {"ceiling": "*ceiling*"}
POOLS = {
    "base": "base",
    "aligned": "aligned",
    "rewound": "aligned, then dials",
    "tuned_base": "base, then dials",
}
ONLINE = {
    name: name.replace("mp_", "MP, ") for name in ("closeness", "mp_helpfulness", "mp_safety")
}
REGAINED = {
    "lost": "coverage that alignment took",
    "regained": "share of it regained by dials",
    "beyond_base": "coverage of the rewound model − of the base model",
    "beyond_tuned_base": "coverage of the rewound model − of the tuned base model",
}


def of_methods(study: Json, *columns: Column) -> Table:
    """Return a row per method, and the ceiling, which has the unseen judges' measures only."""
    own = table(study, "method", methods(study), *columns)
    ceiling = [column._replace(key=column.key.replace("generalization.", "")) for column in columns]
    (last,) = table(study, "", CEILING, *ceiling).rows
    return Table(own.head, [*own.rows, [cell or "–" for cell in last]])


def _verdict(study: Json, letter: str) -> Json:
    found: Json = next(item for item in study["verdicts"] if item["letter"] == letter)
    return found


def verdicts(study: Json) -> Table:
    """Return every claim with its verdict and the numbers that it rests on."""
    rows = []
    for found in study["verdicts"]:
        # Of (e) the table of leakage has all parts.
        only = f"{study['best']}:" if found["letter"] == "e" else ""
        parts = (
            f"{name} {said(one, 3)}: {one['verdict']}"
            for name, one in found["evidence"].items()
            if one["verdict"] and name.startswith(only)
        )
        rows.append((found["letter"], found["claim"], found["verdict"], "; ".join(parts)))
    return Table(("", "claim", "verdict", "rests on"), rows)


def control(study: Json) -> Table:
    """Return control of every method, and how many cells it never delivers."""
    found = of_methods(
        study,
        *both("control,", "{}.generalization.mp"),
        Column("overall", "{}.generalization.overall", 3),
        Column("overall, optimization", "{}.optimization.overall", 3),
    )
    never = _verdict(study, "g")["evidence"]
    keys = (f"{name}: requested cells never delivered" for name in methods(study))
    empty = [*(said(never[key], 1) for key in keys), "–"]
    rows = [(*row, cell) for row, cell in zip(found.rows, empty, strict=True)]
    return Table((*found.head, "requested cells without a hit"), rows)


def leakage(study: Json) -> Table:
    """Return every method's leakage minus the ceiling's, with the verdict on each direction."""
    found = _verdict(study, "e")["evidence"]

    def cell(name: str, attribute: str) -> str:
        one = found[f"{name}: the other dial moves {attribute}"]
        return said(one) + (f": {one['verdict']}" if one["verdict"] else "")

    rows = [
        (name, cell(key, "helpfulness"), cell(key, "safety"))
        for key, name in methods(study).items()
    ]
    return Table(("method", "into helpfulness", "into safety"), rows)


def empty(study: Json) -> Table:
    """Return the cells, (helpfulness, safety), that a method never delivers in most seeds."""
    found = _verdict(study, "g")
    side = round(len(next(iter(found["delivered_share"].values()))) ** 0.5)

    def named(cells: Sequence[int]) -> str:
        return ", ".join(f"({cell // side}, {cell % side})" for cell in cells) or "none"

    cells = found["empty_in_most_seeds"]
    rows = [(name, named(cells[key])) for key, name in methods(study).items()]
    return Table(("method", "never delivered in most seeds"), rows)


def aims(study: Json) -> Table:
    """Return the numbers to reach."""
    rows = [
        (f"`{name}`", one["wanted"], said(one, 3), one["state"])
        for name, one in study["aims"].items()
    ]
    return Table(("of the best method", "wanted", "found", ""), rows)


def stages(study: Json) -> Table:
    """Return the minutes of the stages that all methods of a seed share."""
    found = study["cost"]["minutes_of_stages"]
    return Table(tuple(found), [tuple(said(one, 1) for one in found.values())])


def against(study: Json) -> Table:
    """Return the differences in overall control between the three objectives, paired by seed."""
    rows = [(name, said(one, 3)) for name, one in _verdict(study, "b")["evidence"].items()]
    clm = {"rlhf.minus_clm.overall": "RLHF − CLM"}
    found = table(study, "overall control", clm, Column("difference", "{}", 3))
    return Table(found.head, [*rows, *found.rows])


def ablations(study: Json) -> Table:
    """Return every ablation; the default, which is the same for all, once."""
    rows: list[tuple[str, ...]] = []
    for group, found in study["ablations"].items():
        for row in found:
            if row["difference"] is not None:
                name = row["point"].removeprefix(f"{group} ")
                numbers = (said(row["overall"], 3), said(row["difference"], 3))
                rows.append((group, name, *numbers, ", ".join(map(str, row["examples"]))))
            elif not rows:
                rows.append(("–", "default", said(row["overall"], 3), "", ""))
    return Table(("changed", "to", "overall", "− default, paired", "examples, per seed"), rows)


COST = "cost.methods.{}"
TABLES: Mapping[str, Callable[[Json], Table]] = {
    **{made.__name__: made for made in (verdicts, control, leakage, empty, aims, stages, against)},
    "precision": lambda study: of_methods(
        study,
        *both("BT,", "{}.generalization.bt", 3),
        *both("RMSE,", "{}.generalization.rmse", 3),
        Column("degenerate", "{}.degenerate", 3),
    ),
    "reach": lambda study: of_methods(
        study,
        Column("coverage", "{}.generalization.coverage"),
        *both("range,", "{}.generalization.range"),
        *both("BT of neighbours,", "{}.generalization.bt_neighbours"),
    ),
    "cost": lambda study: table(
        study,
        "method",
        methods(study),
        Column("tokens per answer", f"{COST}.tokens_per_answer", 1),
        Column("ms per answer", f"{COST}.milliseconds_per_answer", 0),
        Column("tuning, million tokens", f"{COST}.tuning_million_tokens"),
        Column("over ExMATE's", f"{COST}.tuning_tokens_over_exmate", 3),
        Column("tuning, minutes", f"{COST}.tuning_minutes", 1),
    ),
    "rlhf": lambda study: table(
        study,
        "",
        ONLINE,
        Column("by the reward models", "rlhf.online.optimization.{}", 3),
        Column("by the oracle", "rlhf.online.generalization.{}", 3),
        Column("difference", "rlhf.online.reward_models_ahead.{}", 3),
    ),
    "rewind": lambda study: table(
        study,
        "pool",
        POOLS,
        Column("coverage", "rewind.{}.coverage"),
        Column("cells present", "rewind.{}.present"),
        *both("range,", "rewind.{}.range"),
        Column("refusals", "rewind.{}.refusals"),
    ),
    "regained": lambda study: table(study, "", REGAINED, Column("estimate", "rewind.{}")),
    "ablations": ablations,
}
