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
from equipoise.errors import DataError
from equipoise.overlap import prompt_key
from equipoise.pool.rows import Row, draw, numbered, read_rows
from equipoise.pool.shapes import make_prompt, parse_turns, prompt_turns, unknown_shape
from equipoise.seeds import derive_seed
from equipoise.types import Prompt, Split

if TYPE_CHECKING:
    from equipoise.dials.encode import Encoder

_WORKSHOP = "workshop://"
log = logging.getLogger(__name__)


def load_prompts(config: PromptsConfig, *, data: Path | None, seed: int) -> list[Prompt]:
    """Load all splits: test first, then train without what is in test, then dev out of train.

    Prompts that are equal after normalisation (:func:`equipoise.overlap.prompt_key`) are one
    prompt: the first stays, and a prompt of the test split never occurs in another split. So one
    file may serve both splits, each with its ``limit``.

    Args:
        config: Sources, and how many dev prompts to split off.
        data: Folder in which relative sources are looked up.
        seed: Draws ``limit`` and the dev prompts.

    Returns:
        Train, dev and test prompts, in this order; ids are unique and do not depend on the seed.

    Raises:
        DataError: A source is missing, empty or of unknown shape; a row has no user turn; no
            training prompt is left.
    """
    seen: set[str] = set()
    test = _load_split(config.test, "test", data=data, seed=seed, seen=seen)
    train = _load_split(config.train, "train", data=data, seed=seed, seen=seen)
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
    prompts: Sequence[Prompt], encoder: Encoder, config: PromptsConfig
) -> list[Prompt]:
    """Refuse or drop prompts of more than ``max_prompt_tokens`` tokens; none is ever truncated.

    Raises:
        DataError: A prompt is too long and ``on_long_prompt`` is ``refuse``, or none is left.
    """
    limit = config.max_prompt_tokens
    lengths = [len(encoder.prompt_ids(prompt.messages)) for prompt in prompts]
    long = [p for p, n in zip(prompts, lengths, strict=True) if n > limit]
    if long and (config.on_long_prompt == "refuse" or len(long) == len(prompts)):
        raise DataError(
            f"{len(long)} prompts are longer than {limit} tokens",
            why=f"The longest has {max(lengths)}; the first is {long[0].id} of {long[0].source}.",
            fix="Raise prompts.max_prompt_tokens, or set prompts.on_long_prompt to drop.",
        )
    if long:
        log.warning("%d of %d prompts dropped: over %d tokens", len(long), len(prompts), limit)
    dropped = {prompt.id for prompt in long}
    return [prompt for prompt in prompts if prompt.id not in dropped]


def _load_split(
    sources: Sequence[SourceConfig],
    split: Split,
    *,
    data: Path | None,
    seed: int,
    seen: set[str],
) -> list[Prompt]:
    prompts: list[Prompt] = []
    for source in sources:
        fresh: dict[str, Prompt] = {}
        for prompt in _load_source(source, split, data=data, seed=seed):
            key = prompt_key(prompt.messages)
            if key not in seen:
                fresh.setdefault(key, prompt)
        drawn = draw(list(fresh.values()), source, seed=seed)
        prompts += drawn
        seen |= {prompt_key(prompt.messages) for prompt in drawn}
    return prompts


def _load_source(
    source: SourceConfig, split: Split, *, data: Path | None, seed: int
) -> list[Prompt]:
    if source.source.startswith(_WORKSHOP):
        from equipoise.worlds import workshop

        name = source.source.removeprefix(_WORKSHOP)
        found = workshop.prompts(name, limit=source.limit, seed=seed)
        return [replace(prompt, split=split) for prompt in found]
    return [
        _read_prompt(row, where, source.source, split)
        for where, row in numbered(read_rows(source, data=data), source)
    ]


def _read_prompt(row: Row, where: str, source: str, split: Split) -> Prompt:
    turns = prompt_turns(row, where=where)
    if turns is None and row.get("chosen") is not None:
        turns = parse_turns(row["chosen"], where=where)
    if turns is None:
        raise unknown_shape(row, where=where)
    label = row.get("label")
    return make_prompt(turns, where, source, split, label if isinstance(label, str) else "")


def _check_ids(prompts: Sequence[Prompt]) -> None:
    doubles = [key for key, n in Counter(prompt.id for prompt in prompts).items() if n > 1]
    if doubles:
        raise DataError(
            f"{len(doubles)} prompt ids occur twice, {doubles[0]} first",
            why="Two different prompts carry the same id.",
            fix="Rename one of the sources.",
        )
