"""Turn every dial of a responder over every prompt, and let the judges score what comes back."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from equipoise.dials.dials import Dials
from equipoise.rewards.scorer import Scorer
from equipoise.seeds import derive_seed
from equipoise.types import (
    Delivery,
    DialSetting,
    JudgeKind,
    Prompt,
    Responder,
)


def sweep_settings(dials: Dials, *, auto: bool) -> list[DialSetting]:
    """Return the L^A control cells and, with ``auto``, each dial alone with the others on auto."""
    settings = dials.cells()
    n_attributes = len(dials.attributes)
    if auto and n_attributes > 1:
        settings += [
            DialSetting(tuple(level if a == dial else None for a in range(n_attributes)))
            for dial in range(n_attributes)
            for level in range(dials.levels)
        ]
    return settings


def sweep(
    responder: Responder,
    prompts: Sequence[Prompt],
    settings: Sequence[DialSetting],
    judges: Mapping[JudgeKind, Scorer],
    *,
    seed: int,
    repeats: int = 1,
    chunk: int = 8,
) -> Iterator[list[Delivery]]:
    """Yield the deliveries of one chunk of prompts after the other, so that a caller can persist.

    A delivery depends on the seed, the prompt, the setting and the repeat only, never on the chunk
    it was made in: pass the prompts still missing to resume.

    Args:
        responder: The method; no judge and no metric knows which.
        prompts: P prompts of the split that is evaluated.
        settings: C settings, see :func:`sweep_settings`.
        judges: Judge kind to scorer, all with scales over the *same* pool: the start model's.
        seed: Seed of this evaluation.
        repeats: S full sweeps.
        chunk: Prompts per yielded list.

    Raises:
        RewardError: A judge broke its contract.
    """
    for start in range(0, len(prompts), chunk):
        part = prompts[start : start + chunk]
        by_id = {prompt.id: prompt for prompt in part}
        completions = [
            (repeat, completion)
            for repeat in range(repeats)
            for row in responder.respond(part, settings, seed=derive_seed(seed, "repeat", repeat))
            for completion in row
        ]
        pairs = [(by_id[one.prompt_id], one.judged) for _, one in completions]
        units = {kind: scorer.units(pairs) for kind, scorer in judges.items()}
        yield [
            Delivery(
                prompt_id=one.prompt_id,
                setting=one.setting or DialSetting(()),
                repeat=repeat,
                text=one.text,
                finish=one.finish,
                n_tokens=one.n_tokens,
                unit={kind: units[kind][i] for kind in judges},
            )
            for i, (repeat, one) in enumerate(completions)
        ]
