"""The bench of a real model: its points are recipes, and its curve counts fresh examples only."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from equipoise.recipes.load import load_recipe

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.smollm2.curves import REPORT, completed, drawings, said  # noqa: E402
from benchmarks.smollm2.points import BRANCHES, POINTS, REFERENCE, make_recipe  # noqa: E402
from benchmarks.smollm2.run import REFERENCES, added, listening, with_references  # noqa: E402
from benchmarks.smollm2.tables import METHODS, RESULT  # noqa: E402


@pytest.mark.parametrize("name", POINTS)
def test_every_point_is_a_recipe_on_the_same_prompts_and_judges(name: str) -> None:
    budget = {"tune.steps": "9"} if name in BRANCHES else {}
    made, shipped = make_recipe({**POINTS[name], **budget}, None), load_recipe("smollm2")
    for part in ("model", "prompts", "fit_reward", "judges", "generate", "score", "levels"):
        assert getattr(made, part) == getattr(shipped, part)
    assert (made.tune == shipped.tune) is (name == REFERENCE)


def test_listening_counts_fresh_examples_in_windows() -> None:
    looked = {20: 0.5, 25: 0.75, 26: 1.0, 50: 0.0, 60: 1.0}
    steps = list(range(1, 61))
    losses = {
        "step": steps,
        "preferred": [looked.get(step) for step in steps],
        "epoch": [step / 55 for step in steps],
    }
    found = list(listening(losses, {"batch_size": 8}))
    # The look at step 60 is in the second epoch: its examples have been shown before.
    assert [(w["examples"], w["preferred"]) for w in found] == [(200, 0.625), (400, 0.5)]
    assert [w["looked_at"] for w in found] == [16, 16]


def test_a_curve_without_a_look_is_empty() -> None:
    losses = {"step": [1], "preferred": [None], "epoch": [0.1]}
    assert list(listening(losses, {"batch_size": 8})) == []


def test_the_page_shows_the_tables_of_the_result(result: dict[str, Any]) -> None:
    page = PAGE.read_text("utf-8")
    shown = {"optimization", "generalization", "fluency", "models", "refusals"}
    assert set(re.findall(r"<!-- table (\w+) -->", page)) == shown <= set(TABLES)
    made = filled(page, result, TABLES)
    assert made == page, "run python -m benchmarks.smollm2.run --only page"


def test_the_perplexity_of_the_result_is_on_the_reference_answers() -> None:
    headline = json.loads(RESULT.read_text("utf-8"))["headline"]
    references = json.loads(REFERENCES.read_text("utf-8"))
    ratio = references["tuned"]["perplexity_ratio"]
    for end, part in (("", "value"), (".low", "low"), (".high", "high")):
        assert headline[f"best.perplexity_ratio{end}"] == round(ratio[part], 4)
    before = json.loads((REPORT / "report.json").read_text("utf-8"))["methods"]
    own = [before[name]["quality"]["perplexity"]["value"] for name in ("tuned", "start")]
    assert headline["best.perplexity_ratio_own"] == round(own[0] / own[1], 4)
    assert with_references(headline, references) == headline
    first = {"best.perplexity_ratio": 2.0, "best.perplexity_ratio.low": 1.5, "other": 0.0}
    moved = with_references(first, references)
    assert moved["best.perplexity_ratio_own"] == 2.0
    assert moved["best.perplexity_ratio_own.low"] == 1.5
    assert moved["best.perplexity_ratio"] == round(ratio["value"], 4) and moved["other"] == 0


def test_the_figures_of_the_page_show_every_method() -> None:
    result = json.loads(RESULT.read_text("utf-8"))
    report = json.loads((REPORT / "report.json").read_text("utf-8"))
    whole = completed(report, result)["methods"]
    assert len(whole) == len(METHODS) and {said("clm"), said("raw-clm")} <= set(whole)
    drawn = drawings(report, result)
    (legend,) = drawn["refusals"]().legends
    shown = {text.get_text() for text in legend.get_texts()}
    assert len(shown) == len(METHODS) and {said("clm"), said("exmate"), "prompting"} <= shown
    start, fresh, likelihood = drawn["examples"]().axes
    assert [ax.get_xlabel() for ax in (fresh, likelihood)] == ["examples seen"] * 2
    named = [text.get_text() for text in fresh.get_legend().get_texts()]
    assert named == [
        "ExMATE on MOEC (1,768 looked at)",
        "CLM on MOEC (200 looked at)",
        "CLM on the raw pool (208 looked at)",
    ]
    # 400 steps of 4 texts; the page quotes the means of 160.
    means = start.lines[1]
    assert list(means.get_xdata()) == list(range(160, 1601, 160))
    assert [round(y, 2) for y in means.get_ydata()][:4] == [0.86, 0.71, 0.38, 0.19]
    assert round(means.get_ydata()[-1], 2) == 0.07


def test_a_point_that_ran_elsewhere_is_added_and_the_others_stay() -> None:
    one = {"value": 0.5, "low": 0.4, "high": 0.6}
    shares = dict.fromkeys(("helpfulness", "safety"), one)
    scores = {
        **dict.fromkeys(("mp", "bt", "bt_neighbours", "leakage", "rmse", "range"), shares),
        "coverage": one,
    }
    read = {"value": -2.5, "low": -2.6, "high": -2.4}
    tuned = {
        "optimization": scores,
        "generalization": scores,
        "quality": {"degenerate": one, "fluency": [read] * 25, "fluency_mean": read},
        "refusals": {},
        "cost": {"tokens": 1.0},
    }
    report = {
        "methods": {"tuned": tuned},
        "moec": {"n_kept": 3},
        "backdoor": {},
        "planned": None,
        "stages": {"tune": 1.0},
        "recipe": {"tune": {"batch_size": 8}},
        "losses": {},
        "differences": {},
        "pool": {"no_finished_sentence": 7},
    }
    before = json.loads(RESULT.read_text("utf-8"))
    before["own"] = {"start": -2.0}
    for key in ("headline", "moec", "tuning", "minutes"):
        before[key] = {k: v for k, v in before[key].items() if not k.startswith("clm")}
    after = added(before, {"clm": report, "best": {"this": "report is not read"}})
    new = {k: v for k, v in after["headline"].items() if k not in before["headline"]}
    assert new["clm.optimization.mp.safety.low"] == 0.4
    assert new["clm.fluency_drop.worst_corner"] == 0.5
    assert all(key.startswith("clm.") for key in new)
    assert {k: after["headline"][k] for k in before["headline"]} == before["headline"]
    assert after["own"] == {"start": -2.0, "clm": -2.0}
    assert after["added"]["clm"] == {"no_finished_sentence": 7}
    assert after["moec"] == {**before["moec"], "clm": {"n_kept": 3}}
