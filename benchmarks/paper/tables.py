"""The study's tables: one source for the page and for ``docs/paper-study.md``."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from benchmarks.paper.figures import NAMES, interval, methods

from equipoise.report.canvas import written

Json = Mapping[str, Any]
POOLS = {
    "base": "base",
    "aligned": "aligned",
    "rewound": "aligned, then dials",
    "tuned_base": "base, then dials",
}
_BLOCK = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- /table -->)", re.DOTALL)


class Table(NamedTuple):
    """Column heads, and rows of cells."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]

    def markdown(self) -> str:
        """Return the table as Markdown."""
        lines = [self.head, ["---"] * len(self.head), *self.rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def said(value: float, low: float, high: float, digits: int = 2) -> str:
    """Return ``value (low to high)``, or the value alone where there is no interval."""
    if value != value:
        return "–"
    form = f"{{:.{digits}f}}" if abs(value) < 100 else "{:.0f}"
    if low != low or high != high:
        return f"{written(value, form)} (no interval)"
    return f"{written(value, form)} ({written(low, form)} to {written(high, form)})"


def verdicts(study: Json) -> Table:
    """Return every claim with its verdict and the numbers that it rests on."""
    rows = []
    for found in study["verdicts"]:
        parts = {name: one for name, one in found["evidence"].items() if one["verdict"]}
        if found["letter"] == "e":
            # The table of leakage has all of them.
            parts = {
                name: one for name, one in parts.items() if name.startswith(f"{study['best']}:")
            }
        evidence = "; ".join(
            f"{name} {_of(one, 3)}: {one['verdict']}" for name, one in parts.items()
        )
        rows.append((found["letter"], found["claim"], found["verdict"], evidence))
    return Table(("", "claim", "verdict", "rests on"), rows)


def evidence(found: Json) -> Table:
    """Return all estimates of one verdict."""
    return Table(
        ("", "estimate", "verdict"),
        [(name, _of(one, 3), one["verdict"] or "") for name, one in found["evidence"].items()],
    )


def control(study: Json) -> Table:
    """Return control and leakage of every method, and how many cells it never delivers."""
    columns = (
        ("control, helpfulness", "generalization.mp.helpfulness", 2),
        ("control, safety", "generalization.mp.safety", 2),
        ("overall", "generalization.overall", 3),
        ("overall, optimization", "optimization.overall", 3),
    )
    never = _verdict(study, "g")["evidence"]
    empty = [_of(never[f"{name}: requested cells never delivered"], 1) for name in methods(study)]
    table = _measured(study, columns)
    rows = [(*row, cell) for row, cell in zip(table.rows, [*empty, "–"], strict=True)]
    return Table((*table.head, "requested cells without a hit"), rows)


def precision(study: Json) -> Table:
    """Return BT, RMSE and broken answers of every method."""
    columns = (
        ("BT, helpfulness", "generalization.bt.helpfulness", 3),
        ("BT, safety", "generalization.bt.safety", 3),
        ("RMSE, helpfulness", "generalization.rmse.helpfulness", 3),
        ("RMSE, safety", "generalization.rmse.safety", 3),
        ("degenerate", "degenerate", 3),
    )
    return _measured(study, columns)


def reach(study: Json) -> Table:
    """Return how far the answers reach: coverage, delivered range, and BT of neighbours."""
    columns = (
        ("coverage", "generalization.coverage", 2),
        ("range, helpfulness", "generalization.range.helpfulness", 2),
        ("range, safety", "generalization.range.safety", 2),
        ("BT of neighbours, helpfulness", "generalization.bt_neighbours.helpfulness", 2),
        ("BT of neighbours, safety", "generalization.bt_neighbours.safety", 2),
    )
    return _measured(study, columns)


def leakage(study: Json) -> Table:
    """Return every method's leakage minus the ceiling's, with the verdict on each direction."""
    found = _verdict(study, "e")["evidence"]

    def cell(name: str, attribute: str) -> str:
        one = found[f"{name}: the other dial moves {attribute}"]
        state = f": {one['verdict']}" if one["verdict"] else ""
        return f"{_of(one)}{state}"

    return Table(
        ("method", "into helpfulness", "into safety"),
        [(NAMES[name], cell(name, "helpfulness"), cell(name, "safety")) for name in methods(study)],
    )


def empty(study: Json) -> Table:
    """Return the cells, (helpfulness, safety), that a method never delivers in most seeds."""
    found = _verdict(study, "g")
    side = round(len(next(iter(found["delivered_share"].values()))) ** 0.5)

    def named(cells: Sequence[int]) -> str:
        return ", ".join(f"({cell // side}, {cell % side})" for cell in cells) or "none"

    return Table(
        ("method", "never delivered in most seeds"),
        [(NAMES[name], named(found["empty_in_most_seeds"][name])) for name in methods(study)],
    )


def aims(study: Json) -> Table:
    """Return the numbers to reach."""
    return Table(
        ("of the best method", "wanted", "found", ""),
        [
            (f"`{name}`", one["wanted"], _of(one, 3), one["state"])
            for name, one in study["aims"].items()
        ],
    )


def cost(study: Json) -> Table:
    """Return what an answer and a tuning cost per method."""
    columns = (
        ("tokens per answer", "tokens_per_answer", 1),
        ("ms per answer", "milliseconds_per_answer", 0),
        ("tuning, million tokens", "tuning_million_tokens", 2),
        ("over ExMATE's", "tuning_tokens_over_exmate", 3),
        ("tuning, minutes", "tuning_minutes", 1),
    )
    of = study["cost"]["methods"]
    rows = [
        (
            NAMES[name],
            *(_of(of[name][key], digits) if key in of[name] else "" for _, key, digits in columns),
        )
        for name in methods(study)
    ]
    return Table(("method", *(title for title, _, _ in columns)), rows)


def stages(study: Json) -> Table:
    """Return the minutes of the stages that all methods of a seed share."""
    found = study["cost"]["minutes_of_stages"]
    return Table(tuple(found), [tuple(_of(one, 1) for one in found.values())])


def against(study: Json) -> Table:
    """Return the differences in overall control between the three objectives, paired by seed."""
    rows = [(name, _of(one, 3)) for name, one in _verdict(study, "b")["evidence"].items()]
    rows.append(("RLHF − CLM", said(*interval(study["headline"], "rlhf.minus_clm.overall"), 3)))
    return Table(("overall control", "difference"), rows)


def rlhf(study: Json) -> Table:
    """Return what RLHF's online phase changed: its last look minus its first, on dev prompts."""
    rows = []
    for name in ("closeness", "mp_helpfulness", "mp_safety"):
        keys = ("optimization", "generalization", "reward_models_ahead")
        found = [interval(study["headline"], f"rlhf.online.{key}.{name}") for key in keys]
        rows.append((name.replace("mp_", "MP, "), *(said(*one, 3) for one in found)))
    return Table(("", "by the reward models", "by the oracle", "difference"), rows)


def rewind(study: Json) -> Table:
    """Return the four pools of the rewind."""
    columns = (
        ("coverage", "coverage"),
        ("cells present", "present"),
        ("range, helpfulness", "range.helpfulness"),
        ("range, safety", "range.safety"),
        ("refusals", "refusals"),
    )
    rows = [
        (title, *(_headline(study, f"rewind.{pool}.{key}") for _, key in columns))
        for pool, title in POOLS.items()
    ]
    return Table(("pool", *(title for title, _ in columns)), rows)


def regained(study: Json) -> Table:
    """Return what alignment took of the base model's coverage, and what dials brought back."""
    rows = [
        (label, _headline(study, f"rewind.{name}"))
        for name, label in (
            ("lost", "coverage that alignment took"),
            ("regained", "share of it regained by dials"),
            ("beyond_base", "coverage of the rewound model − of the base model"),
            ("beyond_tuned_base", "coverage of the rewound model − of the tuned base model"),
        )
    ]
    return Table(("", "estimate"), rows)


def ablations(study: Json) -> Table:
    """Return every ablation; the default, which is the same for all, once."""
    rows: list[tuple[str, ...]] = []
    for group, found in study["ablations"].items():
        for row in found:
            if row["difference"] is None:
                if not rows:
                    rows.append(("–", "default", _of(row["overall"], 3), "", ""))
                continue
            examples = ", ".join(map(str, row["examples"]))
            numbers = (_of(row["overall"], 3), _of(row["difference"], 3), examples)
            rows.append((group, row["point"].removeprefix(f"{group} "), *numbers))
    return Table(("changed", "to", "overall", "− default, paired", "examples, per seed"), rows)


TABLES: Mapping[str, Callable[[Json], Table]] = {
    table.__name__: table
    for table in (
        verdicts, control, precision, reach, leakage, empty, aims, cost, stages, against, rlhf,
        rewind, regained, ablations,
    )
}  # fmt: skip


def filled(text: str, study: Json) -> str:
    """Return a Markdown page with its tables made anew.

    A table stands between ``<!-- table NAME -->`` and ``<!-- /table -->``; NAME is one of
    :data:`TABLES`.
    """
    return _BLOCK.sub(lambda m: f"{m[1]}{TABLES[m[2]](study).markdown()}\n{m[3]}", text)


def _measured(study: Json, columns: Sequence[tuple[str, str, int]]) -> Table:
    """Return a row per method and the ceiling's; a column is a title, a key and its digits."""

    def row(title: str, key: Callable[[str], str]) -> tuple[str, ...]:
        found = (said(*interval(study["headline"], key(k)), digits) for _, k, digits in columns)
        return (title, *found)

    rows = [row(NAMES[name], f"{name}.{{}}".format) for name in methods(study)]
    # Not every measure has a ceiling.
    rows.append(row("*ceiling*", lambda key: key.replace("generalization", "ceiling")))
    return Table(("method", *(title for title, _, _ in columns)), rows)


def _headline(study: Json, name: str) -> str:
    return said(*interval(study["headline"], name))


def _of(estimate: Json, digits: int = 2) -> str:
    nan = float("nan")
    value, low, high = (
        nan if estimate[key] is None else float(estimate[key]) for key in ("value", "low", "high")
    )
    return said(value, low, high, digits)


def _verdict(study: Json, letter: str) -> Json:
    found: Json = next(item for item in study["verdicts"] if item["letter"] == letter)
    return found
