"""What a dial must not cost, seen from the text: degenerate outputs and length (DESIGN §1)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence

import numpy as np

from equipoise.denoise import is_degenerate
from equipoise.evaluate.intervals import bootstrap, prompt_weights
from equipoise.types import Delivery, DialSetting, Estimate, JudgeKind, Prompt


def degenerate_share(
    deliveries: Sequence[Delivery],
    *,
    prompts: Mapping[str, Prompt] | None = None,
    parses: Callable[[Prompt, str], bool] | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Return the share of degenerate outputs; the bootstrap is over prompts.

    Args:
        deliveries: At least one.
        prompts: Prompt id to prompt; needed with ``parses`` only.
        parses: The world's parser, if it has one.
        draws: Bootstrap draws.
        seed: Seed of the draws.
    """

    def verdict(delivery: Delivery) -> bool:
        if parses is None or prompts is None:
            return is_degenerate(delivery.text)
        prompt = prompts[delivery.prompt_id]
        return is_degenerate(delivery.text, parses=lambda text: parses(prompt, text))

    return _over_prompts(
        [(d.prompt_id, float(verdict(d))) for d in deliveries], draws=draws, seed=seed
    )


def length_per_level(
    deliveries: Sequence[Delivery],
    *,
    attributes: Sequence[str],
    levels: int,
    draws: int = 1000,
    seed: int = 0,
) -> dict[str, list[Estimate]]:
    """Return per attribute and requested level the mean number of tokens, end token included."""
    return {
        attribute: [
            _over_prompts(
                [(d.prompt_id, float(d.n_tokens)) for d in deliveries if d.setting.levels[a] == lv],
                draws=draws,
                seed=seed,
            )
            for lv in range(levels)
        ]
        for a, attribute in enumerate(attributes)
    }


def per_setting(
    deliveries: Sequence[Delivery], values: Sequence[float], *, draws: int = 1000, seed: int = 0
) -> dict[DialSetting, Estimate]:
    """Return the mean of ``values`` (one per delivery; NaN = none) per setting, over prompts."""
    rows: dict[DialSetting, list[tuple[str, float]]] = defaultdict(list)
    for delivery, value in zip(deliveries, values, strict=True):
        if not np.isnan(value):
            rows[delivery.setting].append((delivery.prompt_id, value))
    return {
        setting: _over_prompts(found, draws=draws, seed=seed) for setting, found in rows.items()
    }


def drift(
    free: Sequence[Delivery],
    references: Sequence[Delivery],
    *,
    judge: JudgeKind,
    attribute: str,
    draws: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Return how much a tuned model, left alone, scores above the untouched one, by prompt.

    Args:
        free: The tuned model's outputs with every dial on auto, on benign prompts.
        references: The untouched model's outputs; prompts that are not in ``free`` do not count.
        judge: Whose unit scores.
        attribute: Of which attribute.
        draws: Bootstrap draws over prompts.
        seed: Seed of the draws.

    Returns:
        Mean over prompts of the difference of unit scores, in [-1, 1]; 0 = nothing has moved.
    """

    def means(rows: Sequence[Delivery]) -> dict[str, float]:
        scores: dict[str, list[float]] = defaultdict(list)
        for row in rows:
            scores[row.prompt_id].append(row.unit[judge][attribute])
        return {prompt_id: float(np.mean(found)) for prompt_id, found in scores.items()}

    tuned, start = means(free), means(references)
    rows = [(name, value - start[name]) for name, value in tuned.items() if name in start]
    return _over_prompts(rows, draws=draws, seed=seed)


def _over_prompts(rows: Sequence[tuple[Hashable, float]], *, draws: int, seed: int) -> Estimate:
    if not rows:
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    sums: dict[Hashable, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for key, value in rows:
        sums[key][0] += value
        sums[key][1] += 1
    weights = prompt_weights(len(sums), draws=draws, seed=seed)
    return bootstrap(np.array(list(sums.values())), weights, lambda m: m[:, 0] / m[:, 1])
