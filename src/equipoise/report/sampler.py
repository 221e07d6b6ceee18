"""The part of the page where a reader turns the dials over completions that were really sampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from equipoise.report.canvas import label
from equipoise.types import Delivery, Finish, Prompt

MAX_PROMPTS = 6
MAX_CHARACTERS = 1200
MAX_BYTES = 1_500_000

_CUT: Mapping[Finish, str] = {
    "stop": "",
    "length": " (cut by the token limit)",
    "thought": " (its thought did not end)",
}

Json = Mapping[str, Any]


def sampler(
    report: Json,
    judge: str,
    deliveries: Mapping[str, Sequence[Delivery]],
    prompts: Mapping[str, Prompt],
) -> str:
    """Return HTML with the first repeat's completions of a few prompts, one per cell.

    Prompts are the first ones by id, not the ones that look best. All text is escaped.
    """
    attributes, levels = report["recipe"]["attributes"], report["recipe"]["levels"]
    ids = sorted({d.prompt_id for rows in deliveries.values() for d in rows} & set(prompts))
    methods = {
        method: {
            (d.prompt_id, d.setting.levels): d for d in rows if d.repeat == 0 and d.setting.is_cell
        }
        for method, rows in deliveries.items()
        if method in report["methods"]
    }
    if not ids or not methods:
        return ""
    ids = _that_fit(ids[:MAX_PROMPTS], methods)
    best = "tuned" if "tuned" in methods else list(methods)[-1]
    options = "".join(
        f'<option value="{m}"{" selected" if name == best else ""}>{escape(label(name))}</option>'
        for m, name in enumerate(methods)
    )
    asked = "".join(
        f'<option value="{p}">{escape(_short(prompts[i].messages[-1].content))}</option>'
        for p, i in enumerate(ids)
    )
    dials = "".join(
        f'<label>{escape(name)} <input type="range" min="0" max="{levels - 1}" step="1" '
        f'value="{levels - 1}" data-dial="{a}"><output>{levels - 1}</output></label>'
        for a, name in enumerate(attributes)
    )
    answers = "".join(
        _answer(f"{m}|{p}|{','.join(map(str, setting))}", found, judge)
        for m, rows in enumerate(methods.values())
        for p, prompt_id in enumerate(ids)
        for (owner, setting), found in sorted(rows.items(), key=lambda row: str(row[0]))
        if owner == prompt_id
    )
    questions = "".join(
        f'<div class="question" data-prompt="{p}">{_conversation(prompts[i])}</div>'
        for p, i in enumerate(ids)
    )
    return (
        f'<div id="sampler"><div class="controls"><label>method <select data-pick="method">'
        f'{options}</select></label><label>prompt <select data-pick="prompt">{asked}</select>'
        f"</label>{dials}</div>{questions}{answers}</div>"
    )


def _that_fit(
    ids: list[str], methods: Mapping[str, Mapping[tuple[str, tuple[int | None, ...]], Delivery]]
) -> list[str]:
    # The page stays under 5 MB with any number of methods, in any script.
    sizes = dict.fromkeys(ids, 0)
    for rows in methods.values():
        for (prompt_id, _), found in rows.items():
            if prompt_id in sizes:
                sizes[prompt_id] += len(escape(found.text[:MAX_CHARACTERS]).encode()) + 150
    return [
        i for n, i in enumerate(ids) if not n or sum(sizes[j] for j in ids[: n + 1]) < MAX_BYTES
    ]


def _conversation(prompt: Prompt) -> str:
    return "".join(
        f"<p><b>{escape(message.role)}</b> {escape(message.content[:MAX_CHARACTERS])}</p>"
        for message in prompt.messages
    )


def _answer(key: str, found: Delivery, judge: str) -> str:
    scores = " · ".join(
        f"{escape(name)} {unit:.2f}"
        for name, unit in next(
            (units for kind, units in found.unit.items() if kind == judge), {}
        ).items()
    )
    cut = _CUT[found.finish]
    return (
        f'<div class="answer" data-key="{escape(key)}"><p>{escape(found.text[:MAX_CHARACTERS])}'
        f"</p><small>delivered: {scores}{cut}</small></div>"
    )


def _short(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 60 else line[:59] + "…"
