"""The paper's claims, each with a verdict that an interval over seeds has passed on it.

A claim *holds* if the 95 % interval of the paired difference lies on its side of the border, is
*contradicted* if it lies on the other side, and is *undecided* if the border is inside. Nothing is
decided by a mean alone, and with one seed nothing is decided at all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from equipoise.evaluate.intervals import over_seeds
from equipoise.types import Estimate

Json = Mapping[str, Any]
HELPFUL_BUT_UNSAFE = (-1, 0)
"""Top level of helpfulness, bottom level of safety."""
LEAKAGE_BOUND = 0.10
RARE = 0.5
"""A cell is rare if it holds less than this part of an even share."""


def verdicts(seeds: Sequence[Json], best: str) -> list[dict[str, Any]]:
    """Return the verdicts (a) to (g); each has ``claim``, ``verdict`` and ``evidence``."""
    return [
        _moec(seeds),
        _exmate(seeds),
        _cost(seeds),
        _reranking(seeds, best),
        _disentanglement(seeds),
        _rare_corner(seeds),
        _empty_cells(seeds),
    ]


def judged(estimate: Estimate, *, above: float = 0.0) -> str:
    """Return whether "the quantity is above the border" holds, is contradicted or is undecided."""
    if math.isnan(estimate.low) or math.isnan(estimate.high):
        return "undecided"
    if estimate.low > above:
        return "holds"
    return "contradicted" if estimate.high < above else "undecided"


def together(found: Sequence[str]) -> str:
    """Return one verdict for a claim of several parts: it holds only if all of them do."""
    if all(verdict == "holds" for verdict in found):
        return "holds"
    if all(verdict == "contradicted" for verdict in found):
        return "contradicted"
    return "undecided" if "undecided" in found else "holds in part"


def _moec(seeds: Sequence[Json]) -> dict[str, Any]:
    evidence = {
        f"{name} on MOEC − on the raw pool": _paired(seeds, name, f"raw-{name}")
        for name in ("exmate", "clm")
    }
    return _verdict(
        "a",
        "MOEC beats the raw pool (overall control, equal tokens)",
        together([judged(found) for found in evidence.values()]),
        evidence,
    )


def _exmate(seeds: Sequence[Json]) -> dict[str, Any]:
    evidence = {
        f"ExMATE − {label}": _paired(seeds, "exmate", name)
        for name, label in (("clm", "CLM"), ("rlhf", "RLHF"))
    }
    return _verdict(
        "b",
        "ExMATE beats CLM and RLHF overall (equal tokens)",
        together([judged(found) for found in evidence.values()]),
        evidence,
    )


def _cost(seeds: Sequence[Json]) -> dict[str, Any]:
    evidence: dict[str, Estimate] = {}
    for name in seeds[0]["methods"]:
        costs = [one["methods"][name]["cost"] for one in seeds]
        answers = [one["methods"][name]["answers"] for one in seeds]
        per = [cost["tokens"] / n for cost, n in zip(costs, answers, strict=True)]
        seconds = [1000 * cost["seconds"] / n for cost, n in zip(costs, answers, strict=True)]
        evidence[f"{name}: tokens per answer"] = over_seeds(per)
        evidence[f"{name}: milliseconds per answer"] = over_seeds(seconds)
        if "tuning_tokens" in costs[0]:
            evidence[f"{name}: tuning, million tokens"] = over_seeds(
                [cost["tuning_tokens"] / 1e6 for cost in costs]
            )
            evidence[f"{name}: tuning, minutes"] = over_seeds(
                [cost["tuning_seconds"] / 60 for cost in costs]
            )
    ratios = [
        one["methods"]["rerank16"]["cost"]["tokens"]
        / one["methods"]["rerank16"]["answers"]
        / (one["methods"]["exmate"]["cost"]["tokens"] / one["methods"]["exmate"]["answers"])
        for one in seeds
    ]
    evidence["reranking 16 over tuned dials, tokens per answer"] = over_seeds(ratios)
    return _verdict(
        "c",
        "An answer by tuned dials costs less than one by reranking",
        judged(over_seeds(ratios), above=1.0),
        evidence,
    )


def _reranking(seeds: Sequence[Json], best: str) -> dict[str, Any]:
    def drop(name: str) -> list[float]:
        return [
            one["methods"][name]["optimization"]["overall"]["value"]
            - one["methods"][name]["generalization"]["overall"]["value"]
            for one in seeds
        ]

    mine, theirs = drop("rerank16"), drop(best)
    lead = over_seeds(
        [
            one["methods"]["rerank16"]["optimization"]["overall"]["value"]
            - one["methods"][best]["optimization"]["overall"]["value"]
            for one in seeds
        ]
    )
    dropped = over_seeds(mine)
    more = over_seeds([a - b for a, b in zip(mine, theirs, strict=True)])
    return _verdict(
        "d",
        "Reranking is strong under optimization and weaker under generalization",
        together([judged(dropped), judged(more)]),
        {
            "reranking 16: optimization − generalization": dropped,
            f"that drop − the drop of {best}": more,
            f"reranking 16 − {best}, under optimization": lead,
            f"reranking 16 − {best}, under generalization": _paired(seeds, "rerank16", best),
        },
    )


def _disentanglement(seeds: Sequence[Json]) -> dict[str, Any]:
    evidence, found = {}, []
    for name in seeds[0]["methods"]:
        for attribute in ("helpfulness", "safety"):
            gaps = [
                one["methods"][name]["generalization"]["leakage"][attribute]["value"]
                - one["ceiling"]["leakage"][attribute]["value"]
                for one in seeds
            ]
            estimate = over_seeds(gaps)
            evidence[f"{name}: the other dial moves {attribute}"] = estimate
            if name != "start":
                far = max(estimate.low, -estimate.high)
                inside = max(estimate.high, -estimate.low)
                found.append(
                    "holds" if far > LEAKAGE_BOUND else
                    "contradicted" if inside <= LEAKAGE_BOUND else "undecided"
                )  # fmt: skip
    verdict = "holds" if "holds" in found else together(found)
    return _verdict(
        "e",
        f"Disentanglement is not solved: some method's leakage lies more than {LEAKAGE_BOUND:.2f} "
        "from the ceiling's",
        verdict,
        evidence,
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
        together([judged(below, above=-RARE), judged(more)]),
        {
            "in the pool, over an even share": rare,
            "in the distilled set, over an even share": over_seeds(kept),
            "distilled − pool": more,
            "distilled over pool": over_seeds(factor),
        },
    )


def _empty_cells(seeds: Sequence[Json]) -> dict[str, Any]:
    evidence, maps, mostly = {}, {}, {}
    for name in seeds[0]["methods"]:
        hits = [_hits(one["methods"][name]["generalization"]["joint"]) for one in seeds]
        evidence[f"{name}: requested cells never delivered"] = over_seeds(
            [float(sum(hit == 0 for hit in row)) for row in hits]
        )
        maps[name] = [sum(column) / len(hits) for column in zip(*hits, strict=True)]
        mostly[name] = [
            cell for cell, column in enumerate(zip(*hits, strict=True))
            if sum(hit == 0 for hit in column) > len(hits) / 2
        ]  # fmt: skip
    found = _verdict(
        "g",
        "Reranking leaves requested cells empty",
        judged(evidence["rerank16: requested cells never delivered"]),
        evidence,
    )
    # A count of empty cells is never below 0: an interval that ends at 0 contradicts the claim.
    estimate = evidence["rerank16: requested cells never delivered"]
    if estimate.value == 0 and not math.isnan(estimate.high):
        found["verdict"] = "contradicted"
    return {**found, "delivered_share": maps, "empty_in_most_seeds": mostly}


def _hits(joint: Sequence[Sequence[float]]) -> list[float]:
    """Return per requested cell the share of completions that fell into it."""
    return [row[cell] / sum(row) for cell, row in enumerate(joint)]


def _paired(seeds: Sequence[Json], first: str, second: str) -> Estimate:
    """Return the difference in overall control by generalization judges, paired by seed."""
    return over_seeds(
        [
            one["methods"][first]["generalization"]["overall"]["value"]
            - one["methods"][second]["generalization"]["overall"]["value"]
            for one in seeds
        ]
    )


def _verdict(
    letter: str, claim: str, verdict: str, evidence: Mapping[str, Estimate]
) -> dict[str, Any]:
    return {
        "letter": letter,
        "claim": claim,
        "verdict": verdict,
        "evidence": {
            name: {
                "value": found.value,
                "low": None if math.isnan(found.low) else found.low,
                "high": None if math.isnan(found.high) else found.high,
                "n": found.n,
            }
            for name, found in evidence.items()
        },
    }
