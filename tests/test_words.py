"""README and the user pages are plain: short sentences, no private words, no machine's paths.

User pages are all of ``docs/`` but the log and the design notes: those two say how things came to
be, so their words and sentences are free. What is counted in lines is counted for all pages.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
HISTORY = {"log.md", "design-notes.md"}
PLAIN = [ROOT / "README.md", *(page for page in DOCS if page.name not in HISTORY)]

MAX_WORDS = 30
MAX_README = 100
MAX_DOCS = 2115
"""Lines of all pages but the log, which grows with every experiment (2,400 with it, 2026-11-30)."""
MAX_PAGE = 80
"""Lines of a page; a new page has no more."""
LONG = {
    "dials.md": 127,
    "evaluate.md": 106,
    "paper-study.md": 142,
    "real-models.md": 107,
    "rlhf.md": 90,
    "serving.md": 255,
    "smollm2.md": 157,
    "tune.md": 98,
}
"""Older pages that are longer, and how long: a number here may fall, and none may be added."""

BANNED = {
    r"\bdeaf(ness)?\b": "a model that ignores its dials",
    r"\bdoors?\b": "the server; `backdoor` where the prompt predicts the setting",
    r"\b(un)?seal(s|ed|ing)?\b": "what is replaced, and by what",
    r"\bbabbl\w*": "text that nobody can read",
    r"\bdisturb\w*": "what a control token changes beside the direction",
    r"\bsteered starts?\b": "steering distilled into control tokens",
    r"\bthe start\b(?!\s+(model|token))": "the start model, the beginning, or a stage by its name",
    r"\bbench(es)?\b": "the evaluation, the study or the benchmark by its name",
    r"\bthe page\b": "the report, or this page",
    r"\bby our notes\b": "nothing: where a figure comes from belongs in the log",
    r"\bguessed\b": "nothing: how a figure was found belongs in the log",
}
"""Private words, and what to write in their place."""
_MACHINE = re.compile(r"(?<![\w.:/])/(?:home|root|tmp|work|Users|mnt)/\w")

_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
_COMMENT = re.compile(r"<!--.*?-->", re.DOTALL)
_CODE = re.compile(r"`[^`\n]+`")
_LINK = re.compile(r"!?\[([^\]]*)\]\([^)\s]+\)")
_ITEM = re.compile(r"\s*(?:[-*+]|\d+\.)\s+")
_NO_END = re.compile(r"(?:\b(?:e\.g|i\.e|et al|vs|cf|Fig|No)|\b[A-Z])\.$")

plain_pages = pytest.mark.parametrize("page", PLAIN, ids=lambda page: page.name)


def prose(text: str) -> list[str]:
    """Return the paragraphs, list items and headings of Markdown, without code and tables.

    A piece of code counts as one word; of a link its text is left.
    """
    text = _COMMENT.sub("", _FENCE.sub("", text))
    text = _LINK.sub(r"\1", _CODE.sub("CODE", text))
    found: list[str] = []
    fresh = True
    for line in text.splitlines():
        if not line.strip() or (line.startswith(("|", "    ")) and fresh):
            fresh = True
        elif line.startswith("#"):
            found.append(line.lstrip("# "))
            fresh = True
        elif fresh or _ITEM.match(line):
            mark = _ITEM.match(line)
            found.append(line[mark.end() if mark else 0 :].strip())
            fresh = False
        else:
            found[-1] += " " + line.strip()
    return found


def sentences(paragraph: str) -> list[str]:
    """Split a paragraph behind ``.``, ``!`` or ``?`` that a space and a new sentence follow.

    Quotes, brackets and emphasis may stand between. A number or a small letter begins none, unless
    a question or an exclamation mark ends the one before; an abbreviation ends none.
    """
    found: list[str] = []
    begin = 0
    for mark in re.finditer(r"[.!?][\"'”’)*_\]]*\s+(?=[\"'“‘(*_\[]*[A-ZÄ-ÞΑ-Ω])", paragraph):
        if not _NO_END.search(paragraph[begin : mark.start() + 1]):
            found.append(paragraph[begin : mark.end()].strip())
            begin = mark.end()
    return [*found, paragraph[begin:].strip()]


def words(sentence: str) -> list[str]:
    return [word for word in sentence.split() if re.search(r"\w", word)]


def test_sentences_are_told_apart() -> None:
    text = 'It rose by .3. "Why?" we asked. See Tuan et al. (2024), e.g. Table 2. **Bold.** So.'
    assert sentences(text) == [
        "It rose by .3.",
        '"Why?" we asked.',
        "See Tuan et al. (2024), e.g. Table 2.",
        "**Bold.**",
        "So.",
    ]
    assert sentences("One setting, level 1.5 of 4") == ["One setting, level 1.5 of 4"]
    assert sentences("What for? Nothing! (Really.) *Yes.*") == [
        "What for?",
        "Nothing!",
        "(Really.)",
        "*Yes.*",
    ]
    assert words("a `b` – c, and [d] ...") == ["a", "`b`", "c,", "and", "[d]"]


def test_prose_is_what_is_left_without_code_and_tables() -> None:
    page = """# A head

First line
goes on with `some code` and [a *link*](page.md#there).

| a | b |
| - | - |

- one item
  of two lines
1. another
```sh
not this
```
<!-- nor this -->

    nor a formula

Last.
"""
    assert prose(page) == [
        "A head",
        "First line goes on with CODE and a *link*.",
        "one item of two lines",
        "another",
        "Last.",
    ]


@plain_pages
def test_no_sentence_is_long(page: Path) -> None:
    every = [one for part in prose(page.read_text("utf-8")) for one in sentences(part)]
    long = [f"{len(words(one))} words: {one}" for one in every if len(words(one)) > MAX_WORDS]
    assert long == []


@plain_pages
def test_no_private_word_is_used(page: Path) -> None:
    text = _LINK.sub(r"\1", _CODE.sub("CODE", _FENCE.sub("", page.read_text("utf-8"))))
    found = [
        f"{match[0]!r}: write {instead}"
        for banned, instead in BANNED.items()
        for match in re.finditer(banned, text, re.IGNORECASE)
    ]
    assert found == []


def test_a_private_word_is_found() -> None:
    for text in ("Deaf models", "through the door", "a seal", "we babbled", "At the start,"):
        assert any(re.search(banned, text, re.IGNORECASE) for banned in BANNED), text
    for text in ("the start model", "start here", "backdoor", "this page", "a benchmark"):
        assert not any(re.search(banned, text, re.IGNORECASE) for banned in BANNED), text


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *DOCS, ROOT / "CITATION.cff"], ids=str)
def test_no_path_of_a_machine_is_named(page: Path) -> None:
    assert _MACHINE.findall(page.read_text("utf-8")) == []


def lines(page: Path) -> int:
    return len(page.read_text("utf-8").splitlines())


def test_readme_and_docs_stay_short() -> None:
    assert lines(ROOT / "README.md") <= MAX_README
    assert sum(lines(page) for page in DOCS if page.name != "log.md") <= MAX_DOCS


@pytest.mark.parametrize("page", DOCS, ids=lambda page: page.name)
def test_a_page_is_short_or_on_the_list(page: Path) -> None:
    assert page.name == "log.md" or lines(page) <= LONG.get(page.name, MAX_PAGE)


def test_the_list_of_long_pages_shrinks_with_them() -> None:
    found = {page.name: lines(page) for page in DOCS}
    assert set(LONG) <= set(found)
    loose = {name: found[name] for name, most in LONG.items() if most - found[name] >= 5}
    assert loose == {}
    assert [name for name, most in LONG.items() if most <= MAX_PAGE] == []
