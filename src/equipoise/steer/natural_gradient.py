"""Directions by natural gradient: what raises a score most for the likelihood that it costs.

Let P_v be the model with a vector v added behind one layer, and g(y) the gradient of log P_v(y|x)
at v = 0. The expected score rises along E[(u - ū)·g] (the policy gradient; Williams 1992), and P_v
moves away from P_0 by ½·v'Fv nats, F = E[g g'] (Amari 1998). So F⁻¹·E[(u - ū)·g] buys most score
per nat: it is the regression of the score on g within prompts (Kakade 2001). Both means are taken
over the pool, which the model has sampled itself; nothing is sampled anew.

Where the difference of means says what good completions *look like* inside, this says what makes
the model *write* them. And as it is a regression, it comes apart: each vector is the one that moves
its own score and, to first order, neither another's nor how likely the untouched model finds the
text.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from equipoise.denoise import is_degenerate
from equipoise.errors import DataError
from equipoise.steer.directions import Directions
from equipoise.types import Prompt, ScoredCompletion

if TYPE_CHECKING:
    from equipoise.models.load import LoadedPolicy

_FOLDS = 5


@dataclass(frozen=True)
class PoolGradients:
    """How the pool's completions answer to a shift, aligned with the pool."""

    gradients: np.ndarray
    """(N, D): see :class:`equipoise.steer.shift_gradients.ShiftGradient`; zeros for an empty
    completion."""
    means: Sequence[float]
    """N mean log-likelihoods per token; NaN for an empty completion."""
    layer: int


def read_gradients(
    scored: Sequence[ScoredCompletion],
    prompts: Mapping[str, Prompt],
    policy: LoadedPolicy,
    *,
    layer: int | None = None,
    on_prompt: Callable[[int], None] | None = None,
) -> PoolGradients:
    """Let the untouched model read its pool, and back: a gradient per completion.

    Args:
        scored: N completions, of any prompts in any order.
        prompts: Prompt id to prompt.
        policy: The untouched model.
        layer: Index of the decoder layer; by default three fifths of the way up, where the scores
            of SmolLM2's pool are foretold best on held-out prompts (layers 17 to 19 of 30).
        on_prompt: Called with 1 after each prompt.
    """
    from equipoise.models.layers import layer_index
    from equipoise.steer.shift_gradients import shift_gradients

    chosen = layer_index(policy.model, layer, fifths=3)
    places: dict[str, list[int]] = defaultdict(list)
    encoded = []
    for place, row in enumerate(scored):
        one = row.completion
        encoded.append(policy.encoder.completion_ids(one.text, finished=one.finish == "stop"))
        places[one.prompt_id].append(place)
    width = policy.model.config.get_text_config().hidden_size
    gradients = np.zeros((len(scored), width), dtype=np.float32)
    means = [float("nan")] * len(scored)
    for prompt_id, found in places.items():
        filled = [place for place in found if encoded[place]]
        read = shift_gradients(
            policy.model,
            policy.encoder.prompt_ids(prompts[prompt_id].messages),
            [encoded[place] for place in filled],
            layer=chosen,
        )
        for place, answer in zip(filled, read, strict=True):
            gradients[place], means[place] = answer.gradient.numpy(), answer.mean
        if on_prompt is not None:
            on_prompt(1)
    return PoolGradients(gradients, means, chosen)


def natural_directions(
    scored: Sequence[ScoredCompletion],
    reading: PoolGradients,
    *,
    attributes: Sequence[str],
    damping: float,
) -> Directions:
    """Return one vector per attribute; strength s is s² nats per completion away, to second order.

    Scores are ranks within their prompt, and all means are taken within prompts, so what a prompt
    asks for says nothing. Degenerate completions are left out.

    Args:
        scored: N completions, scored for all attributes.
        reading: The same N, read by the model.
        attributes: Attribute names, in the settings' order.
        damping: Added to the diagonal of F, in units of its mean: there are more directions in the
            stream than the pool can tell apart.

    Raises:
        DataError: Too few prompts have completions of different score for some attribute.
    """
    import torch

    groups: dict[str, list[int]] = defaultdict(list)
    for place, row in enumerate(scored):
        readable = reading.means[place] == reading.means[place]  # not NaN
        if readable and not is_degenerate(row.completion.text):
            groups[row.completion.prompt_id].append(place)
    answers, units, fluencies, prompt_of = [], [], [], []
    for number, places in enumerate(groups.values()):
        own = reading.gradients[places].astype(np.float64)  # (K, D)
        raw = np.array([[scored[place].raw[name] for name in attributes] for place in places])
        fluency = np.array([reading.means[place] for place in places])[:, None]
        answers.append(own - own.mean(axis=0))
        units.append(_ranks(raw) - 0.5)
        fluencies.append(fluency - fluency.mean())
        prompt_of += [number] * len(places)
    counts = _informative(units, attributes)
    g, u, whose = np.concatenate(answers), np.concatenate(units), np.array(prompt_of)
    moved = np.hstack([u, np.concatenate(fluencies)])  # (N, A + 1)
    vectors = _solve(g, moved, damping)[: len(attributes)]
    cost = np.sqrt(np.square(g @ vectors.T).mean(axis=0) / 2)  # (A,): root of nats at length 1
    vectors /= cost[:, None]
    return Directions(
        tuple(attributes),
        torch.tensor(vectors, dtype=torch.float32),
        reading.layer,
        _agreement(g, moved, whose, attributes, damping),
        counts,
    )


def _solve(g: np.ndarray, u: np.ndarray, damping: float) -> np.ndarray:
    """Return a row F⁻¹·E[(u - ū)·g] per column of u, each made blind to the other columns."""
    fisher = g.T @ g / len(g)
    fisher += damping * np.trace(fisher) / len(fisher) * np.eye(len(fisher))
    rise = g.T @ u / len(g)  # (D, A)
    natural = np.linalg.solve(fisher, rise)
    # gain[a, b]: what column a gains along vector b; singular where a column never differs.
    gain = rise.T @ natural
    return np.asarray(np.linalg.pinv(gain.T) @ natural.T)


def _agreement(
    g: np.ndarray, u: np.ndarray, whose: np.ndarray, attributes: Sequence[str], damping: float
) -> dict[str, float]:
    """Return the share of prompts on which vectors found on the others rank completions right."""
    right: dict[str, list[bool]] = {name: [] for name in attributes}
    for fold in range(_FOLDS):
        held = whose % _FOLDS == fold
        vectors = _solve(g[~held], u[~held], damping)
        rises = (g[held] @ vectors.T) * u[held]  # (n, A)
        for prompt in np.unique(whose[held]):
            own = whose[held] == prompt
            for a, name in enumerate(attributes):
                if np.ptp(u[held][own, a]) > 0:
                    right[name].append(bool(rises[own, a].sum() > 0))
    return {name: float(np.mean(found)) for name, found in right.items()}


def _informative(units: Sequence[np.ndarray], attributes: Sequence[str]) -> dict[str, int]:
    """Return per attribute the number of prompts with completions of different score.

    Raises:
        DataError: For some attribute there are fewer than one per fold.
    """
    found = {
        name: sum(bool(np.ptp(part[:, a]) > 0) for part in units)
        for a, name in enumerate(attributes)
    }
    for name, count in found.items():
        if count < _FOLDS:
            raise DataError(
                f"no direction of {name} can be found",
                why=f"{count} prompts have completions of different score; {_FOLDS} or more are "
                "needed",
                fix="raise generate.completions_per_prompt, or give more training prompts",
            )
    return found


def _ranks(raw: np.ndarray) -> np.ndarray:
    """Return mid-ranks in (0, 1) of the K rows of (K, A) scores; ties share their mean rank."""
    below = (raw[None] < raw[:, None]).sum(axis=1)
    ties = (raw[None] == raw[:, None]).sum(axis=1)
    return np.asarray((below + ties / 2) / len(raw))
