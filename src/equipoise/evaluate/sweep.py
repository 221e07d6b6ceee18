"""Turn every dial of a responder over every prompt, and let the judges score what comes back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from equipoise.dials.attributes import cells
from equipoise.errors import DataError
from equipoise.models.judging import unit_scores_of
from equipoise.overlap import prompt_key
from equipoise.seeds import derive_seed
from equipoise.types import (
    Delivery,
    DialSetting,
    JudgeKind,
    Prompt,
    Responder,
    RewardModel,
    UnitScale,
)


def sweep_settings(n_attributes: int, levels: int, *, auto: bool) -> list[DialSetting]:
    """Return the L^A control cells and, with ``auto``, each dial alone with the others on auto."""
    settings = list(cells(n_attributes, levels))
    if auto and n_attributes > 1:
        settings += [
            DialSetting(tuple(level if a == dial else None for a in range(n_attributes)))
            for dial in range(n_attributes)
            for level in range(levels)
        ]
    return settings


def sweep(
    responder: Responder,
    prompts: Sequence[Prompt],
    settings: Sequence[DialSetting],
    judges: Mapping[JudgeKind, Mapping[str, RewardModel]],
    calibrations: Mapping[JudgeKind, UnitScale],
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
        judges: Judge kind to attribute to reward model.
        calibrations: Judge kind to its unit scale, all over the *same* pool: the start model's.
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
        pairs = [(by_id[c.prompt_id], c.text) for _, c in completions]
        units = {
            kind: unit_scores_of(pairs, models, calibrations[kind])
            for kind, models in judges.items()
        }
        yield [
            Delivery(
                prompt_id=completion.prompt_id,
                setting=completion.setting or DialSetting(()),
                repeat=repeat,
                text=completion.text,
                finish=completion.finish,
                n_tokens=completion.n_tokens,
                unit={kind: units[kind][completion.prompt_id, completion.text] for kind in judges},
            )
            for repeat, completion in completions
        ]


def check_disjoint(
    test: Sequence[Prompt], others: Mapping[str, Iterable[Prompt]]
) -> dict[str, int]:
    """Return how many test prompts occur in each other set; all must be 0.

    Args:
        test: Prompts of the split that is evaluated.
        others: Name of a set (training prompts, rows of each reward model and judge) to its
            prompts.

    Raises:
        DataError: A set shares a prompt with the test prompts; no report is made then.
    """
    wanted = {prompt_key(prompt.messages) for prompt in test}
    sizes = {
        name: len(wanted & {prompt_key(prompt.messages) for prompt in prompts})
        for name, prompts in others.items()
    }
    shared = {name: size for name, size in sizes.items() if size}
    if shared:
        listed = ", ".join(f"{size} in {name}" for name, size in shared.items())
        raise DataError(
            f"test prompts are not unseen: {listed}",
            why="a dial measured on prompts that training or a judge saw proves nothing",
            fix="give the test split its own source, or lower its limit",
        )
    return sizes
