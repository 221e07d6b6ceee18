"""The paper's claims, each with a verdict that an interval over seeds has passed on it.

A claim *holds* if the 95 % interval of the paired difference lies on its side of the border, is
*contradicted* if it lies on the other side, and is *undecided* if the border is inside. Nothing is
decided by a mean alone, and with one seed nothing is decided at all. Each number that a verdict
rests on carries its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from equipoise.stats import over_seeds
from equipoise.types import Estimate

Json = Mapping[str, Any]
HELPFUL_BUT_UNSAFE = (-1, 0)
"""Top level of helpfulness, bottom level of safety."""
LEAKAGE_BOUND = 0.10
RARE = 0.5
"""A cell is rare if it holds less than this part of an even share."""
LABELS = {"exmate": "ExMATE", "clm": "CLM", "rlhf": "RLHF"}
Evidence = dict[str, tuple[Estimate, str | None]]
"""Name to an estimate and its own verdict; ``None`` where nothing is claimed of it."""


def verdicts(seeds: Sequence[Json], best: str) -> list[dict[str, Any]]:
    """Return the verdicts (a) to (g).

    Each has ``claim``, ``verdict`` and ``evidence``; what a part of the claim rests on has a
    ``verdict`` of its own in the evidence.
    """
    return [
        _moec(seeds),
        _exmate(seeds),
        _cost(seeds),
        _reranking(seeds, best),
        _disentanglement(seeds, best),
        _rare_corner(seeds),
        _empty_cells(seeds, best),
    ]


def judged(estimate: Estimate, *, above: float = 0.0) -> str:
    """Return whether "the quantity is above the border" holds, is contradicted or is undecided."""
    if math.isnan(estimate.low) or math.isnan(estimate.high):
        return "undecided"
    if estimate.low > above:
        return "holds"
    return "contradicted" if estimate.high < above else "undecided"


def together(found: Iterable[str]) -> str:
    """Return one verdict for a claim of several parts: it holds only if all of them do."""
    parts = set(found)
    if "undecided" in parts:
        return "undecided"
    return parts.pop() if len(parts) == 1 else "holds in part"


def placed(estimate: Estimate, lowest: float, highest: float) -> str:
    """Return whether the interval is ``inside`` the bounds, ``outside``, or ``undecided``."""
    if lowest <= estimate.low and estimate.high <= highest:
        return "inside"
    return "outside" if estimate.high < lowest or highest < estimate.low else "undecided"


def paired(
    seeds: Sequence[Json], first: str, second: str, judge: str = "generalization"
) -> Estimate:
    """Return the difference in overall control between two methods, paired by seed."""
    return over_seeds(
        [
            one["methods"][first][judge]["overall"]["value"]
            - one["methods"][second][judge]["overall"]["value"]
            for one in seeds
        ]
    )


def _moec(seeds: Sequence[Json]) -> dict[str, Any]:
    found = {
        f"{LABELS[name]} on MOEC − on the raw pool": paired(seeds, name, f"raw-{name}")
        for name in ("exmate", "clm")
    }
    return _verdict(
        "a",
        "MOEC beats the raw pool (overall control, equal tokens)",
        {name: (estimate, judged(estimate)) for name, estimate in found.items()},
    )


def _exmate(seeds: Sequence[Json]) -> dict[str, Any]:
    found = {f"ExMATE − {LABELS[name]}": paired(seeds, "exmate", name) for name in ("clm", "rlhf")}
    return _verdict(
        "b",
        "ExMATE beats CLM and RLHF overall (equal tokens)",
        {name: (estimate, judged(estimate)) for name, estimate in found.items()},
    )


def _cost(seeds: Sequence[Json]) -> dict[str, Any]:
    def per_answer(one: Json, name: str) -> float:
        method = one["methods"][name]
        return float(method["cost"]["tokens"] / method["answers"])

    ratio = over_seeds([per_answer(one, "rerank16") / per_answer(one, "exmate") for one in seeds])
    return _verdict(
        "c",
        "An answer by tuned dials costs less than one by reranking",
        {"reranking 16 over tuned dials, tokens per answer": (ratio, judged(ratio, above=1.0))},
    )


def _reranking(seeds: Sequence[Json], best: str) -> dict[str, Any]:
    def drop(name: str) -> list[float]:
        return [
            one["methods"][name]["optimization"]["overall"]["value"]
            - one["methods"][name]["generalization"]["overall"]["value"]
            for one in seeds
        ]

    mine, theirs = drop("rerank16"), drop(best)
    lead = paired(seeds, "rerank16", best, "optimization")
    dropped = over_seeds(mine)
    more = over_seeds([a - b for a, b in zip(mine, theirs, strict=True)])
    return _verdict(
        "d",
        "Reranking is strong under optimization and weaker under generalization",
        {
            f"reranking 16 − {LABELS[best]}, under optimization": (lead, judged(lead)),
            "reranking 16: optimization − generalization": (dropped, judged(dropped)),
            f"that drop − the drop of {LABELS[best]}": (more, judged(more)),
            f"{LABELS[best]}: optimization − generalization": (over_seeds(theirs), None),
            f"reranking 16 − {LABELS[best]}, under generalization": (
                paired(seeds, "rerank16", best),
                None,
            ),
        },
    )


def _disentanglement(seeds: Sequence[Json], best: str) -> dict[str, Any]:
    said = {"outside": "holds", "inside": "contradicted", "undecided": "undecided"}
    evidence: Evidence = {}
    own = []
    for name in seeds[0]["methods"]:
        for attribute in ("helpfulness", "safety"):
            gap = over_seeds(
                [
                    one["methods"][name]["generalization"]["leakage"][attribute]["value"]
                    - one["ceiling"]["leakage"][attribute]["value"]
                    for one in seeds
                ]
            )
            far = said[placed(gap, -LEAKAGE_BOUND, LEAKAGE_BOUND)]
            # Nobody asks the untouched model for anything.
            evidence[f"{name}: the other dial moves {attribute}"] = (
                gap,
                None if name == "start" else far,
            )
            if name == best:
                own.append(far)
    return _verdict(
        "e",
        f"Disentanglement is not solved: {LABELS[best]}'s leakage lies more than "
        f"{LEAKAGE_BOUND:.2f} from the ceiling's in some direction",
        evidence,
        # One direction is enough; of many methods one would leave the bound by chance.
        verdict="holds" if "holds" in own else together(own),
    )


def _rare_corner(seeds: Sequence[Json]) -> dict[str, Any]:
    pool, kept, factor = [], [], []
    row, column = HELPFUL_BUT_UNSAFE
    for one in seeds:
        before, after = (one["upstream"]["moec"][f"grid_{when}"] for when in ("before", "after"))
        cells = len(before) * len(before[0])
        shares = [grid[row][column] / sum(map(sum, grid)) * cells for grid in (before, after)]
        pool.append(shares[0])
        kept.append(shares[1])
        factor.append(shares[1] / shares[0] if shares[0] else float("nan"))
    rare, more = over_seeds(pool), over_seeds([b - a for a, b in zip(pool, kept, strict=True)])
    below = Estimate(-rare.value, -rare.high, -rare.low, rare.n)
    return _verdict(
        "f",
        "Helpful but unsafe is rare in the pool, and MOEC keeps it",
        {
            "in the pool, over an even share": (rare, judged(below, above=-RARE)),
            "in the distilled set, over an even share": (over_seeds(kept), None),
            "distilled − pool": (more, judged(more)),
            "distilled over pool": (over_seeds(factor), None),
        },
    )


def _empty_cells(seeds: Sequence[Json], best: str) -> dict[str, Any]:
    evidence: Evidence = {}
    counts: dict[str, list[float]] = {}
    maps, mostly = {}, {}
    for name in seeds[0]["methods"]:
        hits = [_hits(one["methods"][name]["generalization"]["joint"]) for one in seeds]
        counts[name] = [float(sum(hit == 0 for hit in row)) for row in hits]
        empty = over_seeds(counts[name])
        verdict = judged(empty)
        if empty.value == 0 and not math.isnan(empty.high):
            # A count is never below 0: an interval that ends there contradicts the claim.
            verdict = "contradicted"
        evidence[f"{name}: requested cells never delivered"] = (
            empty,
            verdict if name == "rerank16" else None,
        )
        maps[name] = [sum(column) / len(hits) for column in zip(*hits, strict=True)]
        mostly[name] = [
            cell for cell, column in enumerate(zip(*hits, strict=True))
            if sum(hit == 0 for hit in column) > len(hits) / 2
        ]  # fmt: skip
    more = over_seeds([a - b for a, b in zip(counts["rerank16"], counts[best], strict=True)])
    evidence[f"reranking 16 − {LABELS[best]}: requested cells never delivered"] = (
        more,
        judged(more),
    )
    claim = "Reranking leaves requested cells empty, and more of them than tuned dials"
    found = _verdict("g", claim, evidence)
    return {**found, "delivered_share": maps, "empty_in_most_seeds": mostly}


def _hits(joint: Sequence[Sequence[float]]) -> list[float]:
    """Return per requested cell the share of completions that fell into it."""
    return [row[cell] / sum(row) for cell, row in enumerate(joint)]


def plain_estimate(found: Estimate) -> dict[str, Any]:
    """Return an estimate as JSON has it: ``None`` for the ends that one seed does not give."""
    ends = {"low": found.low, "high": found.high}
    return {
        "value": found.value,
        **{name: None if math.isnan(end) else end for name, end in ends.items()},
        "n": found.n,
    }


def _verdict(
    letter: str, claim: str, evidence: Evidence, *, verdict: str | None = None
) -> dict[str, Any]:
    parts = [part for _, part in evidence.values() if part is not None]
    return {
        "letter": letter,
        "claim": claim,
        "verdict": verdict or together(parts),
        "evidence": {
            name: {**plain_estimate(found), "verdict": part}
            for name, (found, part) in evidence.items()
        },
    }
