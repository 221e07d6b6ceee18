"""Data sources to preference pairs and labelled answers, the rows of reward models."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from equipoise.config import SourceConfig
from equipoise.errors import DataError
from equipoise.overlap import prompt_key
from equipoise.pool.rows import Row, draw, numbered, read_rows
from equipoise.pool.shapes import (
    make_prompt,
    parse_transcript,
    parse_turns,
    prompt_turns,
    unknown_shape,
)
from equipoise.types import LabelledAnswer, Message, PreferencePair

_WORKSHOP = "workshop://"
_WORKSHOP_PAIRS = 12_000
"""That world never ends, so a source without limit needs one."""
_ANSWERS = ("response", "completion", "answer", "output")
_SCORES = ("score", "is_safe", "safe", "label")
_WORDS = {"safe": 1.0, "unsafe": 0.0}

log = logging.getLogger(__name__)


def load_pairs(
    sources: Sequence[SourceConfig], *, data: Path | None = None, seed: int = 0
) -> list[PreferencePair]:
    """Load preference pairs; ``workshop://ATTRIBUTE`` for the packaged world.

    Pairs of equal or empty completions, and pairs whose two transcripts disagree on the prompt
    (hub copies of hh-rlhf hold some), are left out and counted in the log.

    Raises:
        DataError: See :func:`equipoise.pool.prompts.load_prompts`; or no pair is left.
    """
    pairs: list[PreferencePair] = []
    for source in sources:
        if source.source.startswith(_WORKSHOP):
            from equipoise.worlds import workshop

            attribute = source.source.removeprefix(_WORKSHOP).removeprefix("pairs/")
            limit = source.limit or _WORKSHOP_PAIRS
            pairs += workshop.pairs(attribute, limit=limit, seed=seed)
            continue
        rows = numbered(read_rows(source, data=data), source)
        found = [(_read_pair(row, where, source.source)) for where, row in rows]
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
    sources: Sequence[SourceConfig], *, data: Path | None = None, seed: int = 0
) -> list[LabelledAnswer]:
    """Load labelled answers, their scores brought to [0, 1].

    With ``min_score`` a score is 1 from there on, else 0; without, ``score_min`` and ``score_max``
    of the row give the scale, else the least and greatest score of the source do.

    Raises:
        DataError: See :func:`equipoise.pool.prompts.load_prompts`; or a source has one score only.
    """
    answers: list[LabelledAnswer] = []
    for source in sources:
        rows = list(numbered(read_rows(source, data=data), source))
        read = [_read_labelled(row, where, source.source) for where, row in rows]
        scores = _scale([row for _, row in rows], [answer.score for answer in read], source)
        scaled = [replace(a, score=s) for a, s in zip(read, scores, strict=True)]
        answers += draw([a for a in scaled if a.completion.strip()], source, seed=seed)
    return answers


def _read_pair(row: Row, where: str, source: str) -> PreferencePair | None:
    if row.get("chosen") is None or row.get("rejected") is None:
        raise unknown_shape(row, where=where)
    own = prompt_turns(row, where=where)
    chosen, rejected = (_answer(row[side], own, where=where) for side in ("chosen", "rejected"))
    prompt = make_prompt(chosen[0], where, source)
    same = prompt_key(prompt.messages) == prompt_key(
        make_prompt(rejected[0], where, source).messages
    )
    texts = (chosen[1], rejected[1])
    if not same or not all(text.strip() for text in texts) or texts[0] == texts[1]:
        return None
    return PreferencePair(prompt, *texts)


def _answer(
    value: object, own: Sequence[Message] | None, *, where: str
) -> tuple[Sequence[Message], str]:
    """Split one side of a pair into prompt turns and completion."""
    turns: Sequence[Message] | None
    turns = parse_transcript(value) if isinstance(value, str) else parse_turns(value, where=where)
    if turns is None:
        if own is None:
            raise DataError(
                f"{where}: the pair has no prompt",
                why="`chosen` is a bare text, and there is no `prompt` or `messages`.",
                fix="Add the prompt, or give whole transcripts.",
            )
        return own, str(value)
    if turns and turns[-1].role == "assistant":
        before = own if own is not None else turns[:-1]
        return before, turns[-1].content
    return (own if own is not None else turns), ""


def _read_labelled(row: Row, where: str, source: str) -> LabelledAnswer:
    turns = prompt_turns(row, where=where)
    answer = next((row[f] for f in _ANSWERS if isinstance(row.get(f), str)), None)
    value = next((row[f] for f in _SCORES if row.get(f) is not None), None)
    if turns is not None and answer is None and turns[-1].role == "assistant":
        turns, answer = turns[:-1], turns[-1].content
    if turns is None or answer is None or value is None:
        raise unknown_shape(row, where=where)
    if isinstance(value, str):
        value = _WORDS.get(value.strip().casefold())
    if value is None or not isinstance(value, int | float) or value != value:
        raise DataError(
            f"{where} has a label that is no score",
            why="A number, true / false, or safe / unsafe is expected.",
            fix="Correct the row.",
        )
    return LabelledAnswer(make_prompt(turns, where, source), answer, float(value))


def _scale(rows: Sequence[Row], scores: Sequence[float], source: SourceConfig) -> list[float]:
    if source.min_score is not None:
        scaled = [float(score >= source.min_score) for score in scores]
    else:
        lows = [_bound(row, "score_min", min(scores)) for row in rows]
        highs = [_bound(row, "score_max", max(scores)) for row in rows]
        bounds = zip(scores, lows, highs, strict=True)
        scaled = [(s - low) / (high - low) if high > low else 0.5 for s, low, high in bounds]
    if len(set(scaled)) < 2 or not all(0.0 <= score <= 1.0 for score in scaled):
        raise DataError(
            f"The scores of {source.source} teach nothing",
            why="They are all equal, or outside of score_min … score_max.",
            fix="Check the scores and `min_score`.",
        )
    return scaled


def _bound(row: Row, field: str, default: float) -> float:
    value = row.get(field)
    return default if value is None else float(value)
