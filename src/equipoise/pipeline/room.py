"""Whether every answer that a recipe asks for fits into the policy's context."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from equipoise.config import Recipe
from equipoise.dials.dials import Dials
from equipoise.types import Prompt

if TYPE_CHECKING:
    from equipoise.encoding.encode import Encoder


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
