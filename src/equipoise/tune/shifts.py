"""What steering is distilled from: texts under drawn settings, and the shift that each shall add.

The settings are drawn at random and have nothing to do with the text, so the text gives no hint. A
text is read under a setting and its mirror images on every dial at once: what a text alone would
teach the adapter cancels between them (but for auto, which is drawn per reading), and what is left
is what the dials shall do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from equipoise.config import SteeredStartConfig
from equipoise.encoding.encode import Encoder
from equipoise.seeds import derive_seed
from equipoise.tune.batch import (
    ControlledBatch,
    Presentation,
    collate,
    draw_order,
    drop_to_auto,
)
from equipoise.types import ControlledExample, DialSetting


@dataclass(frozen=True)
class ShiftDirections:
    """What the start teaches: the directions of the ``steer`` stage."""

    vectors: Tensor
    """(A, D): directions of the untouched model."""
    layer: int
    """Behind which they apply."""


@dataclass(frozen=True)
class ShiftRow:
    """One text under N settings."""

    text: Presentation
    """The prompt, and the completion behind the controls of each setting."""
    shifts: Tensor
    """(N, D): what each setting shall add to the states."""


@dataclass(frozen=True)
class ShiftBatch:
    """Texts without controls (what the untouched model reads), and behind those of N settings."""

    plain_ids: Tensor
    """(B, T): prompt and completion, padded on the right."""
    plain_at: Tensor
    """(B, T): true where the next token is one of the completion's."""
    dialled: ControlledBatch
    """The settings of a text as branches behind its prompt."""
    shifts: Tensor
    """(B, N, D): what shall be added to the states."""
    n_tokens: int
    """Tokens that are read, padding left out."""


def shift_of(
    setting: DialSetting, steering: ShiftDirections, config: SteeredStartConfig, levels: int
) -> Tensor:
    """Return what a setting adds to the states: its share of each direction, (A, D) to (D,).

    Level ``l`` of L gets ``strength·(2l/(L-1) - 1)`` of its direction, auto nothing. The sum is
    scaled down to ``max_shift`` mean lengths where it is longer.
    """
    vectors = steering.vectors.float()
    strengths = tuple(
        0.0 if level is None else config.strength * (2 * level / (levels - 1) - 1)
        for level in setting.levels
    )
    shift = torch.tensor(strengths) @ vectors
    longest = config.max_shift * vectors.norm(dim=1).mean()
    return shift * min(1.0, float(longest / shift.norm().clamp(min=1e-12)))


class ShiftPlan(Dataset[ShiftRow]):
    """Text i of ``steps * batch_size`` under random settings, a function of (seed, i) only."""

    def __init__(
        self,
        examples: Sequence[ControlledExample],
        encoder: Encoder,
        steering: ShiftDirections,
        config: SteeredStartConfig,
        *,
        auto_rate: float,
        seed: int,
    ) -> None:
        assert encoder.manifest is not None  # it is the encoder of a model with dials
        self._encoder, self._dials = encoder, encoder.manifest.dials
        self._auto_rate, self._seed, self.layer = auto_rate, seed, steering.layer
        self._texts = [
            (
                tuple(encoder.prompt_ids(example.prompt.messages)),
                tuple(encoder.completion_ids(example.text, finished=example.finished))[
                    : config.tokens
                ],
            )
            for example in examples
        ]
        self._order = draw_order(
            [len(prompt) + len(completion) for prompt, completion in self._texts],
            steps=config.steps,
            batch_size=config.batch_size,
            rng=np.random.default_rng(derive_seed(seed, "steered start order")),
        )
        grid = product((*range(self._dials.levels), None), repeat=len(self._dials.attributes))
        self._shifts = {
            setting: shift_of(setting, steering, config, self._dials.levels)
            for setting in map(DialSetting, grid)
        }

    def __len__(self) -> int:
        return len(self._order)

    @property
    def wanted(self) -> float:
        """Mean squared length of the shifts over the grid."""
        grid = [self._shifts[cell] for cell in self._dials.cells()]
        return float(torch.stack(grid).square().sum(dim=1).mean())

    def __getitem__(self, index: int) -> ShiftRow:
        rng = np.random.default_rng(derive_seed(self._seed, "steered start", index))
        prompt, completion = self._texts[int(self._order[index])]
        drawn = rng.integers(self._dials.levels, size=len(self._dials.attributes))
        settings = [
            drop_to_auto(setting, self._auto_rate, rng)
            for setting in mirrored([int(level) for level in drawn], self._dials.levels)
        ]
        controls = [tuple(self._encoder.control_ids(setting)) for setting in settings]
        return ShiftRow(
            Presentation(
                prompt,
                tuple((*ids, *completion) for ids in controls),
                n_control=len(controls[0]),
                weight=1.0,
            ),
            torch.stack([self._shifts[setting] for setting in settings]),
        )


def mirrored(levels: Sequence[int], count: int) -> list[DialSetting]:
    """Return a setting with its mirror images on every dial of ``count`` levels: 2^A settings."""
    pairs = ((level, count - 1 - level) for level in levels)
    return [DialSetting(setting) for setting in product(*pairs)]


def shift_batch(rows: Sequence[ShiftRow]) -> ShiftBatch:
    """Lay texts out as two rectangles; see :class:`ShiftBatch`."""
    texts = [row.text for row in rows]
    plain = [(text.prompt_ids, text.branches[0][text.n_control :]) for text in texts]
    width = max(len(prompt) + len(completion) for prompt, completion in plain)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    at = torch.zeros(len(rows), width, dtype=torch.bool)
    for b, (prompt, completion) in enumerate(plain):
        ids[b, : len(prompt) + len(completion)] = torch.tensor((*prompt, *completion))
        at[b, len(prompt) - 1 : len(prompt) - 1 + len(completion)] = True
    dialled = collate(texts)
    return ShiftBatch(
        ids,
        at,
        dialled,
        shifts=torch.stack([row.shifts for row in rows]),
        n_tokens=sum(len(prompt) + len(text) for prompt, text in plain)
        + int((dialled.branch_ids >= 0).sum()),
    )
