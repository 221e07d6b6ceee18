"""What a dial must not cost, as a language model sees it: fluency and perplexity (DESIGN §1).

Reward models and repetition counts do not notice gibberish; the untouched model does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from equipoise.evaluate.intervals import Array, bootstrap, prompt_weights
from equipoise.models.reading import Answer, read_answers, read_completions
from equipoise.types import Delivery, DialSetting, Estimate, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from equipoise.dials.encode import Encoder

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


def perplexity(read: Array, *, draws: int = 1000, seed: int = 0) -> Estimate:
    """Return exp(−log-likelihood per token) of references as :func:`read_references` gives them.

    Args:
        read: (N, 2).
        draws: Bootstrap draws over references.
        seed: Seed of the draws.
    """
    weights = prompt_weights(len(read), draws=draws, seed=seed)
    return bootstrap(read, weights, lambda m: np.exp(-m[:, 0] / m[:, 1]))


def perplexity_ratio(before: Array, after: Array, *, draws: int = 1000, seed: int = 0) -> Estimate:
    """Return the perplexity of one model over that of another, paired over the same references.

    Args:
        before: (N, 2) of the untouched model, see :func:`read_references`.
        after: (N, 2) of the tuned one.
        draws: Bootstrap draws over references.
        seed: Seed of the draws.
    """
    both = np.concatenate([before, after], axis=1)  # (N, 4)
    weights = prompt_weights(len(both), draws=draws, seed=seed)
    return bootstrap(both, weights, lambda m: np.exp(m[:, 0] / m[:, 1] - m[:, 2] / m[:, 3]))
