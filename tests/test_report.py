"""The page as a stranger's browser sees it, and the promise of a report without text."""

from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

from equipoise.dials.dials import Dials
from equipoise.evaluate.measure import measure
from equipoise.evaluate.metrics import chance_leakage
from equipoise.report.canvas import colours, heatmap, label, markers, written
from equipoise.report.figures_data import losses
from equipoise.report.render import plain, render
from equipoise.report.sampler import MAX_BYTES, sampler
from equipoise.stats import Bootstrap
from eval_kit import (
    ATTRIBUTES,
    deliveries_from,
    prompt,
    synthetic_deliveries,
    synthetic_report,
    targets,
)
from leaks import shared_runs

HOSTILE = '</div><script>alert(1)</script><img src="https://x.example/a" onerror="alert(2)">'
SECRET = "seven silver foxes quietly carried the old lantern across nine frozen rivers"
PROMPTS = {
    f"p{p:03d}": prompt(f"p{p:03d}", text=f"{HOSTILE} why did {SECRET} tonight?") for p in range(6)
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, dict]:
    """Render one report with text and one without; three levels keep it quick."""
    deliveries = synthetic_deliveries(prompts=6, levels=3, text=f"{HOSTILE} {SECRET} and left")
    deliveries = {name: deliveries[name] for name in ("start", "rerank16", "tuned")}
    report = synthetic_report(deliveries, levels=3)
    report["recipe"]["description"] = HOSTILE
    report["n"][HOSTILE] = HOSTILE
    report["losses"]["exmate, w = 1"]["loss"][3] = float("nan")
    folders = []
    for text in (True, False):
        out = tmp_path_factory.mktemp("report") / "out"
        render(report, out, text=text, deliveries=deliveries, prompts=PROMPTS)
        folders.append(out)
    return folders[0], folders[1], report


class Page(HTMLParser):
    """Collects tags and the values of everything that could load or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.handlers: list[str] = []
        self.policy = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        found = dict(attrs)
        if found.get("http-equiv") == "Content-Security-Policy":
            self.policy = found["content"] or ""
        self.loads += [v or "" for k, v in attrs if k in ("src", "href", "srcset", "data")]
        self.handlers += [k for k, _ in attrs if k.startswith("on")]


@pytest.mark.parametrize("which", [0, 1])
def test_page_is_self_contained_and_runs_only_its_own_script(
    made: tuple[Path, Path, dict], which: int
) -> None:
    html = (made[which] / "report.html").read_text("utf-8")
    page = Page(html)
    assert len(html.encode()) < 5_000_000
    assert page.tags.count("script") == 1
    assert page.handlers == []
    assert page.loads and all(v.startswith("data:image/svg+xml;base64,") for v in page.loads)
    assert page.policy.startswith("default-src 'none'")
    assert "$" not in html.split("<script>")[0].split("</style>")[1]
    assert ("sampler" in html.split("<script>")[0].split("</style>")[1]) == (which == 0)


def test_without_text_no_eight_words_get_out(made: tuple[Path, Path, dict]) -> None:
    texts = [prompt.messages[-1].content for prompt in PROMPTS.values()]
    texts += [f"{name}: {HOSTILE} {SECRET} and left" for name in made[2]["methods"]]

    def outputs(folder: Path) -> list[str]:
        found = []
        for path in sorted(p for p in folder.rglob("*") if p.is_file()):
            found.append(path.read_bytes().decode("utf-8", "replace"))
            if path.suffix == ".html":
                images = Page(found[-1]).loads
                found += [base64.b64decode(v.split(",", 1)[1]).decode("utf-8") for v in images]
        return found

    assert len(outputs(made[1])) > 30
    # The description is the recipe's own text, not a prompt: the markup alone is no run of eight.
    assert (
        shared_runs(outputs(made[1]), [SECRET, *(t.replace(HOSTILE, "") for t in texts)]) == set()
    )
    assert shared_runs(outputs(made[0]), texts)  # the check can fail


def test_shared_runs_counts_words_not_marks() -> None:
    assert shared_runs(["One, two -- THREE four"], ["zero one two three four"], words=4)
    assert not shared_runs(["one two three"], ["one two three four"], words=4)
    assert not shared_runs(["one two x three four"], ["one two three four"], words=4)


def test_every_figure_is_there_as_png_and_svg(made: tuple[Path, Path, dict]) -> None:
    names = {path.stem for path in (made[0] / "figures").glob("*.svg")}
    assert names == {path.stem for path in (made[0] / "figures").glob("*.png")}
    expected = {"control", "response", "posterior", "coverage", "leakage", "fluency"}
    expected |= {"pool", "backdoor", "losses"}
    assert names == {*expected, *(f"cells_{name}" for name in made[2]["methods"])}
    for path in (made[0] / "figures").glob("*.png"):
        assert path.read_bytes()[:4] == b"\x89PNG"


def test_json_is_strict_and_draws_the_same_page_again(
    made: tuple[Path, Path, dict], tmp_path: Path
) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    text = (made[1] / "report.json").read_text("utf-8")
    report = json.loads(text, parse_constant=refuse)
    assert report["losses"]["exmate, w = 1"]["loss"][3] is None
    tuned = report["methods"]["tuned"]["generalization"]
    assert (
        tuned["mp"]["safety"]["value"]
        == made[2]["methods"]["tuned"]["generalization"].mp["safety"].value
    )
    assert np.array(tuned["joint"]).shape == (9, 9)
    again = render(report, tmp_path, text=False)
    assert again.read_bytes() == (made[1] / "report.html").read_bytes()
    assert (tmp_path / "report.json").read_text("utf-8") == text


def test_the_headline_says_what_was_measured(made: tuple[Path, Path, dict]) -> None:
    html = (made[1] / "report.html").read_text("utf-8")
    control = made[2]["methods"]["tuned"]["generalization"]
    assert f'<b class="big">{control.mp["helpfulness"].value:.2f}</b>' in html
    assert "over 6 unseen prompts" in html
    assert f"{control.response['safety'][-1].value:.2f}" in html
    assert "attainable ceiling" in html
    best = made[2]["ceiling"]["generalization"].range["safety"].value
    assert f"<td>{control.range['safety'].value / best:.0%}</td>" in html
    assert f"deaf to all dials is {chance_leakage(9):.2f}" in html


def test_a_judge_that_training_used_is_named_above_all_figures(
    made: tuple[Path, Path, dict], tmp_path: Path
) -> None:
    said = "judges that no training saw"
    assert said in (made[1] / "report.html").read_text("utf-8")
    same = {"safety": "reward model safety"}
    html = render({**made[2], "judges_in_training": same}, tmp_path, text=False).read_text("utf-8")
    assert "judge safety is reward model safety" in html
    assert html.index("Not a measure of generalization") < html.index("<figure>")
    assert "scored by judges, of which safety took part in training" in html
    assert said not in html
    both = dict.fromkeys(ATTRIBUTES, "reward model safety")
    html = render({**made[2], "judges_in_training": both}, tmp_path, text=False).read_text("utf-8")
    assert "scored by judges that are the training reward models" in html


def test_captions_claim_what_is_so(made: tuple[Path, Path, dict]) -> None:
    html = (made[1] / "report.html").read_text("utf-8")
    assert "the last panel" not in html  # of the losses: the pull is not always the last
    assert "no more control than that" not in html


def test_three_dials_get_the_figures_that_can_be_drawn(tmp_path: Path) -> None:
    names = ["helpfulness", "safety", "tone"]
    unit = np.broadcast_to(targets(3, 3), (1, 2, 27, 3))
    rows = deliveries_from(unit, levels=3)
    control = measure(rows, judge="optimization", dials=Dials(names, 3), bootstrap=Bootstrap(10))
    quality = {"fluency": [{"value": 0.0}] * 27, "fluency_mean": {"value": 0.0}}
    method = {"optimization": plain(control), "generalization": None, "quality": quality}
    report = {"recipe": {"attributes": names, "levels": 3}, "methods": {"start": method}}
    render(report, tmp_path, text=True)
    drawn = {path.stem for path in (tmp_path / "figures").glob("*.svg")}
    assert drawn == {"control", "response", "posterior", "leakage"}


def test_a_bare_report_leaves_out_what_is_missing(tmp_path: Path) -> None:
    unit = np.broadcast_to(targets(3, 1), (1, 2, 3, 1))
    rows = deliveries_from(unit, levels=3)
    control = measure(
        rows, judge="optimization", dials=Dials(["helpfulness"], 3), bootstrap=Bootstrap(10)
    )
    report = {
        "recipe": {"attributes": ["helpfulness"], "levels": 3},
        "methods": {"a/../b": {"optimization": plain(control), "generalization": None}},
    }
    html = render(report, tmp_path, text=True).read_text("utf-8")
    assert {path.stem for path in (tmp_path / "figures").glob("*.svg")} == {
        "control",
        "response",
        "posterior",
    }
    assert "the training judges" in html


def test_a_run_without_counterfactual_has_one_line_and_no_empty_panel() -> None:
    nothing = [None, None]
    run = {"step": [1, 2], "loss": [2.0, 1.0], "asked": [-2.0, -1.0]}
    report = {"losses": {"clm": {**run, "counterfactual": nothing, "pull": nothing}}}
    axes = losses(report, "generalization").axes
    assert [len(ax.lines) for ax in axes] == [2, 2]  # single steps and the smooth line


def test_sampler_holds_every_cell_and_stays_small(made: tuple[Path, Path, dict]) -> None:
    html = (made[0] / "report.html").read_text("utf-8")
    assert html.count('class="answer"') == 3 * 6 * 9
    assert html.count('data-key="2|0|2,1"') == 1
    long = synthetic_deliveries(prompts=6, levels=5, text="漢" * 5000)
    assert len(sampler(made[2], "generalization", long, PROMPTS).encode()) < 1.3 * MAX_BYTES


def test_blank_cells_are_drawn_blank() -> None:
    values = np.array([[0.0, 40.0], [0.4, np.nan]])
    axes = Figure().subplots()
    heatmap(axes, values)
    assert sorted(text.get_text() for text in axes.texts) == ["40", "<1"]
    shown = axes.images[0].get_array()
    assert np.ma.getmaskarray(shown).tolist() == [[True, False], [False, True]]  # (y, x)


def test_colours_and_names() -> None:
    methods = ["start", "prompting", "rerank8", "rerank16", "tuned", "clm"]
    assert len(set(colours(methods).values())) == len(set(markers(methods).values())) == 6
    assert label("rerank16") == "reranking, N = 16"
    assert label("reranker") == "reranker"
    assert written(-0.001) == "0.00"
    assert written(-0.25) == "−0.25"
    assert written(0.04, "{:+.1f}") == "0.0"


def test_no_global_state_is_left_behind(made: tuple[Path, Path, dict]) -> None:
    assert matplotlib.rcParams["svg.fonttype"] == matplotlib.rcParamsDefault["svg.fonttype"]
    assert tuple(made[2]["recipe"]["attributes"]) == ATTRIBUTES


def test_a_stage_that_nobody_planned_shows_no_plan() -> None:
    from equipoise.report.checks import _minutes

    shown = _minutes({"stages": {"score": 0.2, "tune": 2.14}, "planned": {"tune": 2.0}})
    rows = re.findall(r"<tr>(?:<t[dh][^>]*>.*?</t[dh]>)+</tr>", shown)
    cells = [re.sub("<[^>]+>", " ", row).split() for row in rows]
    assert ["score", "–", "0.2"] in cells and ["tune", "2.0", "2.1"] in cells
