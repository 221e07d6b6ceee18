"""What a dial must not cost, as a language model sees it: fluency and perplexity (DESIGN §1).

Reward models and repetition counts do not notice gibberish; the untouched model does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from equipoise.evaluate.intervals import bootstrap, prompt_weights
from equipoise.models.reading import Answer, read_answers, read_completions
from equipoise.types import Delivery, DialSetting, Estimate, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from equipoise.dials.encode import Encoder


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


def perplexity(
    model: PreTrainedModel,
    encoder: Encoder,
    references: Sequence[tuple[Prompt, str, bool]],
    *,
    setting: DialSetting | None = None,
    draws: int = 1000,
    seed: int = 0,
) -> Estimate:
    """Return exp(−log-likelihood per token) of held-out reference completions.

    Args:
        model: The tuned or the untouched model.
        encoder: Its encoder.
        references: Prompts with completions that no training saw, and whether each ended by itself.
        setting: Usually all dials on auto; ``None`` for a model without dials.
        draws: Bootstrap draws over references.
        seed: Seed of the draws.
    """
    control = [] if setting is None else list(encoder.control_ids(setting))
    rows = []
    for prompt, text, finished in references:
        prefix = encoder.prompt_ids(prompt.messages) + control
        ids = encoder.completion_ids(text, finished=finished)
        reading = read_completions(model, prefix, [ids])[0]
        rows.append((reading.log_likelihood, reading.n_tokens))
    weights = prompt_weights(len(rows), draws=draws, seed=seed)
    return bootstrap(np.array(rows, float), weights, lambda m: np.exp(-m[:, 0] / m[:, 1]))
