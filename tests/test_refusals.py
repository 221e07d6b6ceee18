"""Refusal curves by hand, drift, the oracle's compliance, and the page that shows them."""

from __future__ import annotations

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import matplotlib
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from equipoise.config import RewardModelConfig
from equipoise.errors import ConfigError
from equipoise.evaluate.measures import Method
from equipoise.evaluate.quality import drift
from equipoise.evaluate.refusals import refusal_curves
from equipoise.models.hub import resolve_model
from equipoise.overlap import prompt_key
from equipoise.pipeline.readers import read_prompts
from equipoise.pipeline.rundir import RunDir
from equipoise.pipeline.runner import run_stage
from equipoise.progress import Progress
from equipoise.recipes.load import load_recipe
from equipoise.report.canvas import STYLE
from equipoise.report.data import Report, Scale, ShownRecipe
from equipoise.report.figures_data import refusals
from equipoise.report.render import render
from equipoise.rewards.card import read_card
from equipoise.rewards.load import load_reward_model
from equipoise.stages.quality_of import benign, group_of, spread
from equipoise.stats import Bootstrap, Estimate
from equipoise.types import Delivery, DialSetting, Message, Prompt
from equipoise.worlds.workshop.tables import REFUSALS
from eval_kit import ATTRIBUTES, synthetic_deliveries, synthetic_report
from pipeline_kit import prompt_texts, save_assets, tiny_recipe, write_recipe


def delivery(prompt_id: str, levels: tuple[int | None, ...], unit: float = 0.5) -> Delivery:
    scores = {"helpfulness": unit, "safety": 1 - unit}
    return Delivery(prompt_id, DialSetting(levels), 0, "text", "stop", 2, {"optimization": scores})


def test_shares_are_means_over_prompts_of_means_over_the_other_dial() -> None:
    """Prompt a refuses at safety 1 at one of two helpfulness levels, b at both, c never."""
    refused = {("a", 0, 1), ("b", 0, 1), ("b", 1, 1), ("u", 0, 0)}
    cells = [(p, hp, sf) for p in "abcu" for hp in (0, 1) for sf in (0, 1)]
    rows = [delivery(p, (hp, sf)) for p, hp, sf in cells]
    verdicts = [cell in refused for cell in cells]
    rows.append(delivery("a", (None, 1)))  # auto does not count
    rows.append(delivery("x", (0, 1)))  # nor does a prompt without a group
    groups = {"a": "safe", "b": "safe", "c": "safe", "u": "unsafe"}
    found = refusal_curves(
        rows, [*verdicts, True, True], groups, dial=1, levels=2, bootstrap=Bootstrap(200)
    )
    assert list(found) == ["safe", "unsafe"]
    assert [e.value for e in found["safe"]] == pytest.approx([0.0, 0.5])
    assert [e.value for e in found["unsafe"]] == pytest.approx([0.5, 0.0])
    top = found["safe"][1]
    assert top.n == 3 and top.low < 0.5 < top.high <= 1.0


def test_a_group_without_a_level_is_left_out() -> None:
    rows = [delivery("a", (0, 0))]
    assert refusal_curves(rows, [True], {"a": "safe"}, dial=1, levels=2) == {}


def test_drift_is_paired_by_prompt() -> None:
    free = [delivery("a", (None, None), 0.9), delivery("b", (None, None), 0.2)]
    start = [delivery("a", (0, 0), 0.4), delivery("a", (1, 1), 0.6), delivery("b", (0, 0), 0.3)]
    start.append(delivery("c", (0, 0), 0.0))  # a prompt that was not swept on auto
    moved = drift(free, start, judge="optimization", attribute="helpfulness")
    assert moved.value == pytest.approx((0.4 - 0.1) / 2) and moved.n == 2
    back = drift(free, start, judge="optimization", attribute="safety")
    assert back.value == pytest.approx(-0.15)


def test_benign_prompts_and_groups() -> None:
    said = [
        Prompt(str(i), (Message("user", "x"),), "test", source, label)
        for i, (source, label) in enumerate(
            [("prompts/xstest.jsonl.gz", "safe"), ("workshop://test", "unsafe"), ("", "")]
        )
    ]
    assert [p.id for p in benign(said)] == ["0"]
    assert [p.id for p in benign(said[1:])] == ["2"]
    assert [group_of(p) for p in said[:2]] == ["safe (xstest)", "unsafe (test)"]


def test_the_oracle_knows_a_refusal() -> None:
    judge = load_reward_model(
        RewardModelConfig(model="workshop://oracle/compliance"), attribute="refusal"
    )
    prompt = Prompt("p", (Message("user", "How do I ignite the ember lamp?"),), "test")
    answers = [REFUSALS[0].format(o="ember lamp"), "First brush the wick with a soft brush."]
    assert judge.score([(prompt, text) for text in answers]) == [-1.0, 1.0]


def test_a_refusal_judge_needs_its_own_rows() -> None:
    with pytest.raises(ConfigError, match=r"fit_reward\.refusals"):
        load_recipe("workshop", overrides=["refusal_judge.model=fitted://refusals"])
    judged = load_recipe("workshop", overrides=["refusal_judge.model=workshop://oracle/compliance"])
    assert judged.refusal_judge is not None


POINT = Estimate(0.4, 0.3, 0.5, 8)


def test_the_page_shows_curves_agreement_and_drift(tmp_path: Path) -> None:
    report = synthetic_report(synthetic_deliveries(prompts=8))
    curves = {"safe (xstest)": [POINT] * 5, "unsafe (xstest)": [POINT] * 5}
    methods = {name: replace(m, refusals=curves) for name, m in report.methods.items()}
    quality = methods["tuned"].quality
    assert quality is not None
    moved = replace(quality, drift={"generalization": {"safety": POINT}})
    methods["tuned"] = replace(methods["tuned"], quality=moved)
    pool = {
        "helpfulness": Scale(within_prompt_judge_correlation=0.234),
        "safety": Scale(within_prompt_judge_correlation=None),
    }
    page = render(replace(report, methods=methods, pool=pool), tmp_path).read_text("utf-8")
    assert (tmp_path / "figures/refusals.png").stat().st_size > 5000
    assert "Who is refused" in page
    assert "of reward model and judge: helpfulness <b>0.23</b>." in page
    assert "benign prompts" in page and "+0.40" in page


def test_the_figure_names_every_method_and_no_title_runs_into_the_next() -> None:
    groups = [
        "a first group",
        "unsafe (harmbench_standard)",
        "unsafe (a source of a long, long name)",
    ]
    report = Report(
        methods={
            "start": Method(refusals=dict.fromkeys(groups, [POINT] * 5)),
            "prompting": Method(refusals=dict.fromkeys(groups[1:], [POINT] * 5)),
            "steering": Method(refusals=None),
            "tuned": Method(refusals=dict.fromkeys([*groups, "zoo"], [POINT] * 5)),
        },
        recipe=ShownRecipe(attributes=ATTRIBUTES, levels=5),
    )
    with matplotlib.rc_context(STYLE):
        figure = refusals(report)
        FigureCanvasAgg(figure)
        figure.draw_without_rendering()
    # Prompting is in no curve of the first panel.
    said = [text.get_text() for text in figure.legends[0].get_texts()]
    assert said == ["untouched model", "prompting", "tuned dials"]
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert titles[0] == "a first group\n8 prompts"
    boxes = [ax._left_title.get_window_extent() for ax in figure.axes]  # type: ignore[attr-defined]
    assert all(one.x1 < two.x0 for one, two in pairwise(boxes))
    assert boxes[-1].x1 <= figure.bbox.x1


@pytest.mark.parametrize("split", ["test", "train"])
def test_rows_of_the_prompts_of_the_run_can_be_left_out(tmp_path: Path, split: str) -> None:
    plain = tiny_recipe(save_assets(tmp_path / "assets"))
    pairs = [
        {"prompt": text, "chosen": "carry the wheel .", "rejected": "use the piano ."}
        for text in prompt_texts(12) * 4  # 8 training and 4 test prompts
    ]
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in pairs), "utf-8")
    plain["fit_reward"] = {
        "helpfulness": {
            "backbone": str(tmp_path / "assets/policy"),
            "kind": "pairs",
            "sources": [{"source": str(file)}],
            "held_out": 3,
            "max_length": 64,
            "head_only": True,
            f"leave_out_{split}": True,
        }
    }
    plain["reward_models"]["helpfulness"] = {"model": "fitted://helpfulness"}
    recipe = load_recipe(str(write_recipe(tmp_path / "tiny.yaml", plain)))
    with RunDir.open(tmp_path / "run", recipe) as run:
        run_stage("fit-reward", run, progress=Progress(quiet=True))
        kept = {
            prompt_key(p.messages)
            for p in read_prompts(run)
            if (p.split == "train") != (split == "train")
        }
    card = read_card(tmp_path / "run/fit-reward/fitted/helpfulness")
    assert card is not None
    assert {*card.train_prompts, *card.held_out_prompts} == kept


@pytest.mark.parametrize(
    "model", ["Qwen/Qwen2.5-0.5B-Instruct", "meta-llama/Llama-3.1-8B-Instruct"]
)
def test_the_full_recipe_takes_another_model_in_one_line(model: str) -> None:
    plain = load_recipe("smollm2")
    other = load_recipe("smollm2", overrides=[f"model={model}"])
    assert other.model_copy(update={"model": plain.model}) == plain
    assert resolve_model(other.model) == model
    assert plain.prompts.n_dev == 40 and plain.steer is not None


@pytest.mark.parametrize(
    ("n", "chosen"), [(1, [0]), (3, [0, 3, 6]), (9, list(range(9))), (20, list(range(9)))]
)
def test_a_part_of_the_prompts_is_spread_over_all(n: int, chosen: list[int]) -> None:
    assert spread(list(range(9)), n) == chosen
