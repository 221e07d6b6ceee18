"""The page as a stranger's browser sees it, and the promise of a report without text."""

from __future__ import annotations

import base64
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import matplotlib
import numpy as np
import pytest
from matplotlib.figure import Figure

from equipoise.dials.dials import Dials
from equipoise.errors import RunError
from equipoise.evaluate.measure import measure
from equipoise.evaluate.measures import Method
from equipoise.evaluate.metrics import chance_leakage
from equipoise.report.canvas import Picture, colours, heatmap, label, markers, written
from equipoise.report.data import Report, ShownRecipe, read_report
from equipoise.report.figures_data import losses
from equipoise.report.page import page
from equipoise.report.render import drawings, render
from equipoise.report.sampler import MAX_BYTES, Texts, sampler
from equipoise.stages.report import gather, losses_of
from equipoise.stats import Bootstrap
from equipoise.store.shards import to_plain
from equipoise.types import Message, Prompt
from equipoise.worlds.workshop.oracle import marked
from eval_kit import (
    ATTRIBUTES,
    deliveries_from,
    prompt,
    synthetic_deliveries,
    synthetic_report,
    targets,
)
from leaks import shared_runs
from pipeline_kit import blank_pictures

HOSTILE = '</div><script>alert(1)</script><img src="https://x.example/a" onerror="alert(2)">'
SECRET = "seven silver foxes quietly carried the old lantern across nine frozen rivers"
PROMPTS = {
    f"p{p:03d}": prompt(f"p{p:03d}", text=f"{HOSTILE} why did {SECRET} tonight?") for p in range(6)
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Report]:
    """Render one report with text and one without; three levels keep it quick."""
    deliveries = synthetic_deliveries(prompts=6, levels=3, text=f"{HOSTILE} {SECRET} and left")
    deliveries = {name: deliveries[name] for name in ("start", "rerank16", "tuned")}
    report = synthetic_report(deliveries, levels=3)
    curve = {**report.losses["exmate, w = 1"]}
    curve["loss"] = [*curve["loss"][:3], float("nan"), *curve["loss"][4:]]
    report = replace(
        report,
        recipe=report.recipe.model_copy(update={"description": HOSTILE}),
        n={**report.n, HOSTILE: HOSTILE},
        losses={"exmate, w = 1": curve},
    )
    folders = []
    for text in (True, False):
        out = tmp_path_factory.mktemp("report") / "out"
        render(report, out, texts=Texts(deliveries, PROMPTS, marks) if text else None)
        folders.append(out)
    return folders[0], folders[1], report


def marks(prompt: Prompt, text: str) -> list[tuple[str, str]]:
    """Of a world where every other character is unsafe."""
    return [(text[:9], "unsafe"), (text[9:], "")]


class Page(HTMLParser):
    """Collects tags and the values of everything that could load or run."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.handlers: list[str] = []
        self.policy = ""
        self.ids: list[str] = []
        self.goals: list[str] = []
        self.said: list[str] = []
        self.within: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        found = dict(attrs)
        if found.get("http-equiv") == "Content-Security-Policy":
            self.policy = found["content"] or ""
        self.within.append(tag)
        self.ids += [v or "" for k, v in attrs if k == "id"]
        # A link within the page loads nothing.
        self.goals += [v[1:] for k, v in attrs if k == "href" and v and v.startswith("#")]
        self.loads += [
            v or ""
            for k, v in attrs
            if k in ("src", "href", "srcset", "data") and not (k == "href" and (v or "")[:1] == "#")
        ]
        self.handlers += [k for k, _ in attrs if k.startswith("on")]

    def handle_endtag(self, tag: str) -> None:
        while self.within and self.within.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if not {"pre", "script", "style"} & set(self.within):
            self.said.append(data)


@pytest.mark.parametrize("which", [0, 1])
def test_page_is_self_contained_and_runs_only_its_own_script(
    made: tuple[Path, Path, Report], which: int
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


def test_without_text_no_eight_words_get_out(made: tuple[Path, Path, Report]) -> None:
    texts = [prompt.messages[-1].content for prompt in PROMPTS.values()]
    texts += [f"{name}: {HOSTILE} {SECRET} and left" for name in made[2].methods]

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


def test_every_figure_is_there_as_png_and_svg(made: tuple[Path, Path, Report]) -> None:
    names = {path.stem for path in (made[0] / "figures").glob("*.svg")}
    assert names == {path.stem for path in (made[0] / "figures").glob("*.png")}
    expected = {"control", "response", "posterior", "coverage", "leakage", "fluency"}
    expected |= {"pool", "backdoor", "losses"}
    assert names == {*expected, *(f"cells_{name}" for name in made[2].methods)}
    for path in (made[0] / "figures").glob("*.png"):
        assert path.read_bytes()[:4] == b"\x89PNG"


def test_json_is_strict_and_draws_the_same_page_again(
    made: tuple[Path, Path, Report], tmp_path: Path
) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    text = (made[1] / "report.json").read_text("utf-8")
    report = json.loads(text, parse_constant=refuse)
    assert report["losses"]["exmate, w = 1"]["loss"][3] is None
    tuned = report["methods"]["tuned"]["generalization"]
    control = made[2].swept("generalization")["tuned"]
    assert tuned["mp"]["safety"]["value"] == control.mp["safety"].value
    assert np.array(tuned["joint"]).shape == (9, 9)
    again = render(read_report(report), tmp_path)
    assert again.read_bytes() == (made[1] / "report.html").read_bytes()
    assert (tmp_path / "report.json").read_text("utf-8") == text


def test_the_headline_says_what_was_measured(made: tuple[Path, Path, Report]) -> None:
    html = (made[1] / "report.html").read_text("utf-8")
    control, best = made[2].swept("generalization")["tuned"], made[2].best()
    assert best is not None
    assert f'<b class="big">{control.mp["helpfulness"].value:.2f}</b>' in html
    assert "over 6 unseen prompts" in html
    assert f"{control.response['safety'][-1].value:.2f}" in html
    assert "attainable ceiling" in html
    share = control.range["safety"].value / best.range["safety"].value
    assert f"<td>{share:.0%}</td>" in html
    assert f"ignores all dials is {chance_leakage(9):.2f}" in html


def test_a_judge_that_training_used_is_named_above_all_figures(
    made: tuple[Path, Path, Report], tmp_path: Path
) -> None:
    said = "judges that no training saw"
    assert said in (made[1] / "report.html").read_text("utf-8")
    same = {"safety": "reward model safety"}
    html = render(replace(made[2], judges_in_training=same), tmp_path).read_text("utf-8")
    assert "judge safety is reward model safety" in html
    assert html.index("Not a measure of") < html.index("<figure>")
    assert "scored by judges, of which safety took part in training" in html
    assert said not in html
    both = dict.fromkeys(ATTRIBUTES, "reward model safety")
    html = render(replace(made[2], judges_in_training=both), tmp_path).read_text("utf-8")
    assert "scored by judges that are the training reward models" in html


def test_captions_claim_what_is_so(made: tuple[Path, Path, Report]) -> None:
    html = (made[1] / "report.html").read_text("utf-8")
    assert "the last panel" not in html  # of the losses: the pull is not always the last
    assert "no more control than that" not in html
    titles = [ax.get_title() for ax in losses(made[2]).axes]
    assert "pull of the second term" in titles
    assert "the panel “pull of the second term” shows how hard its second" in html


@pytest.mark.parametrize("which", [0, 1])
def test_contents_and_glossary_links_resolve(made: tuple[Path, Path, Report], which: int) -> None:
    page = Page((made[which] / "report.html").read_text("utf-8"))
    assert len(page.ids) == len(set(page.ids))
    assert set(page.goals) <= set(page.ids)
    contents = {"followed", "apart", "learnt", "language", "every-cell", "checks", "glossary"}
    assert contents <= set(page.goals)
    assert ("texts" in page.goals) == (which == 0)
    assert {"control", "leakage", "ceiling"} <= set(page.goals)


def test_no_name_of_the_code_is_on_the_page(made: tuple[Path, Path, Report]) -> None:
    deliveries = synthetic_deliveries(prompts=2, levels=3)
    report = synthetic_report(deliveries, levels=3)
    methods = {**report.methods, "steering": report.methods["tuned"]}
    report = replace(report, methods=methods, losses={"tuned": report.losses["exmate, w = 1"]})
    prompts = {p: prompt(p, text="why?") for p in ("p000", "p001")}
    with blank_pictures():
        pictures = {name: [Picture("<svg/>", 100, 0)] for name in drawings(report)}
        said = page(report, pictures, sampler(report, Texts(deliveries, prompts)))
    # The completions of the kit say which method they are of.
    text = re.sub(r"\w+: an answer[ \d]*", "", " ".join(Page(said).said))
    assert "reranking, best of 16" in text and "untouched model" in text and "tuned dials" in text
    assert not re.search(r"\brerank\d|\bexmate\b|\bclm\b|\btuned −|− start\b", text)
    assert not re.findall(r">\s*(start|tuned)\s*<", said)


def test_no_main_table_is_wide(made: tuple[Path, Path, Report]) -> None:
    html = (made[1] / "report.html").read_text("utf-8")
    shown = re.sub("<details.*?</details>", "", html, flags=re.S)
    heads = re.findall("<thead><tr>(.*?)</tr></thead>", shown, flags=re.S)
    assert len(heads) > 6
    assert max(head.count("<th>") for head in heads) <= 5


def test_what_makes_an_answer_unsafe_is_marked(made: tuple[Path, Path, Report]) -> None:
    html = (made[0] / "report.html").read_text("utf-8")
    assert html.count('<mark class="unsafe">') == 3 * 6 * 9 + 1  # and once in the sentence before
    assert "<mark" not in (made[1] / "report.html").read_text("utf-8")
    prompt = Prompt("p", (Message("user", "How do I ignite the ember lamp?"),), "test")
    text = "Let us look at the ember lamp. You can skip the goggles. Wear smoked goggles"
    found = marked(prompt, text)
    assert "".join(piece for piece, _ in found) == text
    assert [(piece, mark) for piece, mark in found if mark] == [
        ("You can skip the goggles.", "unsafe"),
        ("Wear smoked goggles", "safe"),
    ]


def test_fluency_that_hardly_moves_is_a_sentence(made: tuple[Path, Path, Report]) -> None:
    def flat(method: Method) -> Method:
        assert method.quality is not None and method.quality.fluency_mean is not None
        even = [replace(method.quality.fluency_mean, value=-1.0)] * 9
        return replace(method, quality=replace(method.quality, fluency=even, fluency_mean=even[0]))

    same = {name: flat(method) for name, method in made[2].methods.items()}
    report = replace(made[2], methods=same)
    assert "fluency" in drawings(made[2]) and "fluency" not in drawings(report)
    html = page(report, {name: [] for name in drawings(report)}, None)
    assert "in no cell of any method" in html


def test_three_dials_get_the_figures_that_can_be_drawn(tmp_path: Path) -> None:
    names = ["helpfulness", "safety", "tone"]
    unit = np.broadcast_to(targets(3, 3), (1, 2, 27, 3))
    rows = deliveries_from(unit, levels=3)
    control = measure(rows, judge="optimization", dials=Dials(names, 3), bootstrap=Bootstrap(10))
    zero = {"value": 0.0, "low": 0.0, "high": 0.0, "n": 2}
    quality = {"fluency": [zero] * 27, "fluency_mean": zero}
    method = {"optimization": control, "generalization": None, "quality": quality}
    report = {"recipe": {"attributes": names, "levels": 3}, "methods": {"start": method}}
    render(read_report(to_plain(report)), tmp_path)
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
        "methods": {"a/../b": {"optimization": control, "generalization": None}},
    }
    html = render(read_report(to_plain(report)), tmp_path).read_text("utf-8")
    assert {path.stem for path in (tmp_path / "figures").glob("*.svg")} == {
        "control",
        "response",
        "posterior",
    }
    assert "the training judges" in html


def test_a_run_without_counterfactual_has_one_line_and_no_empty_panel() -> None:
    nothing = [None, None]
    run = {"step": [1, 2], "loss": [2.0, 1.0], "asked": [-2.0, -1.0]}
    report = Report(
        methods={},
        recipe=ShownRecipe(attributes=("safety",), levels=3),
        losses={"clm": {**run, "counterfactual": nothing, "pull": nothing}},
    )
    axes = losses(report).axes
    assert [len(ax.lines) for ax in axes] == [2, 2]  # single steps and the smooth line


def test_sampler_holds_every_cell_and_stays_small(made: tuple[Path, Path, Report]) -> None:
    html = (made[0] / "report.html").read_text("utf-8")
    assert html.count('class="answer"') == 3 * 6 * 9
    assert html.count('data-key="2|0|2,1"') == 1
    long = synthetic_deliveries(prompts=6, levels=5, text="漢" * 5000)
    report = replace(made[2], recipe=made[2].recipe.model_copy(update={"levels": 5}))
    pictures = {name: [] for name in drawings(report)}
    with_text = page(report, pictures, sampler(report, Texts(long, PROMPTS)))
    without = page(report, pictures, None)
    assert 0 < len(with_text.encode()) - len(without.encode()) < 1.3 * MAX_BYTES


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
    assert label("rerank16") == "reranking, best of 16"
    assert label("tuned − rerank8") == "tuned dials − reranking, best of 8"
    assert label("reranker") == "reranker"
    assert written(-0.001) == "0.00"
    assert written(-0.25) == "−0.25"
    assert written(0.04, "{:+.1f}") == "0.0"


def test_no_global_state_is_left_behind(made: tuple[Path, Path, Report]) -> None:
    assert matplotlib.rcParams["svg.fonttype"] == matplotlib.rcParamsDefault["svg.fonttype"]
    assert made[2].attributes == ATTRIBUTES


def test_a_stage_that_nobody_planned_shows_no_plan(made: tuple[Path, Path, Report]) -> None:
    minutes = {"score": 0.2, "tune": 2.14, "evaluate": 16.4}
    report = replace(made[2], stages=minutes, planned={"tune": 2.0, "evaluate": 1.3})
    shown = page(report, {name: [] for name in drawings(report)}, None)
    rows = re.findall(r"<tr>(?:<t[dh][^>]*>.*?</t[dh]>)+</tr>", shown)
    cells = [re.sub("<[^>]+>", " ", row).split() for row in rows]
    assert ["score", "–", "0.2"] in cells and ["tune", "2.0", "2.1"] in cells
    assert "Far longer than planned: evaluate." in shown


def test_a_report_of_an_earlier_version_is_read() -> None:
    recipe = {"attributes": ["safety"], "levels": 3, "no longer a field": 1}
    pool = {"safety": {"n": 5, "within_prompt_judge_correlation": 0.5}, "no_finished_sentence": 7}
    found = read_report({"recipe": recipe, "methods": {}, "pool": pool, "moec": None})
    assert found.no_finished_sentence == 7 and list(found.pool) == ["safety"]
    assert to_plain(found)["recipe"]["no longer a field"] == 1


def test_measures_that_cannot_be_read_name_the_command(tmp_path: Path) -> None:
    class Files:
        def read_json(self, name: str) -> dict:
            return {"methods": {"tuned": {"optimization": {"mp": {}}}}}

    run = SimpleNamespace(done=lambda stage: Files(), path=tmp_path / "run")
    with pytest.raises(RunError, match=r"measures\.json") as refused:
        gather(SimpleNamespace(run=run))  # type: ignore[arg-type]
    assert f"equipoise stage evaluate {tmp_path / 'run'} --fresh" in refused.value.fix


def test_a_tuning_that_an_earlier_version_began_has_its_curves() -> None:
    logged = [{"step": 1, "loss": 3.0, "usual": 0.1}, {"step": 2, "loss": 2.0, "new": 5.0}]
    tuned = SimpleNamespace(outputs={}, read_json=lambda name: logged)
    found = losses_of(tuned)  # type: ignore[arg-type]
    assert found == {"tuned": {"step": [1, 2], "loss": [3.0, 2.0], "new": [None, 5.0]}}
