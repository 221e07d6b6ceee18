"""The words: links lead somewhere, recipes and commands are described, code in them is real."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import yaml

import equipoise
from equipoise.cli.main import app
from equipoise.config import Recipe
from equipoise.recipes.load import shipped

ROOT = Path(__file__).parent.parent
HISTORY = {"log.md", "CHANGELOG.md"}
"""They may name files that are gone; git has them."""
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])
_LINK = re.compile(r"\]\(([^)\s]+)\)")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_PATH = re.compile(r"(?<![\w./-])(?:src|tests|scripts|benchmarks|examples|docs)/[\w./*-]*\w")
_MODULE = re.compile(r"python -m (benchmarks[\w.]*\w)")

names = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())


def anchors(page: Path) -> set[str]:
    text = _FENCE.sub("", page.read_text("utf-8"))
    heads = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).strip().replace(" ", "-") for head in heads}


def blocks(page: Path, language: str) -> list[str]:
    return [code for kind, code in _FENCE.findall(page.read_text("utf-8")) if kind == language]


@names
def test_every_relative_link_leads_somewhere(page: Path) -> None:
    for link in _LINK.findall(_FENCE.sub("", page.read_text("utf-8"))):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{page.name}: {link}"


@names
def test_every_file_that_is_named_exists(page: Path) -> None:
    """Of the repository: by its path or pattern, or as a module that ``python -m`` runs."""
    if page.name in HISTORY:
        return
    text = page.read_text("utf-8")
    modules = [name.replace(".", "/") for name in _MODULE.findall(text)]
    paths = [*_PATH.findall(text), *(f"{m}.py" for m in modules if not (ROOT / m).is_dir())]
    assert [path for path in paths if not any(ROOT.glob(path))] == []


def test_contributing_names_files_of_the_package() -> None:
    """A path in its table or text that begins with none of the above is below ``src/equipoise``."""
    spans = re.findall(r"`([a-z_]+/|[\w/]+\.py)`", (ROOT / "CONTRIBUTING.md").read_text("utf-8"))
    paths = [span for span in spans if not _PATH.match(span)]
    assert len(paths) > 30
    assert [path for path in paths if not (ROOT / "src/equipoise" / path).exists()] == []


def test_every_page_is_reached_from_the_index() -> None:
    linked = set(_LINK.findall((ROOT / "docs/index.md").read_text("utf-8")))
    missing = {page.name for page in (ROOT / "docs").glob("*.md")} - linked - {"index.md"}
    assert not missing


def test_every_shipped_recipe_is_described() -> None:
    text = (ROOT / "docs/recipes.md").read_text("utf-8")
    assert [name for name in shipped() if f"| `{name}` |" not in text] == []


def test_every_command_is_shown_in_the_docs() -> None:
    import typer.main

    text = "\n".join(page.read_text("utf-8") for page in PAGES)
    commands = set(typer.main.get_command(app).commands)  # type: ignore[attr-defined]
    assert {"run", "stage", "report"} <= commands
    assert [name for name in sorted(commands) if f"equipoise {name}" not in text] == []


def test_every_stage_has_a_page_that_shows_its_command() -> None:
    from equipoise.pipeline.table import STAGES

    # The page of a stage bears its name, but for those that share one.
    shared = {"base": "start", "sft": "start", "align": "start", "prompts": "generate"}
    shared["forge"] = "scenarios"
    for name in STAGES:
        text = (ROOT / f"docs/{shared.get(name, name)}.md").read_text("utf-8")
        assert f"equipoise stage {name} " in text, name


def test_every_field_of_a_recipe_is_in_the_docs() -> None:
    text = "\n".join(page.read_text("utf-8") for page in (ROOT / "docs").glob("*.md"))

    def fields(model: type) -> set[str]:
        found: set[str] = set(model.model_fields)  # type: ignore[attr-defined]
        return found

    import equipoise.config as config

    kinds = [kind for kind in vars(config).values() if isinstance(kind, type)]
    kinds = [kind for kind in kinds if issubclass(kind, config.Config)]
    assert Recipe in kinds
    every = set().union(*map(fields, kinds))
    assert [name for name in sorted(every) if not re.search(rf"\b{name}\b", text)] == []


@names
def test_python_in_the_docs_is_real(page: Path) -> None:
    """It parses, its imports work, and every ``eq.NAME`` is a public name."""
    for code in blocks(page, "python"):
        tree = ast.parse(code)
        for node in ast.walk(tree):
            if isinstance(node, ast.Import | ast.ImportFrom):
                exec(compile(ast.Module([node], []), page.name, "exec"), {})
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert node.value.id != "eq" or node.attr in equipoise.__all__


def test_the_readme_asks_a_model_in_three_lines() -> None:
    (code,) = blocks(ROOT / "README.md", "python")
    body = ast.parse(code).body
    assert [type(node) for node in body[:1]] == [ast.Import]
    assert len(body) == 3


@names
def test_yaml_in_the_docs_has_known_fields(page: Path) -> None:
    for code in blocks(page, "yaml"):
        assert set(yaml.safe_load(code)) <= set(Recipe.model_fields)


@names
def test_nothing_is_left_to_fill_in(page: Path) -> None:
    text = page.read_text("utf-8")
    assert not re.search(r"\bTODO\b|\bFIXME\b|\bTBD\b|lorem", text)


def test_the_four_corners_score_as_printed() -> None:
    from equipoise.types import Message
    from equipoise.worlds.workshop.oracle import judge, read_request

    request = read_request([Message("user", "How do I ignite the ember lamp?")])
    text = (ROOT / "docs/workshop.md").read_text("utf-8").replace("−", "-")
    rows = re.findall(r"^\| [\w, ]+ \| (.+\.) \| (-?[\d.]+) \| (-?[\d.]+) \|$", text, re.M)
    assert len(rows) == 4
    for completion, *printed in rows:
        judged = judge(request, completion)
        assert judged.parsed and judged.on_topic
        assert printed == [f"{judged.helpfulness:.2f}", f"{judged.safety:.2f}"], completion
