"""Data sources to texts and dialogues, the rows of base training and supervised fine-tuning."""

from __future__ import annotations

import random
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Literal

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
from equipoise.seeds import derive_seed
from equipoise.types import Message, Prompt

Dialogue = tuple[Prompt, str]
"""A prompt and its completion."""

_WORKSHOP = "workshop://"
_ANSWERS = ("completion", "response", "answer", "output")


def load_rows(
    sources: Sequence[SourceConfig],
    *,
    n_rows: int,
    data: Path | None,
    seed: int,
    skipped: Skipped | None = None,
) -> list[str | Dialogue]:
    """Load texts (rows with ``text``) and dialogues (rows that end with an answer), shuffled.

    Args:
        sources: Files or ``datasets`` names; ``workshop://base`` and ``workshop://aligned``, which
            never end, give ``limit`` dialogues.
        n_rows: The limit of an endless source that has none of its own.
        data: Folder in which relative sources are looked up.
        seed: Of ``limit``, of the endless sources, and of the order.
        skipped: Takes note of the rows that ``on_bad_row: skip`` leaves out.

    Raises:
        DataError: A source is missing, empty or of unknown shape, or no row holds a text.
    """
    found: list[str | Dialogue] = []
    for source in sources:
        if source.source.startswith(_WORKSHOP):
            found += _workshop(source, source.limit or n_rows, seed)
            continue
        read = read_items(source, _read, data=data, skipped=skipped)
        kept = [row for row in read if row is not None]
        if not kept:
            raise DataError(
                f"No usable row in {source.source}",
                why="in every row the text or the answer is empty",
                fix="check `text`, or `messages` that end with the assistant's turn",
            )
        found += draw(kept, source, seed=seed)
    random.Random(derive_seed(seed, "start rows")).shuffle(found)
    return found


def _workshop(source: SourceConfig, limit: int, seed: int) -> list[Dialogue]:
    from equipoise.worlds.workshop.data import dialogues

    name = source.source.removeprefix(_WORKSHOP)
    if name not in ("base", "aligned"):
        raise DataError(
            f"The Workshop has no text {name!r}",
            why="it writes base text and aligned text",
            fix="use workshop://base or workshop://aligned",
        )
    kind: Literal["base", "aligned"] = "base" if name == "base" else "aligned"
    return list(islice(dialogues(kind, seed=derive_seed(seed, "start text", name)), limit))


def _read(row: Row, where: Place) -> str | Dialogue | None:
    if isinstance(row.get("text"), str):
        check_text(row["text"], where)
        return str(row["text"]) if row["text"].strip() else None
    turns, answer = _turns(row, where)
    if not turns or not answer.strip() or turns[-1].role != "user":
        return None
    check_text(answer, where)
    return make_prompt(turns, where), answer


def _turns(row: Row, where: Place) -> tuple[Sequence[Message], str]:
    turns = prompt_turns(row, where=where)
    answer = next((row[name] for name in _ANSWERS if isinstance(row.get(name), str)), None)
    if turns is not None and answer is not None:
        return turns, answer
    if turns and turns[-1].role == "assistant":
        return turns[:-1], turns[-1].content
    if row.get("chosen") is not None:
        # The better side of a preference pair is a dialogue as well.
        return split_answer(row["chosen"], turns, where=where)
    if turns is None:
        raise unknown_shape(row, where=where)
    return turns, ""
