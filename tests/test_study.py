"""The study: verdicts follow intervals, budgets are equal, pages are self-contained."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.budget import RowLengths  # noqa: E402
from benchmarks.paper import run as command  # noqa: E402
from benchmarks.paper import runs  # noqa: E402
from benchmarks.paper.page import render  # noqa: E402
from benchmarks.paper.points import (  # noqa: E402
    FULL,
    OBJECTIVES,
    QUICK,
    TRAINING_FREE,
    ablations,
    slug,
)
from benchmarks.paper.runs import make_recipe, steps_for, thinned  # noqa: E402
from benchmarks.paper.study import build  # noqa: E402
from benchmarks.paper.tables import TABLES, filled, said  # noqa: E402
from benchmarks.paper.verdicts import judged, placed, together  # noqa: E402
from equipoise.evaluate.rewind import rewind  # noqa: E402

from equipoise.report.render import plain  # noqa: E402
from equipoise.store.shards import to_plain  # noqa: E402
from equipoise.types import Estimate  # noqa: E402
from test_rewind import grid_pool  # noqa: E402

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
    study = plain(build([seed(n) for n in range(5)]))
    headline = study["headline"]
    assert all(isinstance(value, int | float | None) for value in headline.values())
    assert headline["exmate.generalization.mp.safety"] == pytest.approx(0.8, abs=0.001)
    assert headline["best.of_ceiling.mp.safety"] == pytest.approx(0.8 / 0.95, abs=0.001)
    assert headline["rlhf.last.kl"] == 0.1
    assert study["again"]["rlhf"] == {}
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
        plain({"seed": i, "chance_coverage": 0.64, "rewind": to_plain(found)}) for i in range(n)
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


# The page


def test_the_page_is_whole_and_loads_nothing() -> None:
    page = render(plain(build([seed(n) for n in range(3)], ablation_results(), rewinds())))
    assert not re.search(r"""(src|href)=["']?(https?:)?//""", page)
    assert "<script" not in page
    for name in ("control", "leakage", "empty", "rlhf", "rewind", "ablations"):
        assert f'<figure id="{name}"><svg' in page
    assert [page.count(f'<h2 id="{letter}">') for letter in "abcdefg"] == [1] * 7
    assert "RLHF (CLM warm start)" in page
    assert "nan" not in re.sub(r"<svg.*?</svg>", "", page, flags=re.S).lower()
    assert len(page) < 3_000_000


def test_a_page_of_one_seed_says_that_there_is_no_interval() -> None:
    page = render(plain(build([seed(0)])))
    assert "(no interval)" in page and 'id="rewind"' not in page


def test_numbers_are_written_with_their_interval() -> None:
    nan = float("nan")
    assert said(0.5, 0.25, 0.75) == "0.50 (0.25 to 0.75)"
    assert said(-0.5, nan, nan) == "−0.50 (no interval)"
    assert said(nan, nan, nan) == "–"


def test_the_tables_of_the_docs_are_what_the_results_say() -> None:
    page = command.PAGE.read_text("utf-8")
    shown = {"control", "verdicts", "aims", "rewind"}
    assert set(re.findall(r"<!-- table (\w+) -->", page)) == shown <= set(TABLES)
    made = filled(page, committed(), TABLES)
    assert made == page, "run python -m benchmarks.paper.run --only collect"


def test_a_page_is_filled_between_its_marks_only() -> None:
    study = plain(build([seed(n) for n in range(3)]))
    page = "before\n<!-- table against -->\nold\n<!-- /table -->\nafter\n"
    made = filled(page, study)
    assert filled(page.replace("old\n", ""), study) == made
    assert made.startswith("before\n") and made.endswith("\nafter\n") and "old" not in made
    assert "| RLHF − CLM | 0.049 (" in made
    assert filled(made, study) == made


# Points and budgets


@pytest.mark.parametrize("scale", [FULL, QUICK], ids=lambda scale: scale.name)
def test_every_point_is_a_valid_recipe(scale: Any) -> None:
    names = set()
    for name, overrides in OBJECTIVES.items():
        made = make_recipe(scale, 3, {**overrides, "tune.steps": "7"})
        assert made.seed == 3 and made.tune.steps == 7, name
        names.add(slug(name))
    for points in ablations().values():
        for point in points:
            assert make_recipe(scale, 0, point.overrides) != make_recipe(scale, 0, {}), point.name
            assert slug(point.name) not in names
            names.add(slug(point.name))


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


def test_a_method_run_again_replaces_its_own_result_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = seed(0)
    found["upstream"] |= {"pool": {"n": 7}, "reward_models": {}}
    found["methods"]["exmate"]["cost"] = {"tuning_tokens": 1.4e6}
    asked: list[tuple[str, Any, str | None]] = []
    measured = {**measures(0.99), "auto_mp": {}, "levels": 5, "attributes": ["a", "b"]}
    measured |= {"n_prompts": 8, "n_repeats": 1, "never_moves": 0, "response": {}}
    report = {
        "n": {}, "stages": {}, "backdoor": {}, "reward_models": {}, "pool": {"n": 7},
        "moec": found["upstream"]["moec"],
        "methods": {"tuned": {
            "generalization": measured, "optimization": measured, "cost": {},
            "quality": {"degenerate": estimate(0.0)},
        }},
    }  # fmt: skip

    def execute(
        scale: Any, number: int, name: str, overrides: Any, shares: Any = (), until: Any = None
    ) -> Path:
        asked.append((name, overrides.get("tune.rlhf.warm_start"), until))
        return tmp_path

    (tmp_path / "tune").mkdir()
    curve = [{"warm_start": 1.0, "step": float(n)} for n in range(500)]
    curve += [{"warm_start": 0.0, "step": 500.0 + n} for n in range(20)]
    (tmp_path / "tune/curve.json").write_text(json.dumps(curve))
    monkeypatch.setattr(runs, "execute", execute)
    monkeypatch.setattr(runs, "read_report", lambda folder: report)
    monkeypatch.setattr(runs, "row_lengths", lambda folder: RowLengths(40.0, 2.0, 40.0))
    before = json.dumps(found)
    made = runs.run_again(FULL, 0, "rlhf", found)
    assert json.dumps(found) == before
    # Four fifths of the tokens in batches of CLM's size.
    assert asked == [("exmate", None, "distil"), ("rlhf", str(round(1.12e6 / (32 * 82))), None)]
    assert made["methods"]["rlhf"]["generalization"]["overall"]["value"] == 0.99
    assert made["methods"]["rlhf"]["answers"] == 8 * 25
    assert {k: v for k, v in made["methods"].items() if k != "rlhf"} == {
        k: v for k, v in found["methods"].items() if k != "rlhf"
    }
    assert made["again"]["rlhf"]["same_pool"] is True
    assert made["rlhf_curve"][-20:] == curve[-20:]
    report["pool"] = {"n": 6}
    assert runs.run_again(FULL, 0, "rlhf", found)["again"]["rlhf"]["same_pool"] is False


def test_ablations_that_are_there_are_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    def execute(scale: Any, number: int, name: str, *rest: Any, until: Any = None) -> Path:
        made.append(name)
        return Path(name)

    monkeypatch.setattr(runs, "execute", execute)
    monkeypatch.setattr(runs, "read_report", lambda folder: {})
    monkeypatch.setattr(runs, "summary", lambda report, method: {"new": True})
    monkeypatch.setattr(runs, "upstream", lambda folder: {})
    groups = {"w": ablations()["w"][:2]}
    held = {"reference": {"old": True}, "groups": {"w": {groups["w"][0].name: {"old": True}}}}
    found = runs.run_ablations(FULL, 0, groups, held)
    assert made == ["exmate", f"ablation-{groups['w'][1].name}"]
    assert found["reference"] == {"old": True}
    assert [list(one) for one in found["groups"]["w"].values()] == [["old"], ["new", "upstream"]]


# The command


def test_a_finished_seed_is_not_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "HERE", tmp_path)
    made = []

    def make(number: int) -> dict[str, Any]:
        made.append(number)
        if number == 2:
            raise KeyboardInterrupt
        return seed(number)

    folder = command.results_of(FULL)
    for number in (0, 1, 0):
        command.once(folder / f"methods-seed{number}.json", lambda n=number: make(n))
    with pytest.raises(KeyboardInterrupt):
        command.once(folder / "methods-seed2.json", lambda: make(2))
    assert made == [0, 1, 2]
    assert sorted(path.name for path in folder.iterdir()) == [
        "methods-seed0.json",
        "methods-seed1.json",
    ]
    docs = tmp_path / "docs.md"
    docs.write_text("<!-- table against -->\n\n<!-- /table -->\n")
    monkeypatch.setattr(command, "DOCS", docs)
    monkeypatch.setattr(command, "render", lambda study: "<html>" + "x" * 10_000)
    study = command.collect(FULL)
    assert study["seeds"] == [0, 1]
    assert json.loads((tmp_path / "results.json").read_text())["headline"] == study["headline"]
    assert (tmp_path / "page.html").stat().st_size > 10_000
    assert "ExMATE − RLHF" in docs.read_text("utf-8")
    with pytest.raises(SystemExit, match="no finished seed"):
        command.collect(QUICK)
