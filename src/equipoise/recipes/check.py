"""What is wrong with a recipe, in words: wrong names get the nearest right one."""

from __future__ import annotations

import difflib
import re
import types
import typing
from collections.abc import Iterable
from typing import Any

from pydantic import BaseModel

from equipoise.config import Recipe
from equipoise.recipes import gone

Place = tuple[str | int, ...]
"""A position in the recipe: keys and list indices."""

RESPONDER = re.compile(r"start|prompting|steering|tuned|rerank([1-9][0-9]*)")


def rerank_size(responder: str) -> int | None:
    """Return N of ``rerankN``; None for another responder."""
    found = RESPONDER.fullmatch(responder)
    return int(found[1]) if found and found[1] else None


def explain(item: Any) -> str:
    place: Place = item["loc"]
    key, kind = str(place[-1]) if place else "", item["type"]
    if kind == "extra_forbidden":
        names = field_names(place[:-1])
        hint = gone.advice(place) or nearest(key, names)
        return f"unknown key `{key}`; " + (hint or f"known here: {', '.join(names)}")
    if kind == "missing":
        return f"`{_dotted(place)}` is missing"
    message = str(item["msg"])
    expected = item.get("ctx", {}).get("expected")
    if kind == "literal_error" and isinstance(item["input"], str):
        close = gone.advice(place, item["input"]) or nearest(
            item["input"], re.findall(r"'([^']*)'", str(expected))
        )
        message += f"; {close}" if close else ""
    return f"`{_dotted(place)}` is {item['input']!r}: {message}"


def field_names(place: Place) -> list[str]:
    """Return the field names that are valid at a place of the recipe; empty if any name is."""
    kind: Any = Recipe
    for part in place:
        kind = _inside(kind, part)
    return list(kind.model_fields) if _is_model(kind) else []


def _inside(kind: Any, part: str | int) -> Any:
    if _is_model(kind):
        field = kind.model_fields.get(part)
        return None if field is None else _unwrapped(field.annotation)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (list, dict) and arguments:
        return _unwrapped(arguments[-1])
    return None


def _unwrapped(hint: Any) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        kept = [item for item in typing.get_args(hint) if item is not type(None)]
        return kept[0] if len(kept) == 1 else hint
    return hint


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def contradictions(recipe: Recipe) -> list[tuple[Place, str]]:
    """Return what no single field can know."""
    found: list[tuple[Place, str]] = []
    names = recipe.attributes
    if len(set(names)) != len(names) or not names:
        found.append((("attributes",), "`attributes` must be distinct names, at least one"))
    for part in ("reward_models", "judges"):
        given = set(getattr(recipe, part))
        found += [((part,), f"`{part}.{name}` is missing") for name in names if name not in given]
        found += [
            ((part, name), f"`{part}.{name}`: {nearest(name, names) or 'no such attribute'}")
            for name in sorted(given - set(names))
        ]
        for name, config in getattr(recipe, part).items():
            if config.model.startswith("made://"):
                text = f"`{config.model}` is a policy; a reward model is trained by `fit_reward`"
                found.append(((part, name, "model"), text))
            fitted = config.model.removeprefix("fitted://")
            if fitted != config.model and fitted not in recipe.fit_reward:
                known = ", ".join(recipe.fit_reward) or "nothing"
                found.append(
                    ((part, name, "model"), f"`{config.model}`: fit_reward trains {known}")
                )
    for index, name in enumerate(recipe.evaluate.responders):
        if not RESPONDER.fullmatch(name):
            valid = ["start", "prompting", "steering", "tuned", "rerank8", "rerank16"]
            text = f"unknown responder `{name}`; " + (
                nearest(name, valid) or "start, prompting, rerankN, steering or tuned"
            )
            found.append((("evaluate", "responders", index), text))
    stock = recipe.evaluate.rerank_stock
    largest = max((rerank_size(name) or 0 for name in recipe.evaluate.responders), default=0)
    if stock is not None and stock < largest:
        text = f"`evaluate.rerank_stock` is less than the {largest} samples of rerank{largest}"
        found.append((("evaluate", "rerank_stock"), text))
    found += _optional_contradictions(recipe)
    found += _start_contradictions(recipe)
    rlhf = recipe.tune.rlhf
    if recipe.tune.objective == "rlhf" and recipe.tune.online_batch_size % rlhf.group:
        place: Place = ("tune", "rlhf", "batch_size") if rlhf.batch_size else ("tune", "batch_size")
        text = f"`{_dotted(place)}` is no multiple of `tune.rlhf.group` ({rlhf.group})"
        found.append((place, text))
    if recipe.distil.data == "moec" and recipe.distil.min_cells > recipe.levels ** len(names):
        found.append(
            (("distil", "min_cells"), f"`distil.min_cells` exceeds the number of cells "
             f"({recipe.levels ** len(names)})")
        )  # fmt: skip
    return found


def _optional_contradictions(recipe: Recipe) -> list[tuple[Place, str]]:
    found: list[tuple[Place, str]] = []
    place: Place
    if recipe.regenerate is not None and recipe.steer is None:
        found.append((("regenerate",), "`regenerate` needs the directions of `steer`: {}"))
    if recipe.tune.steered_start is not None:
        place = ("tune", "steered_start")
        if recipe.steer is None:
            found.append((place, "`tune.steered_start` needs the directions of `steer`: {}"))
        if recipe.tune.lora_rank == 0 or recipe.tune.objective == "rlhf":
            found.append(
                (place, "`tune.steered_start` teaches a LoRA before CLM or ExMATE: "
                 "set `tune.lora_rank`")
            )  # fmt: skip
    elif recipe.tune.steps == 0:
        found.append((("tune", "steps"), "`tune.steps` is 0: nothing would be tuned"))
    if "steering" in recipe.evaluate.responders:
        place = ("evaluate", "responders", recipe.evaluate.responders.index("steering"))
        if recipe.steer is None:
            found.append((place, "the responder `steering` needs `steer`: {}"))
        elif recipe.prompts.n_dev == 0:
            found.append(
                (place, "the responder `steering` finds its strengths on dev prompts: set "
                 "`prompts.n_dev`")
            )  # fmt: skip
    if recipe.refusal_judge is not None:
        fitted = recipe.refusal_judge.model.removeprefix("fitted://")
        if fitted != recipe.refusal_judge.model and fitted not in recipe.fit_reward:
            found.append((("refusal_judge", "model"), f"`fit_reward.{fitted}` is missing"))
        if "safety" not in recipe.attributes:
            found.append((("refusal_judge",), "refusals are drawn over the attribute `safety`"))
    if recipe.distil.max_fluency_drop is not None and recipe.regenerate is None:
        found.append(
            (("distil", "max_fluency_drop"), "`distil.max_fluency_drop` is for steered "
             "completions: it needs `regenerate`")
        )  # fmt: skip
    return found


def _start_contradictions(recipe: Recipe) -> list[tuple[Place, str]]:
    """What is ``made://`` must be made, by an earlier stage."""
    found: list[tuple[Place, str]] = []
    order = ("base", "sft", "align")
    named: list[tuple[Place, str, tuple[str, ...]]] = [(("model",), recipe.model, order)]
    named += [
        ((stage, "model"), part.model, order[: order.index(stage)])
        for stage, part in (("sft", recipe.sft), ("align", recipe.align))
        if part is not None
    ]
    named += [
        (("fit_reward", name, "backbone"), config.backbone, order)
        for name, config in recipe.fit_reward.items()
    ]
    for place, name, earlier in named:
        made = name.removeprefix("made://")
        valid = [stage for stage in earlier if getattr(recipe, stage) is not None]
        if made != name and made not in valid:
            text = f"`{name}`: this recipe makes {', '.join(valid) or 'nothing'} before"
            found.append((place, text))
    align = recipe.align
    if align is not None and align.method == "rlhf":
        if not align.rewards:
            found.append((("align", "rewards"), "`align.rewards` is missing: RLHF needs some"))
        if align.batch_size % align.rlhf.group:
            text = f"`align.batch_size` is no multiple of `align.rlhf.group` ({align.rlhf.group})"
            found.append((("align", "batch_size"), text))
    return found


def nearest(name: str, known: Iterable[object]) -> str:
    """Return ``did you mean ...?`` with the nearest known name, or an empty text."""
    close = difflib.get_close_matches(name, [str(item) for item in known], n=1, cutoff=0.5)
    return f"did you mean `{close[0]}`?" if close else ""


def _dotted(place: Place) -> str:
    return ".".join(str(part) for part in place)
