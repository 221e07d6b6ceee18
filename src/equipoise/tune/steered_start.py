"""Control tokens that already move the model: the steering directions, taught before tuning.

A difference-of-means direction steers the untouched model well, but needs a vector added at every
step. Here the adapter and the control rows learn to put it there themselves: behind one layer, the
states of a completion read under a setting shall be those of the untouched model plus the setting's
share of the directions. Every position is a target of D numbers, where likelihood gives one bit of
label for a whole completion; and only the layers up to that one are computed.

The settings are drawn at random and have nothing to do with the text, so the text gives no hint.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from equipoise.config import SteeredStartConfig
from equipoise.dials.attributes import cells
from equipoise.dials.encode import Encoder
from equipoise.models.layers import states_behind
from equipoise.seeds import derive_seed
from equipoise.tune.checkpoints import Curve, OnStep
from equipoise.tune.counterfactual import drop_to_auto
from equipoise.tune.ordered import OrderedTrainer
from equipoise.types import ControlledExample, DialSetting


@dataclass(frozen=True)
class ShiftDirections:
    """What the start teaches: the ``steer`` stage's directions and what it found about them."""

    vectors: Tensor
    """(A, D): directions of the untouched model."""
    layer: int
    """Behind which they apply."""
    strengths_of: Callable[[DialSetting], tuple[float, ...]] | None = None
    """One strength per attribute for a setting, in place of ``strength``."""


@dataclass(frozen=True)
class ShiftRow:
    """One text under one setting."""

    prompt_ids: tuple[int, ...]
    control_ids: tuple[int, ...]
    completion_ids: tuple[int, ...]
    shift: Tensor
    """(D,): what the setting shall add to the states."""


@dataclass(frozen=True)
class ShiftBatch:
    """Texts without controls (what the untouched model reads) and with them."""

    plain_ids: Tensor
    """(B, T): prompt and completion, padded on the right."""
    dialled_ids: Tensor
    """(B, T + A): controls between them."""
    plain_at: Tensor
    """(B, T): true where the next token is one of the completion's."""
    dialled_at: Tensor
    """(B, T + A): the same; as many per row as in ``plain_at``."""
    shifts: Tensor
    """(B, D): what shall be added to the states."""
    n_tokens: int
    """Tokens in both rectangles, padding left out."""


def shift_of(
    setting: DialSetting, steering: ShiftDirections, config: SteeredStartConfig, levels: int
) -> Tensor:
    """Return what a setting adds to the states: its share of each direction, (A, D) to (D,).

    Unless ``steering`` knows the strengths, level ``l`` of L gets ``strength·(2l/(L-1) - 1)`` of
    its direction, auto nothing. The sum is scaled down to ``max_shift`` mean lengths where it is
    longer.
    """
    vectors = steering.vectors.float()
    if steering.strengths_of is not None:
        strengths = steering.strengths_of(setting)
    else:
        strengths = tuple(
            0.0 if level is None else config.strength * (2 * level / (levels - 1) - 1)
            for level in setting.levels
        )
    shift = torch.tensor(strengths) @ vectors
    longest = config.max_shift * vectors.norm(dim=1).mean()
    return shift * min(1.0, float(longest / shift.norm().clamp(min=1e-12)))


class ShiftPlan(Dataset[ShiftRow]):
    """Text i of ``steps * batch_size`` under a random setting, a function of (seed, i) only."""

    def __init__(
        self,
        examples: Sequence[ControlledExample],
        encoder: Encoder,
        steering: ShiftDirections,
        config: SteeredStartConfig,
        *,
        levels: int,
        auto_rate: float,
        seed: int,
    ) -> None:
        self._examples, self._encoder, self._config = examples, encoder, config
        self._steering, self._levels, self._auto_rate = steering, levels, auto_rate
        self._seed = seed
        self._cells = cells(len(steering.vectors), levels)
        needed = config.steps * config.batch_size
        rng = np.random.default_rng(derive_seed(seed, "steered start order"))
        epochs = [rng.permutation(len(examples)) for _ in range(-(-needed // len(examples)))]
        self._order = np.concatenate(epochs)[:needed]

    def __len__(self) -> int:
        return len(self._order)

    def __getitem__(self, index: int) -> ShiftRow:
        rng = np.random.default_rng(derive_seed(self._seed, "steered start", index))
        example = self._examples[int(self._order[index])]
        cell = self._cells[int(rng.integers(len(self._cells)))]
        setting = drop_to_auto(cell, self._auto_rate, rng)
        completion = self._encoder.completion_ids(example.text, finished=example.finished)
        return ShiftRow(
            tuple(self._encoder.prompt_ids(example.prompt.messages)),
            tuple(self._encoder.control_ids(setting)),
            tuple(completion[: self._config.tokens]),
            shift_of(setting, self._steering, self._config, self._levels),
        )


def collate(rows: Sequence[ShiftRow]) -> ShiftBatch:
    """Lay texts out as two rectangles; see :class:`ShiftBatch`."""
    plain = [(row.prompt_ids, row.completion_ids) for row in rows]
    dialled = [((*row.prompt_ids, *row.control_ids), row.completion_ids) for row in rows]
    plain_ids, plain_at = _rectangle(plain)
    dialled_ids, dialled_at = _rectangle(dialled)
    return ShiftBatch(
        plain_ids,
        dialled_ids,
        plain_at,
        dialled_at,
        shifts=torch.stack([row.shift for row in rows]),
        n_tokens=sum(len(before) + len(text) for before, text in (*plain, *dialled)),
    )


def _rectangle(rows: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> tuple[Tensor, Tensor]:
    width = max(len(before) + len(completion) for before, completion in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    at = torch.zeros(len(rows), width, dtype=torch.bool)
    for b, (before, completion) in enumerate(rows):
        ids[b, : len(before) + len(completion)] = torch.tensor((*before, *completion))
        at[b, len(before) - 1 : len(before) - 1 + len(completion)] = True
    return ids, at


def unexplained(model: Any, batch: ShiftBatch, layer: int) -> tuple[Tensor, Tensor]:
    """Return how far the states are from where they shall be, and how far they shall move.

    Both are sums of squares over all positions: their ratio is 1 for a model that is deaf and
    undisturbed by the control tokens, and 0 at the aim.

    Args:
        model: A peft model; without its adapter it is the untouched one.
        batch: See :class:`ShiftBatch`.
        layer: Behind which the directions are added.
    """
    with torch.no_grad(), model.disable_adapter():
        aim = states_behind(model, layer, batch.plain_ids)[batch.plain_at].float()  # (n, D)
    states = states_behind(model, layer, batch.dialled_ids)[batch.dialled_at].float()
    counts = batch.plain_at.sum(dim=1)
    shifts = batch.shifts.repeat_interleave(counts, dim=0)  # (n, D)
    return (states - aim - shifts).square().sum(), shifts.square().sum()


def steered_start(
    model: Any,
    examples: Sequence[ControlledExample],
    encoder: Encoder,
    steering: ShiftDirections,
    config: SteeredStartConfig,
    *,
    levels: int,
    auto_rate: float,
    seed: int,
    checkpoints: Path,
    dtype: str,
    on_step: OnStep | None = None,
) -> Curve:
    """Teach the adapter and the control rows of a peft model the directions, in place.

    Args:
        model: With dials installed and LoRA added.
        examples: Their texts are read; their settings are not.
        encoder: Of the model with dials.
        steering: The directions, and what was found about them.
        config: Budget and strength.
        levels: L.
        auto_rate: Probability, per attribute, of auto, which is taught to add nothing.
        seed: Everything random derives from it.
        checkpoints: Folder of the checkpoints; resumes from the newest complete one.
        dtype: ``float32`` or ``bfloat16``.
        on_step: Called with (steps done, steps in all).

    Returns:
        Per step ``unexplained`` (share of the squared shift; 1 = deaf) and ``tokens`` so far.

    Raises:
        TrainingError: The states are not finite.
    """
    checkpoints.mkdir(parents=True, exist_ok=True)
    trainer = ShiftTrainer(
        layer=steering.layer,
        config=config,
        checkpoints=checkpoints,
        dtype=dtype,
        seed=seed,
        on_step=on_step,
        model=model,
        train_dataset=ShiftPlan(
            examples, encoder, steering, config, levels=levels, auto_rate=auto_rate, seed=seed
        ),
        data_collator=lambda rows: vars(collate(rows)),
    )
    return trainer.run()


class ShiftTrainer(OrderedTrainer):
    """The shift that is still missing, on :class:`ShiftBatch`."""

    def __init__(self, *, layer: int, config: SteeredStartConfig, **kwargs: Any) -> None:
        super().__init__(config=config, **kwargs)
        self.layer, self.rows_learning_rate = layer, config.rows_learning_rate

    def create_optimizer(self, model: Any = None) -> Any:
        """Give the control rows a rate of their own: one row is seen once in L examples."""
        if self.optimizer is None:
            learner: Any = self.model
            learnt = [(n, p) for n, p in learner.named_parameters() if p.requires_grad]
            rows = [p for n, p in learnt if "token" in n]
            others = [p for n, p in learnt if "token" not in n]
            kind, options = self.get_optimizer_cls_and_kwargs(self.args)
            groups = [{"params": others}, {"params": rows, "lr": self.rows_learning_rate}]
            self.optimizer = kind(groups, **options)
        return self.optimizer

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the share of the squared shift that is not there yet, and note it."""
        step = self.state.global_step + 1
        missing, wanted = unexplained(model, ShiftBatch(**inputs), self.layer)
        loss = missing / wanted.clamp(min=1e-12)
        self.stop_unless_finite(
            loss,
            why="the adapter overflowed, most often from a learning rate that is too high",
            fix="lower tune.steered_start.learning_rate",
        )
        last = self.curve[-1] if self.curve else {"tokens": 0}
        tokens = last["tokens"] + inputs["n_tokens"]
        row = {"step": step, "unexplained": loss.item(), "tokens": tokens}
        self.curve.append(row)
        return (loss, None) if return_outputs else loss
