"""Data sources to preference pairs and labelled answers, the rows of reward models."""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from equipoise.config import SourceConfig
from equipoise.data.shapes import (
    check_text,
    make_prompt,
    prompt_turns,
    split_answer,
    unknown_shape,
)
from equipoise.data.sources import Place, Row, Skipped, draw, read_items
from equipoise.errors import DataError
from equipoise.overlap import prompt_key
from equipoise.types import PreferencePair, Prompt


@dataclass(frozen=True)
class LabelledAnswer:
    """A completion with an absolute label or score; higher is better."""

    prompt: Prompt
    completion: str
    score: float


_WORKSHOP = "workshop://"
_WORKSHOP_PAIRS = 12_000
"""That world never ends, so a source without limit needs one."""
_SIDES = ("chosen", "rejected")
_ANSWERS = ("response", "completion", "answer", "output")
_SCORES = ("score", "is_safe", "safe", "label")
_WORDS = {"safe": 1.0, "unsafe": 0.0}

_Bounds = tuple[float | None, float | None]
"""``score_min`` and ``score_max`` of a row."""

log = logging.getLogger(__name__)


def load_pairs(
    sources: Sequence[SourceConfig],
    *,
    data: Path | None = None,
    seed: int = 0,
    skipped: Skipped | None = None,
) -> list[PreferencePair]:
    """Load preference pairs; ``workshop://ATTRIBUTE`` for the packaged world.

    Pairs of equal or empty completions, and pairs whose two transcripts disagree on the prompt
    (hub copies of hh-rlhf hold some), are left out and counted in the log.

    Raises:
        DataError: See :func:`equipoise.data.prompts.load_prompts`; or no pair is left.
    """
    pairs: list[PreferencePair] = []
    for source in sources:
        if source.source.startswith(_WORKSHOP):
            from equipoise.worlds import workshop

            attribute = source.source.removeprefix(_WORKSHOP).removeprefix("pairs/")
            limit = source.limit or _WORKSHOP_PAIRS
            pairs += workshop.pairs(attribute, limit=limit, seed=seed)
            continue
        found = read_items(source, _read_pair, data=data, skipped=skipped)
        kept = [pair for pair in found if pair is not None]
        if not kept:
            raise DataError(
                f"No usable pair in {source.source}",
                why="In every row the completions are empty or equal, or the prompts differ.",
                fix="Check `chosen` and `rejected`.",
            )
        if len(kept) < len(found):
            log.warning("%s: %d pairs left out", source.source, len(found) - len(kept))
        pairs += draw(kept, source, seed=seed)
    return pairs


def load_labelled(
    sources: Sequence[SourceConfig],
    *,
    data: Path | None = None,
    seed: int = 0,
    skipped: Skipped | None = None,
) -> list[LabelledAnswer]:
    """Load labelled answers, their scores brought to [0, 1].

    With ``min_score`` a score is 1 from there on, else 0; without, ``score_min`` and ``score_max``
    of the row give the scale, else the least and greatest score of the source do.

    Raises:
        DataError: See :func:`equipoise.data.prompts.load_prompts`; or a source has one score only.
    """
    answers: list[LabelledAnswer] = []
    for source in sources:
        read = read_items(source, _read_labelled, data=data, skipped=skipped)
        answered = [answer for answer, _ in read]
        scores = _scale([a.score for a in answered], [bounds for _, bounds in read], source)
        scaled = [replace(a, score=s) for a, s in zip(answered, scores, strict=True)]
        answers += draw([a for a in scaled if a.completion.strip()], source, seed=seed)
    return answers


def _read_pair(row: Row, where: Place) -> PreferencePair | None:
    if row.get("chosen") is None or row.get("rejected") is None:
        raise unknown_shape(row, where=where)
    own = prompt_turns(row, where=where)
    chosen, rejected = (split_answer(row[side], own, where=where) for side in _SIDES)
    prompt = make_prompt(chosen[0], where)
    same = prompt_key(prompt.messages) == prompt_key(make_prompt(rejected[0], where).messages)
    texts = (chosen[1], rejected[1])
    for text in texts:
        check_text(text, where)
    if not same or not all(text.strip() for text in texts) or texts[0] == texts[1]:
        return None
    return PreferencePair(prompt, *texts)


def _read_labelled(row: Row, where: Place) -> tuple[LabelledAnswer, _Bounds]:
    turns = prompt_turns(row, where=where)
    answer = next((row[f] for f in _ANSWERS if isinstance(row.get(f), str)), None)
    value = next((row[f] for f in _SCORES if row.get(f) is not None), None)
    if turns is not None and answer is None and turns[-1].role == "assistant":
        turns, answer = turns[:-1], turns[-1].content
    if turns is None or answer is None or value is None:
        raise unknown_shape(row, where=where)
    if isinstance(value, str):
        value = _WORDS.get(value.strip().casefold())
    score = _number(value)
    if score is None:
        raise DataError(
            f"{where} has a label that is no score",
            why="A number, true / false, or safe / unsafe is expected.",
            fix="Correct the row.",
        )
    check_text(answer, where)
    bounds = (_bound(row, "score_min", where), _bound(row, "score_max", where))
    return LabelledAnswer(make_prompt(turns, where), answer, score), bounds


def _bound(row: Row, field: str, where: Place) -> float | None:
    if row.get(field) is None:
        return None
    value = _number(row[field])
    if value is None:
        raise DataError(
            f"{where} has a `{field}` that is no number",
            why="It is an end of the scale of `score`.",
            fix="Correct the row, or leave the field out.",
        )
    return value


def _number(value: object) -> float | None:
    """Return a finite number, of a text as well; ``None`` for anything else."""
    try:
        number = float(value) if isinstance(value, int | float | str) else math.nan
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _scale(scores: Sequence[float], bounds: Sequence[_Bounds], source: SourceConfig) -> list[float]:
    """Bring scores to [0, 1]; an end that a row does not give is the source's own."""
    if source.min_score is not None:
        scaled = [float(score >= source.min_score) for score in scores]
    else:
        least, greatest = min(scores), max(scores)
        scaled = []
        for score, (low, high) in zip(scores, bounds, strict=True):
            low, high = least if low is None else low, greatest if high is None else high
            scaled.append((score - low) / (high - low) if high > low else 0.5)
    if len(set(scaled)) < 2 or not all(0.0 <= score <= 1.0 for score in scaled):
        raise DataError(
            f"The scores of {source.source} teach nothing",
            why="They are all equal, or outside of score_min … score_max.",
            fix="Check the scores and `min_score`.",
        )
    return scaled
