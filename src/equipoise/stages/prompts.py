"""The prompts of a run: loaded, checked, and kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from equipoise.config import Recipe
from equipoise.data.prompts import check_lengths, load_prompts
from equipoise.data.sources import Skipped
from equipoise.dials.dials import Dials
from equipoise.encoding.encode import Encoder
from equipoise.errors import DataError
from equipoise.models.files import clear_errors
from equipoise.models.hub import resolve_model
from equipoise.models.load import load_tokenizer
from equipoise.models.read import read_config
from equipoise.pipeline.job import Job
from equipoise.pipeline.readers import PROMPTS, note_skipped
from equipoise.store.shards import rows_to_jsonl
from equipoise.store.stagedir import Stage
from equipoise.types import Prompt


def prompts(job: Job, stage: Stage) -> None:
    """Load all splits, refuse what cannot be used, and keep the prompts in the run.

    Raises:
        DataError: A prompt cannot be used, or none are left to train or to test on.
    """
    config, skipped = job.recipe.prompts, Skipped()
    loaded = load_prompts(config, data=job.data, seed=job.recipe.seed, skipped=skipped)
    model = job.place(job.recipe.model)
    place = resolve_model(model)
    with clear_errors(model, " (its tokenizer)"):
        encoder = Encoder(load_tokenizer(place), rendering=job.rendering)
    unread = skipped.count
    kept = check_lengths(loaded, encoder, config, skipped=skipped)
    dropped = len(loaded) - len(kept) - (skipped.count - unread)
    counts = {name: sum(p.split == name for p in kept) for name in ("train", "dev", "test")}
    if not counts["train"] or not counts["test"]:
        raise DataError(
            "no prompts left to train or to test on",
            why=f"after dropping over-long ones and skipping bad rows there are {counts}",
            fix="raise prompts.max_prompt_tokens, repair the rows, or add sources",
        )
    check_context(job.recipe, kept, encoder, read_config(place))
    stage.publish_bytes(PROMPTS, rows_to_jsonl(kept))
    note_skipped(stage, skipped)
    stage.finish(counts=counts, dropped=dropped)
    left_out = f"; {skipped.count} bad rows skipped" if skipped.count else ""
    left_out += f"; {dropped} over-long ones dropped" if dropped else ""
    job.progress.say(
        f"prompts: {counts['train']} train, {counts['dev']} dev, {counts['test']} test{left_out}"
    )


def check_context(recipe: Recipe, prompts: Sequence[Prompt], encoder: Encoder, config: Any) -> None:
    """Hold the longest prompt, controls and all that a stage may sample against the context.

    Prompts that ask in words are longer; they are counted too, but for in-context examples, which
    are only known later: an engine refuses those.

    Args:
        recipe: Which stages sample, and how much.
        prompts: All prompts of the run.
        encoder: Of the policy.
        config: Of the policy.

    Raises:
        DataError: They do not fit; it names the longest prompt and what to lower.
    """
    from equipoise.models.limits import check_prompts, positions

    limit = positions(config)
    if limit is None:
        return
    n_controls = len(recipe.attributes)
    asked = {"generate": recipe.generate.sampling, "evaluate": recipe.evaluate.sampling}
    if recipe.tune.objective == "rlhf":
        asked["tune.rlhf"] = recipe.tune.rlhf.sampling
    most = {
        name: encoder.most_tokens(encoder.budgets(sampling)) for name, sampling in asked.items()
    }
    section = max(most, key=lambda name: most[name])
    max_tokens = most[section]
    room = limit - n_controls - max_tokens
    drop = ", or set prompts.on_long_prompt to drop"
    shorter = f", or prompts.max_prompt_tokens to {room}{drop}" if room > 0 else ""
    check_prompts(
        prompts,
        encoder,
        limit,
        n_controls=n_controls,
        max_tokens=max_tokens,
        setting=f"{section}.sampling.max_tokens",
        fix=shorter,
    )
    longest = max(prompts, key=lambda prompt: len(encoder.prompt_ids(prompt.messages)))
    for section, phrases in _in_words(recipe).items():
        check_prompts(
            _worded(longest, recipe, phrases),
            encoder,
            limit,
            n_controls=0,
            max_tokens=most[section],
            setting=f"{section}.sampling.max_tokens",
            fix=f", shorten {section}.phrases, or lower prompts.max_prompt_tokens",
        )


def _in_words(recipe: Recipe) -> dict[str, dict[str, list[str]]]:
    found = {}
    if recipe.generate.prompted_per_prompt:
        found["generate"] = recipe.generate.phrases
    if "prompting" in recipe.evaluate.responders:
        found["evaluate"] = recipe.evaluate.phrases
    return found


def _worded(prompt: Prompt, recipe: Recipe, phrases: dict[str, list[str]]) -> list[Prompt]:
    from equipoise.steer.prompting import Wording

    dials = Dials(tuple(recipe.attributes), recipe.levels)
    wording = Wording(dials, phrases=phrases)
    return [replace(prompt, messages=wording.messages(prompt, one)) for one in dials.cells()]
