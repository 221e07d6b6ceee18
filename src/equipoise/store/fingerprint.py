"""What each stage depends on, and how two sets of conditions differ."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from equipoise.config import Recipe
from equipoise.recipes.gone import in_todays_fields
from equipoise.recipes.source import settled_paths

STAGES = (
    "prompts", "fit-reward", "generate", "score", "steer", "regenerate", "distil", "tune", "judge",
    "evaluate", "report",
)  # fmt: skip
"""In the order of the run. ``prompts`` has no command of its own: every stage makes it first."""

START_STAGES = ("base", "sft", "align")
"""Before all others, in a run that makes its own start model."""

ORDER = (*START_STAGES, *STAGES)


@dataclass(frozen=True)
class StageSpec:
    """What a stage depends on."""

    reads: tuple[str, ...]
    """Fields of the recipe, see :func:`reads_of`; with ``inputs`` they decide about reuse."""
    inputs: tuple[str, ...]
    """Earlier stages."""


_POLICY = ("model", "chat_template_kwargs")
_RLHF_PROBES = ("judges", "evaluate.sampling")
"""What ``tune`` reads besides, by RLHF: its curve holds looks at the judges."""

SPECS: Mapping[str, StageSpec] = {
    "base": StageSpec(("seed", "data", "base"), ()),
    "sft": StageSpec(("seed", "data", "chat_template_kwargs", "sft"), ("base",)),
    "align": StageSpec(("seed", "data", "chat_template_kwargs", "align"), ("base", "sft")),
    "prompts": StageSpec(("seed", "data", *_POLICY, "prompts"), ()),
    "fit-reward": StageSpec(("seed", "data", "fit_reward"), ()),
    "generate": StageSpec(("seed", *_POLICY, "attributes", "levels", "generate"), ("prompts",)),
    "score": StageSpec(("attributes", "reward_models", "score"), ("generate", "fit-reward")),
    "steer": StageSpec(
        ("seed", *_POLICY, "attributes", "levels", "generate", "reward_models", "steer"),
        ("prompts", "score"),
    ),
    "regenerate": StageSpec(
        ("seed", *_POLICY, "attributes", "levels", "generate", "reward_models", "regenerate"),
        ("prompts", "score", "steer"),
    ),
    "distil": StageSpec(
        ("seed", "attributes", "levels", "distil"), ("prompts", "score", "steer", "regenerate")
    ),
    "tune": StageSpec(("seed", *_POLICY, "attributes", "levels", "tune"), ("steer", "distil")),
    "judge": StageSpec(("attributes", "judges"), ("prompts", "fit-reward", "score")),
    "evaluate": StageSpec(
        ("seed", *_POLICY, "attributes", "levels", "judges", "refusal_judge", "evaluate"),
        ("prompts", "fit-reward", "score", "steer", "tune", "judge"),
    ),
    "report": StageSpec(("name", "description"), ("score", "distil", "tune", "judge", "evaluate")),
}


OPTIONAL: Mapping[str, str] = {
    "base": "base",
    "sft": "sft",
    "align": "align",
    "fit-reward": "fit_reward",
    "steer": "steer",
    "regenerate": "regenerate",
}
"""Stages that a recipe may leave out, and the field that asks for them."""


def reads_of(name: str, recipe: Recipe) -> tuple[str, ...]:
    """Return the fields that a stage reads in a run of this recipe: FIELD, or FIELD.PART."""
    probes = name == "tune" and recipe.tune.objective == "rlhf"
    return SPECS[name].reads + (_RLHF_PROBES if probes else ())


def read_fields(plain: Mapping[str, Any], reads: Sequence[str]) -> dict[str, Any]:
    """Return what is read of a plain recipe, by top-level field."""
    found: dict[str, Any] = {}
    for path in reads:
        field, _, part = path.partition(".")
        value = plain.get(field)
        found[field] = {part: (value or {}).get(part)} if part else value
    return found


def inputs_of(name: str, recipe: Recipe) -> list[str]:
    """Return the stages that a stage reads in a run of this recipe."""
    inputs = SPECS[name].inputs
    return [one for one in inputs if one not in OPTIONAL or getattr(recipe, OPTIONAL[one])]


def needed_by(name: str, recipe: Recipe) -> list[str]:
    """Return a stage and all that have to come before it, in order."""
    found = {name}
    for stage in reversed(ORDER):
        if stage in found:
            found.update(inputs_of(stage, recipe))
    return [stage for stage in ORDER if stage in found]


def first_affected(changes: Sequence[str], recipe: Recipe) -> str | None:
    """Return the first stage that reads one of the changed fields, given as :func:`diff` does."""
    paths = [f"{line.split(':')[0]}." for line in changes]

    def affected(name: str) -> bool:
        return any(path.startswith(f"{read}.") for read in reads_of(name, recipe) for path in paths)

    return next(filter(affected, ORDER), None)


def with_new_defaults(old: Mapping[str, Any], recipe: Recipe) -> dict[str, Any]:
    """Return stored top-level fields with the defaults of fields that were added since.

    So a run outlives a new option, whose default must be what was done before it came. Relative
    paths, which older runs hold, are those of the working directory, as they were then.
    """
    fields = Recipe.model_fields
    required = {name: plain for name, plain in recipe.model_dump(mode="json").items()
                if fields[name].is_required()}  # fmt: skip
    old = in_todays_fields(old)
    try:
        full = settled_paths(Recipe.model_validate({**required, **old}), None).model_dump(
            mode="json"
        )
    except ValidationError:
        return old
    return {**old, **full}


def diff(old: Any, new: Any, path: str = "") -> list[str]:
    """Return one line ``dotted.path: old -> new`` per differing leaf."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        lines = [
            diff(
                old.get(key, "(absent)"), new.get(key, "(absent)"), f"{path}.{key}" if path else key
            )
            for key in keys
        ]
        return [line for group in lines for line in group]
    return [] if old == new else [f"{path}: {_short(old)} -> {_short(new)}"]


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 80 else f"{text[:77]}..."
