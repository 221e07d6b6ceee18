"""What a run directory says of itself: the number of its layout, its recipe, its date.

The date is what chat templates write: the first day of the run. Templates of Llama 3.1, Granite
and others write today's date into every prompt. A run that goes on after midnight, or is resumed
next week, must ask with the prompts that it began with.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from equipoise.config import Recipe
from equipoise.errors import RunError
from equipoise.recipes.gone import in_todays_fields, readable
from equipoise.recipes.source import settled_paths
from equipoise.store.publish import json_bytes, publish_bytes, read_json, read_json_or_none

RECIPE = "recipe.json"
FORMAT_FILE, FORMAT = "format.json", 1
"""Where the layout's number stands, and the number of this version's; a directory without the file
is from before there was a number, and has this layout."""


def check_format(path: Path) -> None:
    """Refuse a run directory of another layout.

    Raises:
        RunError: It has one.
    """
    kept = read_json_or_none(path / FORMAT_FILE)
    found = FORMAT if kept is None else kept.get("format") if isinstance(kept, dict) else kept
    if found != FORMAT:
        raise RunError(
            f"{path} has the format {found!r}",
            why=f"this version of equipoise reads format {FORMAT}",
            fix=f"make it anew with: equipoise run {path}/{RECIPE} --dir NEW; or use the version "
            "that made it",
        )


def stored_recipe(path: Path) -> Recipe:
    """Return the recipe that a run directory was made with.

    Raises:
        RunError: There is none, or it cannot be read, or asks for what is no longer done, or the
            directory has another format.
    """
    check_format(path)
    try:
        return Recipe.model_validate(readable(read_json(path / RECIPE), path))
    except (OSError, ValueError) as error:
        raise RunError(
            f"cannot read the recipe of {path}",
            why=str(error).splitlines()[0],
            fix="name a run directory, or a recipe: `equipoise recipes` lists the shipped ones",
        ) from error


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


FILE = "date.json"


def settle_date(run_dir: Path) -> datetime.date:
    """Return the date of a run; today's, recorded, where there is none yet.

    Raises:
        RunError: What is recorded is no date.
    """
    file = run_dir / FILE
    kept = read_json_or_none(file)
    if kept is None:
        today = datetime.date.today()
        publish_bytes(file, json_bytes({"date": today.isoformat()}))
        return today
    try:
        return datetime.date.fromisoformat(kept["date"])
    except (KeyError, TypeError, ValueError) as error:
        raise RunError(
            f"{file} holds no date",
            why="the chat template writes this date into every prompt of the run",
            fix='restore the line {"date": "YYYY-MM-DD"} with the day on which the run began',
        ) from error
