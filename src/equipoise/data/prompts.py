"""Data sources to prompts; splits are disjoint.

No text of a prompt is put into an error message or a log: prompts may hold what nobody wants there.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from equipoise.config import PromptsConfig, SourceConfig
from equipoise.data.shapes import make_prompt, parse_turns, prompt_turns, unknown_shape
from equipoise.data.sources import Place, Row, Skipped, draw, none_left, read_items, refused
from equipoise.errors import DataError, named
from equipoise.overlap import prompt_key
from equipoise.seeds import derive_seed
from equipoise.types import Prompt, Split

if TYPE_CHECKING:
    from equipoise.encoding.encode import Encoder

_WORKSHOP = "workshop://"
log = logging.getLogger(__name__)


def load_prompts(
    config: PromptsConfig, *, data: Path | None, seed: int, skipped: Skipped | None = None
) -> list[Prompt]:
    """Load all splits: test first, then train without what is in test, then dev out of train.

    Prompts that are equal after normalisation (:func:`equipoise.overlap.prompt_key`) are one
    prompt: the first stays, and a prompt of the test split never occurs in another split. So one
    file may serve both splits, each with its ``limit``.

    Args:
        config: Sources, and how many dev prompts to split off.
        data: Folder in which relative sources are looked up.
        seed: Draws ``limit`` and the dev prompts.
        skipped: Takes note of the rows that ``on_bad_row: skip`` leaves out.

    Returns:
        Train, dev and test prompts, in this order; ids are unique and do not depend on the seed.

    Raises:
        DataError: A source is missing or empty; a row is of unknown shape or has no user turn, or
            (with ``on_bad_row: skip``) all of a source are; no training prompt is left.
    """
    seen: set[str] = set()
    test = _load_split(config.test, "test", data, seed, seen, skipped)
    train = _load_split(config.train, "train", data, seed, seen, skipped)
    if len(train) <= config.n_dev or not test:
        raise DataError(
            "Too few prompts",
            why=f"{len(train)} training prompts (those of the test split left out), of which "
            f"{config.n_dev} are wanted for dev; {len(test)} test prompts.",
            fix="Add sources, raise `limit`, or lower `n_dev`.",
        )
    by_draw = sorted(train, key=lambda prompt: derive_seed(seed, "dev", prompt.id))
    dev_ids = {prompt.id for prompt in by_draw[: config.n_dev]}
    dev = [replace(prompt, split="dev") for prompt in train if prompt.id in dev_ids]
    prompts = [*(prompt for prompt in train if prompt.id not in dev_ids), *dev, *test]
    _check_ids(prompts)
    return prompts


def check_lengths(
    prompts: Sequence[Prompt],
    encoder: Encoder,
    config: PromptsConfig,
    *,
    skipped: Skipped | None = None,
) -> list[Prompt]:
    """Refuse or leave out what the model cannot take; no prompt is ever truncated.

    A prompt of more than ``max_prompt_tokens`` tokens falls under ``on_long_prompt``; one that
    cannot be encoded (the chat template refuses the order of its turns) under ``on_bad_row`` of its
    source.

    Args:
        prompts: Those of :func:`load_prompts`.
        encoder: Of the model that will be asked.
        config: The same as there.
        skipped: Takes note of the prompts that ``on_bad_row: skip`` leaves out.

    Raises:
        DataError: A prompt is to be refused, by source and row number, or none is left.
    """
    lengths = _lengths(prompts, encoder, config, skipped)
    limit = config.max_prompt_tokens
    long = [prompt for prompt, length in lengths if length > limit]
    if long and (config.on_long_prompt == "refuse" or len(long) == len(lengths)):
        longest = max(length for _, length in lengths)
        raise DataError(
            f"{len(long)} prompts are longer than {limit} tokens",
            why=f"The longest has {longest}; the first is {long[0].place}.",
            fix="Raise prompts.max_prompt_tokens, or set prompts.on_long_prompt to drop.",
        )
    if long:
        log.warning("%d of %d prompts dropped: over %d tokens", len(long), len(prompts), limit)
    return [prompt for prompt, length in lengths if length <= limit]


def _lengths(
    prompts: Sequence[Prompt], encoder: Encoder, config: PromptsConfig, skipped: Skipped | None
) -> list[tuple[Prompt, int]]:
    """Return the prompts that can be encoded, with their numbers of tokens."""
    skip = {
        (source.source, part == "test")
        for part, sources in (("train", config.train), ("test", config.test))
        for source in sources
        if source.on_bad_row == "skip"
    }
    kept: list[tuple[Prompt, int]] = []
    bad: list[tuple[Prompt, DataError]] = []
    for prompt in prompts:
        try:
            with named(prompt.place):
                kept.append((prompt, len(encoder.prompt_ids(prompt.messages))))
        except DataError as error:
            if (prompt.source, prompt.split == "test") not in skip:
                raise refused(error) from error
            bad.append((prompt, error))
    for source in {prompt.source for prompt, _ in bad} - {prompt.source for prompt, _ in kept}:
        errors = [failed for prompt, failed in bad if prompt.source == source]
        raise none_left(source, len(errors), errors[0])
    if bad:
        log.warning("%d prompts skipped, the first: %s", len(bad), bad[0][1].what)
        (skipped or Skipped()).note((prompt.place, failed) for prompt, failed in bad)
    return kept


def _load_split(
    sources: Sequence[SourceConfig],
    split: Split,
    data: Path | None,
    seed: int,
    seen: set[str],
    skipped: Skipped | None,
) -> list[Prompt]:
    prompts: list[Prompt] = []
    for source in sources:
        fresh: dict[str, Prompt] = {}
        for prompt in _load_source(source, split, data, seed, skipped):
            key = prompt_key(prompt.messages)
            if key not in seen:
                fresh.setdefault(key, prompt)
        drawn = draw(list(fresh.values()), source, seed=seed)
        prompts += drawn
        seen |= {prompt_key(prompt.messages) for prompt in drawn}
    return prompts


def _load_source(
    source: SourceConfig, split: Split, data: Path | None, seed: int, skipped: Skipped | None
) -> list[Prompt]:
    if source.source.startswith(_WORKSHOP):
        from equipoise.worlds import workshop

        name = source.source.removeprefix(_WORKSHOP)
        found = workshop.prompts(name, limit=source.limit, seed=seed)
        return [replace(prompt, split=split) for prompt in found]

    def read(row: Row, where: Place) -> Prompt:
        return _read_prompt(row, where, split)

    return read_items(source, read, data=data, skipped=skipped)


def _read_prompt(row: Row, where: Place, split: Split) -> Prompt:
    turns = prompt_turns(row, where=where)
    if turns is None and row.get("chosen") is not None:
        turns = parse_turns(row["chosen"], where=where)
    if turns is None:
        raise unknown_shape(row, where=where)
    label = row.get("label")
    return make_prompt(turns, where, split, label if isinstance(label, str) else "")


def _check_ids(prompts: Sequence[Prompt]) -> None:
    doubles = [key for key, n in Counter(prompt.id for prompt in prompts).items() if n > 1]
    if doubles:
        raise DataError(
            f"{len(doubles)} prompt ids occur twice, {doubles[0]} first",
            why="Two different prompts carry the same id.",
            fix="Rename one of the sources.",
        )
