"""Which of the completions that were really sampled a reader can turn the dials over."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from itertools import accumulate

from equipoise.dials.dials import target
from equipoise.report.data import Report
from equipoise.types import Delivery, Finish, Prompt

MAX_PROMPTS = 6
MAX_CHARACTERS = 1200
MAX_BYTES = 1_500_000
_TAGS = 400
"""Bytes of an answer's markup, about."""

Marks = Callable[[Prompt, str], Sequence[tuple[str, str]]]
"""Cuts a completion into pieces, each with ``safe``, ``unsafe`` or nothing."""

_CUT: Mapping[Finish, str] = {
    "stop": "",
    "length": "cut by the token limit",
    "thought": "its thought did not end",
}


@dataclass(frozen=True)
class Answer:
    """One completion, as the page shows it."""

    key: str
    """Method, prompt and levels, as the page's script asks for them."""
    pieces: Sequence[tuple[str, str]]
    scores: Sequence[tuple[str, float, float]]
    """Attribute, asked for, delivered."""
    note: str


@dataclass(frozen=True)
class Sampler:
    """The first repeat's completions of a few prompts, one per method, prompt and cell."""

    methods: Sequence[str]
    shown_first: int
    prompts: Sequence[Prompt]
    answers: Sequence[Answer]
    marked: bool


@dataclass(frozen=True)
class Texts:
    """What a page with text may show."""

    deliveries: Mapping[str, Sequence[Delivery]]
    """Method to its deliveries."""
    prompts: Mapping[str, Prompt]
    """By id."""
    marks: Marks | None = None


def sampler(report: Report, texts: Texts) -> Sampler | None:
    """Choose what is shown: the first prompts by id, not the ones that look best.

    Returns:
        ``None`` where there is nothing to show; at most about ``MAX_BYTES`` of text otherwise, so
        that the page stays under 5 MB with any number of methods, in any script.
    """
    methods = {
        method: {(d.prompt_id, d.setting.levels): d for d in rows if _shown(d)}
        for method, rows in texts.deliveries.items()
        if method in report.methods
    }
    answered = {prompt_id for rows in methods.values() for prompt_id, _ in rows}
    ids = sorted(answered & set(texts.prompts))[:MAX_PROMPTS]
    sizes = [
        sum(_size(d) for rows in methods.values() for (owner, _), d in rows.items() if owner == one)
        for one in ids
    ]
    ids = [one for n, (one, size) in enumerate(zip(ids, accumulate(sizes), strict=True))
           if not n or size < MAX_BYTES]  # fmt: skip
    if not ids:
        return None
    answers = [
        _answer(f"{m}|{p}|{','.join(map(str, setting))}", found, report, texts)
        for m, rows in enumerate(methods.values())
        for p, prompt_id in enumerate(ids)
        for (owner, setting), found in sorted(rows.items(), key=lambda row: str(row[0]))
        if owner == prompt_id
    ]
    names = list(methods)
    return Sampler(
        names,
        names.index("tuned") if "tuned" in names else len(names) - 1,
        [_cut(texts.prompts[one]) for one in ids],
        answers,
        texts.marks is not None,
    )


def _shown(delivery: Delivery) -> bool:
    return delivery.repeat == 0 and delivery.setting.is_cell


def _size(delivery: Delivery) -> int:
    return len(escape(delivery.text[:MAX_CHARACTERS]).encode()) + _TAGS


def _cut(prompt: Prompt) -> Prompt:
    messages = (replace(m, content=m.content[:MAX_CHARACTERS]) for m in prompt.messages)
    return replace(prompt, messages=tuple(messages))


def _answer(key: str, found: Delivery, report: Report, texts: Texts) -> Answer:
    text = found.text[:MAX_CHARACTERS]
    scores = found.unit.get(report.judge, {})
    return Answer(
        key,
        texts.marks(texts.prompts[found.prompt_id], text) if texts.marks else [(text, "")],
        [
            (name, target(level, report.levels), scores[name])
            for name, level in zip(report.attributes, found.setting.levels, strict=True)
            if level is not None and name in scores
        ],
        _CUT[found.finish],
    )
