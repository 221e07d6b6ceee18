"""Raw scores for a pool: each (prompt, completion text) once per reward model."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice

from equipoise.errors import DataError
from equipoise.rewards.scorer import checked_scores
from equipoise.types import Completion, Prompt, RewardModel, ScoredCompletion


def score(
    completions: Iterable[Completion],
    prompts: Mapping[str, Prompt],
    reward_models: Mapping[str, RewardModel],
    *,
    chunk_size: int = 512,
) -> Iterator[list[ScoredCompletion]]:
    """Score completions, in order, a chunk at a time.

    A text that occurs again for the same prompt, in any chunk, takes its score from the first time:
    the cache key is the hash of prompt id and text.

    Args:
        completions: The pool.
        prompts: Prompt id to prompt.
        reward_models: Attribute to reward model.
        chunk_size: Completions per yielded list; reward models batch within a chunk.

    Yields:
        Lists of scored completions; a chunk is whole or does not appear.

    Raises:
        DataError: A completion of an unknown prompt.
        RewardError: A reward model returned the wrong number of scores, or one that is not finite.
    """
    hashes = {attribute: model.hash for attribute, model in reward_models.items()}
    known: dict[str, dict[str, float]] = {}
    stream = iter(completions)
    while chunk := list(islice(stream, chunk_size)):
        keys = [content_key(completion) for completion in chunk]
        fresh: dict[str, tuple[Prompt, str]] = {}
        for key, completion in zip(keys, chunk, strict=True):
            if completion.prompt_id not in prompts:
                raise DataError(
                    f"A completion belongs to the unknown prompt {completion.prompt_id}",
                    why="The pool and the prompts do not come from the same run.",
                    fix="Generate the pool again for these prompts.",
                )
            if key not in known:
                fresh[key] = (prompts[completion.prompt_id], completion.text)
        columns = {
            attribute: checked_scores(model, attribute, list(fresh.values()))
            for attribute, model in reward_models.items()
        }
        for i, key in enumerate(fresh):
            known[key] = {attribute: column[i] for attribute, column in columns.items()}
        yield [
            ScoredCompletion(completion, known[key], hashes)
            for key, completion in zip(keys, chunk, strict=True)
        ]


def shortened(completions: Iterable[Completion]) -> list[Completion]:
    """Return the completions that hold a finished sentence, each with the text to learn from."""
    return [replace(one, text=text) for one in completions if (text := one.sentences)]


def content_key(completion: Completion) -> str:
    """Hash of prompt id and text: what a score depends on."""
    content = f"{completion.prompt_id}\x1f{completion.text}".encode("utf-8", "surrogatepass")
    return hashlib.sha256(content).hexdigest()
