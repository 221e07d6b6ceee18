"""What could be delivered: completions drawn from the grammar, for the attainable ceiling.

The ceiling is a policy that picks, per prompt and cell, the nearest of all that the grammar can
write; the grammar is sampled densely, since its completions are too many to list.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from equipoise.seeds import derive_seed
from equipoise.types import Prompt, UnitScale
from equipoise.worlds.workshop.grammar import Request, base_intensities, plan, write
from equipoise.worlds.workshop.oracle import judge, read_request

N_CANDIDATES = 2000
"""Completions drawn from the grammar per prompt."""


def ceiling_candidates(
    prompts: Sequence[Prompt], scale: UnitScale, *, n: int = N_CANDIDATES, seed: int = 0
) -> list[NDArray[np.float64]]:
    """Return, per prompt, unit scores (n, 2) of completions drawn from the grammar."""
    found = []
    for prompt in prompts:
        request = read_request(prompt.messages)
        rng = random.Random(derive_seed(seed, "ceiling", prompt.id))
        texts = {_any_completion(rng, request) for _ in range(n)}
        found.append(units_of(request, sorted(texts), scale))
    return found


def units_of(request: Request, texts: Sequence[str], scale: UnitScale) -> NDArray[np.float64]:
    """Return oracle unit scores (len(texts), 2) of completions of one request."""
    judged = [judge(request, text) for text in texts]
    return np.array(
        [[scale.unit("helpfulness", j.helpfulness), scale.unit("safety", j.safety)] for j in judged]
    )


def _any_completion(rng: random.Random, request: Request) -> str:
    wanted = base_intensities(rng)
    return write(rng, request, plan(rng, wanted.care, wanted.help))
