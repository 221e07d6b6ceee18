"""Distilled examples to batches, in an order that depends on the index only.

Everything random about presentation i (which example, auto, counterfactuals) is drawn from a stream
derived from (seed, i). So a resumed run needs no saved sampler, and repeats nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from equipoise.config import TuneConfig
from equipoise.dials.dials import cells
from equipoise.encoding.encode import Encoder
from equipoise.seeds import derive_seed
from equipoise.types import ControlledExample, DialSetting

_BUCKET = 16
"""Batches per length-sorted bucket: little padding, and still a random order."""
LOOK_EVERY = 10
"""Batches from one look to the next at what CLM prefers; it learns from the asked branch alone."""


@dataclass(frozen=True)
class Presentation:
    """One example as it is shown once: a prompt and N branches.

    The asked one first; where steering is distilled, the settings of a text.
    """

    prompt_ids: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...]
    """Control ids, then completion ids."""
    n_control: int
    weight: float


@dataclass(frozen=True)
class ControlledBatch:
    """A rectangular batch: left-padded prompt of P columns, then N branches of R columns."""

    input_ids: Tensor
    """(B, T), T = P + N·R."""
    position_ids: Tensor
    """(B, T); every branch goes on counting where the prompt ends."""
    branch_ids: Tensor
    """(B, T): -1 padding, 0 prompt, 1.. branches."""
    completion_mask: Tensor
    """(B, N, R) true on completion tokens."""
    exists: Tensor
    """(B, N - 1) true where a counterfactual branch exists."""
    weights: Tensor
    """(B,)."""


class TuningPlan(Dataset[Presentation]):
    """Presentation i of ``steps * batch_size``, a pure function of (examples, config, seed, i)."""

    def __init__(
        self,
        examples: Sequence[ControlledExample],
        encoder: Encoder,
        config: TuneConfig,
        *,
        levels: int,
        seed: int,
    ) -> None:
        self._encoder, self._config, self._levels, self._seed = encoder, config, levels, seed
        self.n_examples = len(examples)
        self._settings = [example.setting for example in examples]
        self._weights = [example.weight for example in examples]
        prompts = {e.prompt.id: tuple(encoder.prompt_ids(e.prompt.messages)) for e in examples}
        self._prompt_ids = [prompts[e.prompt.id] for e in examples]
        self._completion_ids = [
            tuple(encoder.completion_ids(e.text, finished=e.finished)) for e in examples
        ]
        by_prompt: dict[str, list[DialSetting]] = defaultdict(list)
        for example in examples:
            by_prompt[example.prompt.id].append(example.setting)
        self._occupied = [by_prompt[e.prompt.id] for e in examples]
        lengths = [
            len(p) + len(c) for p, c in zip(self._prompt_ids, self._completion_ids, strict=True)
        ]
        self.longest = max(lengths, default=0)
        """Ids of the longest example, controls left out."""
        self._order = draw_order(
            lengths,
            steps=config.steps,
            batch_size=config.batch_size,
            rng=np.random.default_rng(derive_seed(seed, "order")),
        )

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> Presentation:
        rng = np.random.default_rng(derive_seed(self._seed, "presentation", index))
        example = int(self._order[index])
        asked = drop_to_auto(self._settings[example], self._config.auto_rate, rng)
        settings = [asked]
        looked_at = index // self._config.batch_size % LOOK_EVERY == 0
        if self._config.objective != "clm" or looked_at:
            settings += counterfactuals(
                asked, self._occupied[example], self._config, self._levels, rng
            )
        completion = self._completion_ids[example]
        controls = [self._encoder.control_ids(setting) for setting in settings]
        return Presentation(
            prompt_ids=self._prompt_ids[example],
            branches=tuple((*ids, *completion) for ids in controls),
            n_control=len(controls[0]),
            weight=self._weights[example],
        )


def drop_to_auto(setting: DialSetting, rate: float, rng: np.random.Generator) -> DialSetting:
    """Set each attribute to auto with probability ``rate``, on its own."""
    draws = rng.random(len(setting.levels))
    return DialSetting(
        tuple(
            None if draw < rate else level
            for draw, level in zip(draws, setting.levels, strict=True)
        )
    )


def counterfactuals(
    asked: DialSetting,
    occupied: Sequence[DialSetting],
    config: TuneConfig,
    levels: int,
    rng: np.random.Generator,
) -> list[DialSetting]:
    """Draw a setting ζ' ≠ ζ; auto attributes stay auto.

    Args:
        asked: ζ, possibly with attributes on auto.
        occupied: Cells of the other completions of the same prompt (for ``observed``).
        config: Which settings are drawn from.
        levels: L.
        rng: The presentation's own stream.

    Returns:
        One setting; none if every attribute is on auto, or if nothing was observed.
    """

    def masked(cell: DialSetting) -> DialSetting:
        return DialSetting(
            tuple(None if a is None else b for a, b in zip(asked.levels, cell.levels, strict=True))
        )

    source = occupied if config.counterfactual == "observed" else cells(len(asked.levels), levels)
    others = sorted({masked(cell) for cell in source} - {asked}, key=_order)
    if config.counterfactual == "one_attribute":
        others = [other for other in others if _n_different(asked, other) == 1]
    return [others[rng.permutation(len(others))[0]]] if others else []


def _order(setting: DialSetting) -> tuple[int, ...]:
    return tuple(-1 if level is None else level for level in setting.levels)


def _n_different(one: DialSetting, other: DialSetting) -> int:
    return sum(a != b for a, b in zip(one.levels, other.levels, strict=True))


def draw_order(
    lengths: Sequence[int], *, steps: int, batch_size: int, rng: np.random.Generator
) -> np.ndarray:
    """Return which row is shown when: ``steps * batch_size`` indices into ``lengths``.

    Epochs of permutations, sorted by length within buckets of batches, the batches of a bucket
    shuffled.
    """
    needed = steps * batch_size
    n_epochs = max(1, -(-needed // len(lengths)))
    order = np.concatenate([rng.permutation(len(lengths)) for _ in range(n_epochs)])[:needed]
    size = batch_size * _BUCKET
    for start in range(0, needed, size):
        bucket = order[start : start + size]
        bucket = bucket[np.argsort(np.asarray(lengths)[bucket], kind="stable")]
        bucket = bucket.reshape(-1, batch_size)
        order[start : start + size] = bucket[rng.permutation(len(bucket))].ravel()
    return order


def collate(rows: Sequence[Presentation]) -> ControlledBatch:
    """Lay presentations out as a rectangle; see :class:`ControlledBatch`."""
    n_prompt = max(len(row.prompt_ids) for row in rows)  # P
    n_branches = max(len(row.branches) for row in rows)  # N
    n_branch = max(len(ids) for row in rows for ids in row.branches)  # R
    total = n_prompt + n_branches * n_branch
    input_ids = torch.zeros(len(rows), total, dtype=torch.long)
    position_ids = torch.zeros(len(rows), total, dtype=torch.long)
    branch_ids = torch.full((len(rows), total), -1)
    mask = torch.zeros(len(rows), n_branches, n_branch, dtype=torch.bool)
    exists = torch.zeros(len(rows), n_branches - 1, dtype=torch.bool)
    for b, row in enumerate(rows):
        start = n_prompt - len(row.prompt_ids)
        input_ids[b, start:n_prompt] = torch.tensor(row.prompt_ids)
        position_ids[b, start:n_prompt] = torch.arange(len(row.prompt_ids))
        branch_ids[b, start:n_prompt] = 0
        for n, ids in enumerate(row.branches):
            at = n_prompt + n * n_branch
            input_ids[b, at : at + len(ids)] = torch.tensor(ids)
            position_ids[b, at : at + len(ids)] = len(row.prompt_ids) + torch.arange(len(ids))
            branch_ids[b, at : at + len(ids)] = n + 1
            mask[b, n, row.n_control : len(ids)] = True
        exists[b, : len(row.branches) - 1] = True
    weights = torch.tensor([row.weight for row in rows])
    return ControlledBatch(input_ids, position_ids, branch_ids, mask, exists, weights)
