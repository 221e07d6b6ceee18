"""MOEC: denoise the pool, and close the back door (docs/distil.md).

If a prompt occurs with one control only, the model can read the prompt and ignore the control. So a
kept prompt carries several completions, at most one per control cell, over several cells. The
paper's page that spells the letters out could not be read, so none of our pages invents a name.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from equipoise.config import DistilConfig
from equipoise.denoise import is_degenerate
from equipoise.dials.dials import Dials
from equipoise.errors import DataError
from equipoise.types import ControlledExample, DialSetting, Prompt, ScoredCompletion

Parses = Callable[[Prompt, str], bool]


@dataclass(frozen=True)
class MoecReport:
    """What was kept, what was dropped and why."""

    n_pool: int
    n_kept: int
    n_prompts_pool: int
    n_prompts_kept: int
    dropped: Mapping[str, int]
    """Reason to number of completions."""
    grid_before: tuple[tuple[int, ...], ...]
    """(L, L) completions per cell of the first two attributes, pool."""
    grid_after: tuple[tuple[int, ...], ...]
    """(L, L) examples per cell, distilled set."""


def distil(
    scored: Sequence[ScoredCompletion],
    units: Sequence[Mapping[str, float]],
    prompts: Mapping[str, Prompt],
    config: DistilConfig,
    *,
    dials: Dials,
    parses: Parses | None = None,
    fluency_drops: Sequence[float] | None = None,
) -> tuple[list[ControlledExample], MoecReport]:
    """Turn a scored pool into training examples.

    Args:
        scored: N scored completions; scores are those of the shortened text.
        units: N unit scores in [0, 1] per attribute, aligned with ``scored``.
        prompts: Prompt by id.
        config: ``data`` = ``moec`` (all steps), ``denoised`` (step 1 only) or ``raw`` (none). In
            all three, texts are shortened to finished sentences and cells weighted by
            ``balance_cap``.
        dials: Attributes and levels.
        parses: A world's own parser, if it has one: what it cannot read is degenerate.
        fluency_drops: N: how much less likely, per token and in nats, the untouched model finds a
            completion than its own of that prompt; 0 for its own. NaN is dropped with the rest.

    Returns:
        The examples, ordered by prompt id and cell, and the report.

    Raises:
        DataError: If nothing is left, e.g. if no prompt spans ``min_cells`` cells.
    """
    dropped: Counter[str] = Counter()
    by_prompt: dict[str, list[ControlledExample]] = defaultdict(list)
    seen: set[tuple[str, str]] = set()
    drops = [0.0] * len(scored) if fluency_drops is None else fluency_drops
    most = config.max_fluency_drop
    for one, unit, drop in zip(scored, units, drops, strict=True):
        completion, prompt = one.completion, prompts[one.completion.prompt_id]
        text = completion.sentences
        reason = None
        if text is None or not text.strip():
            reason = "empty or no finished sentence"
        elif config.data != "raw" and (prompt.id, text) in seen:
            reason = "duplicate"
        elif config.data != "raw" and is_degenerate(text, parses=_reader(parses, prompt)):
            reason = "degenerate"
        elif config.data != "raw" and most is not None and not drop <= most:
            reason = "less fluent than the model itself"
        if reason or text is None:
            dropped[str(reason)] += 1
            continue
        seen.add((prompt.id, text))
        setting = dials.cell_of(unit)
        finished = completion.finish == "stop"
        by_prompt[prompt.id].append(ControlledExample(prompt, setting, text, finished, unit))

    kept: list[ControlledExample] = []
    for prompt_id in sorted(by_prompt):
        examples = by_prompt[prompt_id]
        if config.data == "moec":
            nearest = nearest_per_cell(examples, dials)
            dropped["not the nearest in its cell"] += len(examples) - len(nearest)
            examples = nearest
            if not spans(examples, config.min_cells, len(dials.attributes)):
                dropped["prompt spans too few cells"] += len(examples)
                continue
        kept += examples
    if not kept:
        raise DataError(
            "Distillation kept no prompt",
            why=f"of {len(by_prompt)} prompts none has completions in {config.min_cells} cells "
            "that span two levels of each attribute",
            fix="raise generate.completions_per_prompt or the temperature, or lower "
            "distil.min_cells",
        )
    weighted = _balanced(kept, config.balance_cap)
    pool_cells = [dials.cell_of(unit) for unit in units]
    report = MoecReport(
        n_pool=len(scored),
        n_kept=len(weighted),
        n_prompts_pool=len({s.completion.prompt_id for s in scored}),
        n_prompts_kept=len({e.prompt.id for e in weighted}),
        dropped=dict(sorted(dropped.items())),
        grid_before=_grid(pool_cells, dials.levels),
        grid_after=_grid([e.setting for e in weighted], dials.levels),
    )
    return weighted, report


def _reader(parses: Parses | None, prompt: Prompt) -> Callable[[str], bool] | None:
    return None if parses is None else lambda text: parses(prompt, text)


def nearest_per_cell(
    examples: Sequence[ControlledExample], dials: Dials
) -> list[ControlledExample]:
    """Keep per cell the example nearest the cell's centre; ties go to the earlier sample."""
    best: dict[DialSetting, tuple[float, ControlledExample]] = {}
    for example in examples:
        distance = sum(
            (example.unit[name] - dials.target(int(level or 0))) ** 2
            for name, level in zip(dials.attributes, example.setting.levels, strict=True)
        )
        if example.setting not in best or distance < best[example.setting][0]:
            best[example.setting] = (distance, example)
    return [best[setting][1] for setting in sorted(best)]


def spans(examples: Sequence[ControlledExample], min_cells: int, n_attributes: int) -> bool:
    """Whether the cells are at least ``min_cells`` and span two levels of each attribute."""
    cells = {example.setting for example in examples}
    return len(cells) >= min_cells and all(
        len({cell.levels[a] for cell in cells}) >= 2 for a in range(n_attributes)
    )


def _balanced(examples: list[ControlledExample], cap: float) -> list[ControlledExample]:
    """Weight cells by inverse frequency, at most ``cap`` times the weight of the commonest."""
    counts = Counter(example.setting for example in examples)
    commonest = max(counts.values())
    raw = np.array([min(cap, commonest / counts[example.setting]) for example in examples])
    return [
        replace(example, weight=float(weight))
        for example, weight in zip(examples, raw / raw.mean(), strict=True)
    ]


def _grid(cells: Sequence[DialSetting], levels: int) -> tuple[tuple[int, ...], ...]:
    counts = Counter(cell.levels[:2] for cell in cells)
    other = range(levels) if cells and len(cells[0].levels) > 1 else range(1)
    if len(other) == 1:
        return tuple((counts[(a,)],) for a in range(levels))
    return tuple(tuple(counts[(a, b)] for b in other) for a in range(levels))
