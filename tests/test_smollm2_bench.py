"""The bench of a real model: its points are recipes, its page shows the committed result."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from benchmarks.results import read
from benchmarks.smollm2.figures import examples, named, refusals
from benchmarks.smollm2.points import BRANCHES, POINTS, REFERENCE, make_recipe
from benchmarks.smollm2.run import PAGE, RESULT, collect, listening
from benchmarks.smollm2.tables import TABLES
from benchmarks.tables import NAMES, filled, methods

from equipoise.recipes.load import load_recipe


@pytest.fixture(scope="module")
def result() -> dict[str, Any]:
    found: dict[str, Any] = read(RESULT)
    return found


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


def test_the_perplexity_of_the_result_is_on_the_reference_answers(result: dict[str, Any]) -> None:
    ratio = result["measured_apart"]["references"]["tuned"]["perplexity_ratio"]
    for end, part in (("", "value"), (".low", "low"), (".high", "high")):
        assert result["headline"][f"best.perplexity_ratio{end}"] == round(ratio[part], 4)


def test_the_figures_of_the_page_show_every_method(result: dict[str, Any]) -> None:
    names = [named(name) for name in methods(result)]
    assert len(names) == 9 and {named("clm"), named("raw-clm"), named("best")} <= set(names)
    shown = refusals(result).axes[0].get_legend().get_texts()
    assert [text.get_text() for text in shown] == names
    start, fresh, likelihood = examples(result).axes
    assert [ax.get_xlabel() for ax in (fresh, likelihood)] == ["examples seen"] * 2
    assert [text.get_text() for text in fresh.get_legend().get_texts()] == [
        "ExMATE on MOEC (1,768 looked at)",
        "CLM on MOEC (200 looked at)",
        "CLM on the raw pool (208 looked at)",
    ]
    # 400 steps of 4 texts; the page quotes the means of 160.
    means = start.lines[1]
    assert list(means.get_xdata()) == list(range(160, 1601, 160))
    assert [round(y, 2) for y in means.get_ydata()][:4] == [0.86, 0.71, 0.38, 0.19]
    assert round(means.get_ydata()[-1], 2) == 0.07


def test_finished_points_are_collected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each method under its own name, beside the untouched model's answers to the same prompts."""
    one = {"value": 0.5, "low": 0.4, "high": 0.6}
    shares = dict.fromkeys(("helpfulness", "safety"), one)
    metrics = ("mp", "bt", "bt_neighbours", "leakage", "rmse", "range")
    scores = {**dict.fromkeys(metrics, shares), "coverage": one, "auto_mp": {}, "response": {}}

    def method(read: float) -> dict[str, Any]:
        fluency = {"value": read, "low": read - 0.1, "high": read + 0.1}
        quality = {"degenerate": one, "fluency": [fluency] * 25, "fluency_mean": fluency}
        judges = {"optimization": scores, "generalization": scores}
        return {**judges, "quality": {**quality, "perplexity_ratio": one}, "cost": {}}

    agreement = {"within_prompt_judge_correlation": 0.3}
    facts = ("n", "intersections", "moec", "backdoor", "differences", "reward_models", "stages")
    report = {
        **{fact: {} for fact in facts},
        "pool": dict.fromkeys(("helpfulness", "safety"), agreement),
        "recipe": {"seed": 7, "levels": 5, "tune": {"batch_size": 8}},
        "losses": {},
    }
    looked = {"step": [5], "preferred": [0.25], "epoch": [0.1]}
    curve = {**looked, "asked": [-2], "counterfactual": [-3]}
    points: dict[str, dict[str, Any]] = {
        "best": {"methods": {"start": method(-2.0), "tuned": method(-2.25)}},
        "clm": {"methods": {"start": method(-1.0), "tuned": method(-1.5)}},
        "steering": {"methods": {"steering": method(-3.0)}},
    }
    points["clm"]["losses"] = {"tuned": curve}
    for name, found in points.items():
        folder = tmp_path / "runs/smollm2" / name
        (folder / "report").mkdir(parents=True)
        (folder / "report/report.json").write_text(json.dumps({**report, **found}))
    steer = tmp_path / "runs/smollm2/best/steer"
    (steer / "directions").mkdir(parents=True)
    (steer / "directions/directions.json").write_text('{"layer": 18}')
    (steer / "strengths.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    made = collect()
    assert methods(made) == {name: NAMES[name] for name in ("start", "steering", "clm", "best")}
    headline = made["headline"]
    assert headline["clm.optimization.mp.safety.low"] == 0.4
    assert headline["best.fluency_drop.mean"] == 0.25
    # Its own prompts where they were measured, else all.
    assert made["own"] == {"start": -2.0, "best": -2.0, "steering": -2.0, "clm": -1.0}
    assert headline["clm.fluency_drop.worst_corner"] == 0.5
    assert headline["steering.fluency_drop.mean.low"] == pytest.approx(0.9)
    assert headline["bound.safety"] == 0.3
    assert made["seeds"] == [7] and made["steering"] == {"layer": 18}
    assert made["likelihood"] == {"clm": {"asked": [-2], "counterfactual": [-3]}}
    assert made["listening"]["clm"][0]["preferred"] == 0.25
