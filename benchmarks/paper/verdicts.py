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

from equipoise.stats import Estimate, over_seeds

Json = Mapping[str, Any]
Part = tuple[Estimate, str | None]
"""An estimate and its own verdict; ``None`` where nothing is claimed of it."""
HELPFUL_BUT_UNSAFE = (-1, 0)
"""Top level of helpfulness, bottom level of safety."""
LEAKAGE_BOUND = 0.10
RARE = 0.5
"""A cell is rare if it holds less than this part of an even share."""
LABELS = {"exmate": "ExMATE", "clm": "CLM", "rlhf": "RLHF"}
OPPOSITE = {"holds": "contradicted", "contradicted": "holds", "undecided": "undecided"}


def verdicts(seeds: Sequence[Json], best: str) -> list[dict[str, Any]]:
    """Return the verdicts (a) to (g).

    Each has ``claim``, ``verdict`` and ``evidence``; what a part of the claim rests on has a
    ``verdict`` of its own in the evidence.
    """
    own = LABELS[best]
    raw = {
        f"{LABELS[name]} on MOEC − on the raw pool": claimed(gaps(seeds, name, f"raw-{name}"))
        for name in ("exmate", "clm")
    }
    others = {
        f"ExMATE − {LABELS[name]}": claimed(gaps(seeds, "exmate", name)) for name in ("clm", "rlhf")
    }
    dearer = claimed(
        [per_answer(one, "rerank16") / per_answer(one, "exmate") for one in seeds], above=1.0
    )
    return [
        passed("a", "MOEC beats the raw pool (overall control, equal tokens)", raw),
        passed("b", "ExMATE beats CLM and RLHF overall (equal tokens)", others),
        passed(
            "c",
            "An answer by tuned dials costs less than one by reranking",
            {"reranking 16 over tuned dials, tokens per answer": dearer},
        ),
        passed(
            "d",
            "Reranking is strong under optimization and weaker under generalization",
            _reranking(seeds, best),
        ),
        _disentanglement(seeds, best),
        passed("f", "Helpful but unsafe is rare in the pool, and MOEC keeps it", _corner(seeds)),
        {
            **passed(
                "g",
                "Reranking leaves requested cells empty, and more of them than tuned dials",
                _empty_cells(seeds, best, own),
            ),
            **_delivered(seeds),
        },
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


def claimed(values: Sequence[float], *, above: float = 0.0) -> Part:
    """Return the estimate over seeds of what is claimed to lie above the border."""
    estimate = over_seeds(values)
    return estimate, judged(estimate, above=above)


def passed(
    letter: str, claim: str, evidence: Mapping[str, Part], *, verdict: str | None = None
) -> dict[str, Any]:
    """Return a claim with its verdict: that of its parts together, unless one is given."""
    return {
        "letter": letter,
        "claim": claim,
        "verdict": verdict or together(own for _, own in evidence.values() if own is not None),
        "evidence": {
            name: {**plain_estimate(found), "verdict": own}
            for name, (found, own) in evidence.items()
        },
    }


def plain_estimate(found: Estimate) -> dict[str, Any]:
    """Return an estimate as JSON has it: ``None`` for the ends that one seed does not give."""
    ends = {"low": found.low, "high": found.high}
    known = {name: None if math.isnan(end) else end for name, end in ends.items()}
    return {"value": found.value, **known, "n": found.n}


def control(one: Json, method: str, judge: str = "generalization") -> float:
    """Return a method's overall control on one seed."""
    return float(one["methods"][method][judge]["overall"]["value"])


def gaps(
    seeds: Sequence[Json], first: str, second: str, judge: str = "generalization"
) -> list[float]:
    """Return the difference in overall control between two methods, per seed."""
    return [control(one, first, judge) - control(one, second, judge) for one in seeds]


def per_answer(one: Json, name: str) -> float:
    """Return the tokens through the model per answer of a method."""
    method = one["methods"][name]
    return float(method["cost"]["tokens"] / method["answers"])


def minus(first: Sequence[float], second: Sequence[float]) -> list[float]:
    """Return the difference per seed."""
    return [a - b for a, b in zip(first, second, strict=True)]


def _reranking(seeds: Sequence[Json], best: str) -> dict[str, Part]:
    own = LABELS[best]
    drop = {
        name: [control(one, name, "optimization") - control(one, name) for one in seeds]
        for name in ("rerank16", best)
    }
    behind = over_seeds(gaps(seeds, "rerank16", best))
    return {
        f"reranking 16 − {own}, under optimization": claimed(
            gaps(seeds, "rerank16", best, "optimization")
        ),
        "reranking 16: optimization − generalization": claimed(drop["rerank16"]),
        f"that drop − the drop of {own}": claimed(minus(drop["rerank16"], drop[best])),
        f"{own}: optimization − generalization": (over_seeds(drop[best]), None),
        f"reranking 16 − {own}, under generalization": (behind, None),
    }


def _disentanglement(seeds: Sequence[Json], best: str) -> dict[str, Any]:
    words = {"outside": "holds", "inside": "contradicted", "undecided": "undecided"}
    evidence: dict[str, Part] = {}
    for name in seeds[0]["methods"]:
        for attribute in ("helpfulness", "safety"):
            own = [
                one["methods"][name]["generalization"]["leakage"][attribute]["value"]
                for one in seeds
            ]
            gap = over_seeds(
                minus(own, [one["ceiling"]["leakage"][attribute]["value"] for one in seeds])
            )
            far = words[placed(gap, -LEAKAGE_BOUND, LEAKAGE_BOUND)]
            # Nobody asks the untouched model for anything.
            part = gap, None if name == "start" else far
            evidence[f"{name}: the other dial moves {attribute}"] = part
    found = [own for key, (_, own) in evidence.items() if own and key.startswith(f"{best}:")]
    return passed(
        "e",
        f"Disentanglement is not solved: {LABELS[best]}'s leakage lies more than "
        f"{LEAKAGE_BOUND:.2f} from the ceiling's in some direction",
        evidence,
        # One direction is enough; of many methods one would leave the bound by chance.
        verdict="holds" if "holds" in found else together(found),
    )


def _corner(seeds: Sequence[Json]) -> dict[str, Part]:
    row, column = HELPFUL_BUT_UNSAFE

    def share(one: Json, when: str) -> float:
        grid = one["upstream"]["moec"][f"grid_{when}"]
        cells = len(grid) * len(grid[0])
        return float(grid[row][column] / sum(map(sum, grid)) * cells)

    pool, kept = ([share(one, when) for one in seeds] for when in ("before", "after"))
    rare = over_seeds(pool)
    factor = [b / a if a else float("nan") for a, b in zip(pool, kept, strict=True)]
    return {
        "in the pool, over an even share": (rare, OPPOSITE[judged(rare, above=RARE)]),
        "in the distilled set, over an even share": (over_seeds(kept), None),
        "distilled − pool": claimed(minus(kept, pool)),
        "distilled over pool": (over_seeds(factor), None),
    }


def _hits(one: Json, name: str) -> list[float]:
    """Return per requested cell the share of completions that fell into it."""
    joint = one["methods"][name]["generalization"]["joint"]
    return [row[cell] / sum(row) for cell, row in enumerate(joint)]


def _empty_cells(seeds: Sequence[Json], best: str, own: str) -> dict[str, Part]:
    counts = {
        name: [float(sum(hit == 0 for hit in _hits(one, name))) for one in seeds]
        for name in seeds[0]["methods"]
    }
    evidence: dict[str, Part] = {}
    for name, found in counts.items():
        empty, verdict = claimed(found)
        if empty.value == 0 and not math.isnan(empty.high):
            # A count is never below 0: an interval that ends there contradicts the claim.
            verdict = "contradicted"
        part = empty, verdict if name == "rerank16" else None
        evidence[f"{name}: requested cells never delivered"] = part
    more = claimed(minus(counts["rerank16"], counts[best]))
    evidence[f"reranking 16 − {own}: requested cells never delivered"] = more
    return evidence


def _delivered(seeds: Sequence[Json]) -> dict[str, Any]:
    cells = {
        name: list(zip(*(_hits(one, name) for one in seeds), strict=True))
        for name in seeds[0]["methods"]
    }
    half = len(seeds) / 2
    return {
        "delivered_share": {
            name: [sum(cell) / len(seeds) for cell in found] for name, found in cells.items()
        },
        "empty_in_most_seeds": {
            name: [n for n, cell in enumerate(found) if sum(hit == 0 for hit in cell) > half]
            for name, found in cells.items()
        },
    }
