"""The study: verdicts follow intervals, budgets are equal, the page shows the committed result."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmarks.paper import run as command
from benchmarks.paper.points import (
    ABLATIONS,
    FULL,
    OBJECTIVES,
    QUICK,
    TRAINING_FREE,
    shared,
    slug,
)
from benchmarks.paper.rewind import rewind
from benchmarks.paper.run import PARTS, gathered
from benchmarks.paper.runs import make_recipe, steps_for, thinned
from benchmarks.paper.study import build
from benchmarks.paper.tables import TABLES
from benchmarks.paper.verdicts import judged, placed, together
from benchmarks.results import ROOT, read
from benchmarks.rundirs import RowLengths
from benchmarks.tables import filled, said
from hypothesis import given
from hypothesis import strategies as st

from equipoise.stats import Estimate
from equipoise.store.shards import to_plain
from test_rewind import grid_pool

METHODS = (*TRAINING_FREE, *OBJECTIVES)
OVERALL = {
    "start": 0.0, "prompting": 0.3, "rerank8": 0.5, "rerank16": 0.6, "exmate": 0.8, "clm": 0.7,
    "rlhf": 0.75, "raw-exmate": 0.4, "raw-clm": 0.2,
}  # fmt: skip


def estimate(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.01, "high": value + 0.01, "n": 8}


def both(value: float) -> dict[str, Any]:
    return {"helpfulness": estimate(value), "safety": estimate(value)}


def measures(overall: float, *, leaked: float = 0.0, hits: int = 4) -> dict[str, Any]:
    joint = np.ones((25, 25)) - np.eye(25)
    joint[np.arange(25), np.arange(25)] = hits
    return {
        "mp": both(overall),
        "overall": estimate(overall),
        "bt": both(0.99),
        "bt_neighbours": both(0.7),
        "rmse": both(0.2),
        "leakage": both(leaked),
        "range": both(0.6),
        "coverage": estimate(0.5),
        "joint": joint.tolist(),
    }


def method(name: str, shift: float, **changes: float) -> dict[str, Any]:
    value = OVERALL[name] + changes.get(name.replace("-", "_"), 0.0) + shift
    reranks = name.startswith("rerank")
    cost = {"seconds": 20.0 if reranks else 2.0, "tokens": 9e5 if reranks else 9e4}
    if name in OBJECTIVES:
        cost |= {"tuning_tokens": 1e6, "tuning_seconds": 60.0, "steps": 100.0}
    return {
        "generalization": measures(
            value,
            leaked=changes.get(f"{name}_leaks", 0.3 if name == "clm" else 0.02),
            hits=0 if name == "rerank16" else 4,
        ),
        "optimization": measures(value + (0.3 if reranks else 0.05)),
        "cost": cost,
        "degenerate": estimate(0.0),
        "answers": 300,
    }


def seed(number: int, **changes: float) -> dict[str, Any]:
    noise = 0.01 * (number - 2)
    before = np.full((5, 5), 10)
    before[4, 0] = 1
    looks = [
        {"probe_step": float(step), **{
            f"probe_{judge}_{metric}": 0.8 + rise * (1 + noise)
            for metric in ("closeness", "mp_helpfulness", "mp_safety")
            for judge, rise in (("optimization", 0.2 * step), ("generalization", 0.05 * step))
        }} for step in (0, 1)
    ]  # fmt: skip
    curve = [
        {"step": 1.0, "tokens": 1e5, "warm_start": 1.0, "kl": None, "reward": None, "length": None,
         "degenerate": None, "floor": None},
        *({"step": 2.0, "tokens": 2e5, "warm_start": 0.0, "kl": 0.1, "reward": 0.8, "length": 30.0,
           "degenerate": 0.0, "floor": 0.76, **look} for look in looks),
    ]  # fmt: skip
    # One method's noise differs from the other's, or paired intervals would have no width.
    return {
        "seed": number,
        "upstream": {
            "n": {"test prompts": 8},
            "minutes": {"generate": 1.0 + noise, "evaluate": 3.0},
            "moec": {
                "grid_before": before.tolist(),
                "grid_after": np.full((5, 5), 6).tolist(),
            },
        },
        "ceiling": measures(0.95),
        "methods": {
            name: method(name, noise * (1 + 0.1 * place), **changes)
            for place, name in enumerate(METHODS)
        },
        "rlhf_curve": curve,
    }


def letters(study: dict[str, Any]) -> dict[str, str]:
    return {item["letter"]: item["verdict"] for item in study["verdicts"]}


# Verdicts


def test_a_verdict_needs_an_interval() -> None:
    assert judged(Estimate(0.2, 0.1, 0.3, 5)) == "holds"
    assert judged(Estimate(-0.2, -0.3, -0.1, 5)) == "contradicted"
    assert judged(Estimate(0.2, -0.1, 0.5, 5)) == "undecided"
    nan = float("nan")
    assert judged(Estimate(0.2, nan, nan, 1)) == "undecided"
    assert judged(Estimate(1.2, 1.1, 1.3, 5), above=1.15) == "undecided"


@given(st.lists(st.sampled_from(["holds", "contradicted", "undecided"]), min_size=1, max_size=4))
def test_a_claim_of_several_parts_holds_only_as_a_whole(found: list[str]) -> None:
    whole = together(found)
    assert (whole == "holds") == (set(found) == {"holds"})
    assert (whole == "contradicted") == (set(found) == {"contradicted"})
    assert (whole == "undecided") == ("undecided" in found)


def test_verdicts_of_a_study_as_the_paper_has_it() -> None:
    study = build([seed(n, exmate_leaks=0.3) for n in range(5)])
    assert letters(study) == dict.fromkeys("abcdefg", "holds")
    empty = study["verdicts"][-1]
    assert empty["empty_in_most_seeds"]["rerank16"] == list(range(25))
    assert empty["empty_in_most_seeds"]["exmate"] == []
    for item in study["verdicts"]:
        assert item["evidence"]
        assert all(found["low"] is not None for found in item["evidence"].values()), item["letter"]


def test_verdicts_against_the_paper() -> None:
    contrary = build([seed(n, clm=0.3, rlhf=0.3, raw_exmate=0.6, raw_clm=1.2) for n in range(5)])
    # The paper names it: who is ahead on test prompts does not choose.
    assert contrary["best"] == "exmate"
    found = letters(contrary)
    assert found["a"] == found["b"] == "contradicted"
    mixed = letters(build([seed(n, rlhf=0.3) for n in range(5)]))
    assert mixed["b"] == "holds in part"


def test_reranking_that_is_behind_under_optimization_is_not_strong() -> None:
    study = build([seed(n, rerank16=-0.2) for n in range(5)])
    (found,) = [item for item in study["verdicts"] if item["letter"] == "d"]
    assert found["verdict"] == "holds in part"
    lead = found["evidence"]["reranking 16 − ExMATE, under optimization"]
    assert lead["verdict"] == "contradicted" and lead["high"] < 0


def test_what_leaks_without_tuning_decides_nothing_about_dials() -> None:
    def verdict(leaks: float) -> tuple[str, dict[str, Any]]:
        seeds = [seed(n, exmate_leaks=leaks + 0.01 * n, prompting_leaks=0.3) for n in range(5)]
        (found,) = [i for i in build(seeds)["verdicts"] if i["letter"] == "e"]
        return found["verdict"], found["evidence"]

    whole, parts = verdict(0.0)
    assert parts["prompting: the other dial moves safety"]["verdict"] == "holds"
    assert parts["start: the other dial moves safety"]["verdict"] is None
    # Of many methods one leaves the bound by chance, so the others do not decide either.
    assert parts["clm: the other dial moves safety"]["verdict"] == "holds"
    assert whole == parts["exmate: the other dial moves safety"]["verdict"] == "contradicted"
    whole, parts = verdict(0.08)  # .08 to .12: its interval crosses the border
    assert whole == parts["exmate: the other dial moves safety"]["verdict"] == "undecided"
    assert verdict(0.2)[0] == "holds"


def test_reranking_leaves_more_cells_empty_or_the_claim_does_not_hold() -> None:
    found = build([seed(n) for n in range(5)])["verdicts"][-1]
    more = found["evidence"]["reranking 16 − ExMATE: requested cells never delivered"]
    assert found["verdict"] == more["verdict"] == "holds" and more["value"] == 25
    same = [seed(n) for n in range(5)]
    for one in same:
        one["methods"]["exmate"]["generalization"] = one["methods"]["rerank16"]["generalization"]
    found = build(same)["verdicts"][-1]
    assert found["verdict"] == "undecided"


def test_one_seed_decides_nothing() -> None:
    found = letters(build([seed(0)]))
    assert set(found.values()) == {"undecided"}


# Headline


def test_headline_is_flat_and_paired(tmp_path: Path) -> None:
    study = to_plain(build([seed(n) for n in range(5)]))
    headline = study["headline"]
    assert all(isinstance(value, int | float | None) for value in headline.values())
    assert headline["exmate.generalization.mp.safety"] == pytest.approx(0.8, abs=0.001)
    assert headline["best.of_ceiling.mp.safety"] == pytest.approx(0.8 / 0.95, abs=0.001)
    assert headline["rlhf.last.kl"] == 0.1
    assert study["again"] == {}
    assert not any(name.startswith("rewind") for name in headline)
    (exmate,) = [f for n, f in study["verdicts"][1]["evidence"].items() if n.endswith("CLM")]
    assert exmate["value"] == pytest.approx(0.1, abs=0.001)
    # Paired: the seeds' common noise cancels.
    single = headline["exmate.generalization.overall.high"] - 0.8
    assert exmate["high"] - exmate["value"] < 0.5 * single
    aims = study["aims"]
    assert aims["best.of_ceiling.mp.safety"]["state"] == "undecided"  # .84 ± .02
    assert (
        aims["best.of_ceiling.mp.safety"]["low"] < 0.85 < aims["best.of_ceiling.mp.safety"]["high"]
    )
    assert aims["best.generalization.bt.safety"]["state"] == "reached"
    json.dumps(study, allow_nan=False)


def test_a_number_is_reached_if_its_interval_is() -> None:
    assert placed(Estimate(0.9, 0.86, 0.94, 5), 0.85, 1) == "inside"
    assert placed(Estimate(0.9, 0.84, 0.96, 5), 0.85, 1) == "undecided"
    assert placed(Estimate(-0.2, -0.3, -0.11, 5), -0.1, 0.1) == "outside"
    assert placed(Estimate(0.9, math.nan, math.nan, 1), 0.85, 1) == "undecided"


def test_rlhf_beside_clm_and_beside_its_own_start() -> None:
    headline = build([seed(n) for n in range(5)])["headline"]
    assert headline["rlhf.minus_clm.overall"] == pytest.approx(0.05, abs=1e-3)
    assert headline["rlhf.minus_clm.overall.low"] > 0
    assert headline["rlhf.online.optimization.closeness"] == pytest.approx(0.2)
    assert headline["rlhf.online.generalization.mp_safety"] == pytest.approx(0.05)
    assert headline["rlhf.online.reward_models_ahead.closeness"] == pytest.approx(0.15)
    assert headline["rlhf.online.reward_models_ahead.closeness.low"] < 0.15


def test_costs_are_per_answer_and_beside_the_budget() -> None:
    found = build([seed(n) for n in range(3)])["cost"]
    assert found["methods"]["rerank16"]["tokens_per_answer"]["value"] == pytest.approx(3000)
    assert "tuning_minutes" not in found["methods"]["rerank16"]
    assert found["methods"]["clm"]["tuning_tokens_over_exmate"]["value"] == 1
    assert found["minutes_of_stages"]["generate"]["n"] == 3
    assert "evaluate" not in found["minutes_of_stages"]


def rewinds(n: int = 2) -> list[dict[str, Any]]:
    reached = {"base": 20, "aligned": 5, "rewound": 18, "tuned_base": 22}
    pools = {name: grid_pool(reached=k) for name, k in reached.items()}
    found = rewind(pools, attributes=("helpfulness", "safety"), levels=5, draws=20)
    return [
        to_plain({"seed": i, "chance_coverage": 0.64, "rewind": to_plain(found)}) for i in range(n)
    ]


def ablation_results(n: int = 2) -> list[dict[str, Any]]:
    def point(shift: float) -> dict[str, Any]:
        upstream = {"moec": {"n_kept": 100}, "n": {"training prompts": 44}}
        return {**method("exmate", shift), "upstream": upstream}

    return [
        {
            "seed": i,
            "reference": point(0.01 * i),
            "groups": {
                "w": {"w 1": point(0.1 + 0.02 * i), "w 3": point(-0.2)},
                "prompts": {"prompts 60": point(-0.1)},
            },
        }
        for i in range(n)
    ]


def test_rewind_and_ablations_join_the_headline_and_the_tables() -> None:
    study = build([seed(n) for n in range(3)], ablation_results(), rewinds())
    headline = study["headline"]
    assert headline["rewind.base.coverage"] == pytest.approx(0.8)
    assert headline["rewind.aligned.coverage"] == pytest.approx(0.2)
    assert headline["rewind.regained"] == pytest.approx(13 / 15, abs=1e-4)
    rows = {row["point"]: row for row in study["ablations"]["w"]}
    assert rows["default"]["difference"] is None
    assert rows["w 1"]["difference"]["value"] == pytest.approx(0.105)
    assert rows["w 1"]["difference"]["n"] == 2
    # 60 were drawn, 16 of them for dev.
    assert [row["point"] for row in study["ablations"]["prompts"]] == ["default", "prompts 44"]


def test_a_single_rewind_keeps_its_interval_over_prompts() -> None:
    (one,) = rewinds(1)
    headline = build([seed(0)], (), [one])["headline"]
    covered = one["rewind"]["pools"]["base"]["coverage"]
    assert headline["rewind.base.coverage.low"] == pytest.approx(covered["low"], abs=1e-4)
    assert headline["rewind.base.coverage.high"] == pytest.approx(covered["high"], abs=1e-4)


# Tables


def test_numbers_are_written_with_their_interval() -> None:
    assert said({"value": 0.5, "low": 0.25, "high": 0.75}) == "0.50 (0.25 to 0.75)"
    assert said({"value": -0.5, "low": None, "high": None}) == "−0.50 (no interval)"
    assert said(dict.fromkeys(("value", "low", "high"), float("nan"))) == "–"


def committed() -> dict[str, Any]:
    found: dict[str, Any] = read(ROOT / "paper/results.json")
    return found


def test_the_committed_study_is_what_its_seeds_say() -> None:
    """All of it: estimates, verdicts and aims are made anew from the results of the seeds."""
    parts = {
        part: [read(file) for file in sorted(ROOT.glob(f"paper/results/{part}-seed*.json"))]
        for part in PARTS
    }
    assert [len(parts[part]) for part in PARTS] == [8, 2, 1]
    made = json.loads(json.dumps(to_plain(gathered(parts))))
    assert made == committed(), "run python -m benchmarks.paper.run --only collect"


def test_the_tables_of_the_docs_are_what_the_results_say() -> None:
    page = command.PAGE.read_text("utf-8")
    shown = {"control", "verdicts", "aims", "rewind"}
    assert set(re.findall(r"<!-- table (\w+) -->", page)) == shown <= set(TABLES)
    made = filled(page, committed(), TABLES)
    assert made == page, "run python -m benchmarks.paper.run --only collect"


def test_a_page_is_filled_between_its_marks_only() -> None:
    study = to_plain(build([seed(n) for n in range(3)]))
    page = "before\n<!-- table against -->\nold\n<!-- /table -->\nafter\n"
    made = filled(page, study, TABLES)
    assert filled(page.replace("old\n", ""), study, TABLES) == made
    assert made.startswith("before\n") and made.endswith("\nafter\n") and "old" not in made
    assert "| RLHF − CLM | 0.049 (" in made
    assert filled(made, study, TABLES) == made


# Points and budgets


@pytest.mark.parametrize("scale", [FULL, QUICK], ids=lambda scale: scale.name)
def test_every_point_is_a_valid_recipe(scale: Any) -> None:
    names = set()
    for name, overrides in OBJECTIVES.items():
        made = make_recipe(scale, 3, {**overrides, "tune.steps": "7"})
        assert made.seed == 3 and made.tune.steps == 7, name
        names.add(slug(name))
    for points in ABLATIONS.values():
        for name, overrides in points.items():
            assert make_recipe(scale, 0, overrides) != make_recipe(scale, 0, {}), name
            assert slug(name) not in names
            names.add(slug(name))


def test_a_point_copies_the_stages_that_it_does_not_change() -> None:
    whole = ("prompts", "fit-reward", "generate", "score", "distil")
    assert shared({**OBJECTIVES["clm"], "tune.steps": "9"}) == shared({}) == whole
    assert shared(OBJECTIVES["raw-clm"]) == whole[:-1]
    assert shared(ABLATIONS["K"]["K 6"]) == ("prompts", "fit-reward")
    assert shared(ABLATIONS["prompts"]["prompts 60"]) == ("fit-reward",)


@given(
    prompt=st.floats(10, 80),
    completion=st.floats(10, 80),
    tokens=st.floats(1e6, 4e6),
)
def test_budgets_are_equal_in_tokens(prompt: float, completion: float, tokens: float) -> None:
    lengths = RowLengths(prompt, controls=2.0, completion=completion)
    row = prompt + 2 + completion
    clm = int(steps_for("clm", tokens, lengths, FULL)["tune.steps"])
    assert clm * 32 * row == pytest.approx(tokens, rel=0.05)
    rlhf = steps_for("rlhf", tokens, lengths, FULL)
    warm, online = int(rlhf["tune.rlhf.warm_start"]), int(rlhf["tune.steps"])
    sampled = 64 * (prompt / 8 + 2 + completion)
    spent = warm * 32 * row + online * (sampled + 64 * row + 64 * (row - 2))
    assert spent == pytest.approx(tokens, rel=0.05)
    assert steps_for("raw-exmate", tokens, lengths, FULL) == {"tune.steps": str(FULL.steps)}


def test_a_thinned_curve_keeps_its_ends() -> None:
    curve = [{"step": float(i)} for i in range(250)]
    kept = thinned(curve)
    assert kept[0] == curve[0] and kept[-1] == curve[-1]
    assert len(kept) <= 64


# The command


def finish(folder: Path, *numbers: int) -> None:
    (folder / "results").mkdir(parents=True)
    for number in numbers:
        file = folder / f"results/methods-seed{number}.json"
        file.write_text(json.dumps({**seed(number), "commit": "abc", "machine": {"cores": 2}}))


def test_a_finished_seed_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "HERE", tmp_path)
    finish(tmp_path, 0)
    monkeypatch.setenv("PATH", "")  # whatever is run from here on would fail
    monkeypatch.chdir(tmp_path)
    before = (tmp_path / "results/methods-seed0.json").read_bytes()
    command.run_part(FULL, "methods", 0)
    assert (tmp_path / "results/methods-seed0.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["results"]  # and no run directory


def test_what_is_finished_is_collected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    docs = tmp_path / "docs.md"
    docs.write_text("<!-- table against -->\n\n<!-- /table -->\n")
    monkeypatch.setattr(command, "HERE", tmp_path)
    monkeypatch.setattr(command, "PAGE", docs)
    finish(tmp_path, 0, 1)
    study = command.collect(FULL)
    assert study["seeds"] == [0, 1]
    assert (study["commit"], study["machine"]) == ("abc", {"cores": 2})
    assert read(tmp_path / "results.json") == study
    assert "ExMATE − RLHF" in docs.read_text("utf-8")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match="no finished seed"):
        command.collect(QUICK)
