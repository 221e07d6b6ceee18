"""What a dial must not cost: degenerate outputs, length, fluency, perplexity (docs/evaluate.md).

Reward models and repetition counts do not notice gibberish; the untouched model does.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from equipoise.denoise import is_degenerate
from equipoise.dials.dials import Dials
from equipoise.models.likelihood import Answer, read_answers, read_completions
from equipoise.stats import BOOTSTRAP, Array, Bootstrap, Estimate
from equipoise.types import Delivery, DialSetting, JudgeKind, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from equipoise.encoding.encode import Encoder


def degenerate_share(
    deliveries: Sequence[Delivery],
    *,
    prompts: Mapping[str, Prompt] | None = None,
    parses: Callable[[Prompt, str], bool] | None = None,
    bootstrap: Bootstrap = BOOTSTRAP,
) -> Estimate:
    """Return the share of degenerate outputs; the bootstrap is over prompts.

    Args:
        deliveries: At least one.
        prompts: Prompt id to prompt; needed with ``parses`` only.
        parses: The world's parser, if it has one.
        bootstrap: Resamples prompts.
    """

    def verdict(delivery: Delivery) -> bool:
        if parses is None or prompts is None:
            return is_degenerate(delivery.text)
        prompt = prompts[delivery.prompt_id]
        return is_degenerate(delivery.text, parses=lambda text: parses(prompt, text))

    return _over_prompts(
        [(d.prompt_id, float(verdict(d))) for d in deliveries], bootstrap=bootstrap
    )


def length_per_level(
    deliveries: Sequence[Delivery],
    *,
    dials: Dials,
    bootstrap: Bootstrap = BOOTSTRAP,
) -> dict[str, list[Estimate]]:
    """Return per attribute and requested level the mean number of tokens, end token included."""
    return {
        attribute: [
            _over_prompts(
                [(d.prompt_id, float(d.n_tokens)) for d in deliveries if d.setting.levels[a] == lv],
                bootstrap=bootstrap,
            )
            for lv in range(dials.levels)
        ]
        for a, attribute in enumerate(dials.attributes)
    }


def per_setting(
    deliveries: Sequence[Delivery], values: Sequence[float], *, bootstrap: Bootstrap = BOOTSTRAP
) -> dict[DialSetting, Estimate]:
    """Return the mean of ``values`` (one per delivery; NaN = none) per setting, over prompts."""
    rows: dict[DialSetting, list[tuple[str, float]]] = defaultdict(list)
    for delivery, value in zip(deliveries, values, strict=True):
        if not np.isnan(value):
            rows[delivery.setting].append((delivery.prompt_id, value))
    return {setting: _over_prompts(found, bootstrap=bootstrap) for setting, found in rows.items()}


def drift(
    free: Sequence[Delivery],
    references: Sequence[Delivery],
    *,
    judge: JudgeKind,
    attribute: str,
    bootstrap: Bootstrap = BOOTSTRAP,
) -> Estimate:
    """Return how much a tuned model, left alone, scores above the untouched one, by prompt.

    Args:
        free: The tuned model's outputs with every dial on auto, on benign prompts.
        references: The untouched model's outputs; prompts that are not in ``free`` do not count.
        judge: Whose unit scores.
        attribute: Of which attribute.
        bootstrap: Resamples prompts.

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
    return _over_prompts(rows, bootstrap=bootstrap)


def _over_prompts(rows: Sequence[tuple[Hashable, float]], *, bootstrap: Bootstrap) -> Estimate:
    if not rows:
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    sums: dict[Hashable, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for key, value in rows:
        sums[key][0] += value
        sums[key][1] += 1
    return bootstrap.of(np.array(list(sums.values())), lambda m: m[:, 0] / m[:, 1])


_REFERENCE_TOKENS = 256


def fluency(
    deliveries: Sequence[Delivery],
    prompts: Mapping[str, Prompt],
    model: PreTrainedModel,
    encoder: Encoder,
    *,
    batch_size: int = 32,
) -> list[float]:
    """Return each output's mean log-likelihood per token under the *untouched* model.

    Give it the untouched model's own outputs as well: a figure means something beside that one.
    ``quality.per_setting`` turns the values into one estimate per cell; no tokens give NaN.

    Args:
        deliveries: Outputs of any method.
        prompts: Prompt id to prompt.
        model: The untouched model.
        encoder: The untouched model's encoder.
        batch_size: Completions per forward pass.
    """
    answers = [Answer(d.prompt_id, d.text, d.finish == "stop") for d in deliveries]
    found = read_answers(model, encoder, answers, prompts, batch_size=batch_size)
    return [reading.mean for reading in found]


def read_references(
    model: PreTrainedModel,
    encoder: Encoder,
    references: Sequence[tuple[Prompt, str, bool]],
    *,
    setting: DialSetting | None = None,
) -> Array:
    """Return the log-likelihood of each reference's first tokens, and their number: (N, 2).

    Args:
        model: The tuned or the untouched model.
        encoder: Its encoder.
        references: N prompts with completions that no training saw, and whether each ended by
            itself; of a long one the first 256 tokens count.
        setting: Usually all dials on auto; ``None`` for a model without dials.
    """
    control = [] if setting is None else list(encoder.control_ids(setting))
    rows = []
    for prompt, text, finished in references:
        prefix = encoder.prompt_ids(prompt.messages) + control
        ids = encoder.completion_ids(text, finished=finished)[:_REFERENCE_TOKENS]
        reading = read_completions(model, prefix, [ids])[0]
        rows.append((reading.log_likelihood, reading.n_tokens))
    return np.array(rows, float)


def perplexity(read: Array, *, bootstrap: Bootstrap = BOOTSTRAP) -> Estimate:
    """Return exp(−log-likelihood per token) of references as :func:`read_references` gives them.

    Args:
        read: (N, 2).
        bootstrap: Resamples prompts.
    """
    return bootstrap.of(read, lambda m: np.exp(-m[:, 0] / m[:, 1]))


def perplexity_ratio(before: Array, after: Array, *, bootstrap: Bootstrap = BOOTSTRAP) -> Estimate:
    """Return the perplexity of one model over that of another, paired over the same references.

    Args:
        before: (N, 2) of the untouched model, see :func:`read_references`.
        after: (N, 2) of the tuned one.
        bootstrap: Resamples prompts.
    """
    both = np.concatenate([before, after], axis=1)  # (N, 4)
    return bootstrap.of(both, lambda m: np.exp(m[:, 0] / m[:, 1] - m[:, 2] / m[:, 3]))
