"""Control tokens that already move the model: the steering directions, taught before tuning.

A steering direction steers the untouched model well, but needs a vector added at every
step. Here the adapter and the control rows learn to put it there themselves: behind one layer, the
states of a completion read under a setting shall be those of the untouched model plus the setting's
share of the directions. Every position is a target of D numbers, where likelihood gives one bit of
label for a whole completion; and only the layers up to that one are computed.

The settings are drawn at random and have nothing to do with the text, so the text gives no hint. A
text is read under a setting and its mirror images on every dial at once: what a text alone would
teach the adapter cancels between them (but for auto, which is drawn per reading), and what is left
is what the dials shall do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from equipoise.config import SteeredStartConfig
from equipoise.dials.dials import cells
from equipoise.encoding.encode import Encoder
from equipoise.models.layers import states_behind
from equipoise.seeds import derive_seed
from equipoise.tune.batch import ControlledBatch, Presentation, draw_order
from equipoise.tune.batch import collate as lay_out
from equipoise.tune.checkpoints import Curve, OnStep
from equipoise.tune.counterfactual import drop_to_auto
from equipoise.tune.ordered import OrderedTrainer
from equipoise.tune.prefix import before_labels, read_apart
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
        levels: int,
        auto_rate: float,
        seed: int,
    ) -> None:
        self._encoder, self._levels, self._auto_rate = encoder, levels, auto_rate
        self._seed = seed
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
        self._n_attributes = len(steering.vectors)
        grid = product((*range(levels), None), repeat=self._n_attributes)
        self._shifts = {
            setting: shift_of(setting, steering, config, levels)
            for setting in map(DialSetting, grid)
        }

    def __len__(self) -> int:
        return len(self._order)

    @property
    def wanted(self) -> float:
        """Mean squared length of the shifts over the grid."""
        grid = [self._shifts[cell] for cell in cells(self._n_attributes, self._levels)]
        return float(torch.stack(grid).square().sum(dim=1).mean())

    def __getitem__(self, index: int) -> ShiftRow:
        rng = np.random.default_rng(derive_seed(self._seed, "steered start", index))
        prompt, completion = self._texts[int(self._order[index])]
        drawn = rng.integers(self._levels, size=self._n_attributes)
        settings = [
            drop_to_auto(setting, self._auto_rate, rng)
            for setting in mirrored([int(level) for level in drawn], self._levels)
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


def collate(rows: Sequence[ShiftRow]) -> ShiftBatch:
    """Lay texts out as two rectangles; see :class:`ShiftBatch`."""
    texts = [row.text for row in rows]
    plain = [(text.prompt_ids, text.branches[0][text.n_control :]) for text in texts]
    width = max(len(prompt) + len(completion) for prompt, completion in plain)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    at = torch.zeros(len(rows), width, dtype=torch.bool)
    for b, (prompt, completion) in enumerate(plain):
        ids[b, : len(prompt) + len(completion)] = torch.tensor((*prompt, *completion))
        at[b, len(prompt) - 1 : len(prompt) - 1 + len(completion)] = True
    dialled = lay_out(texts)
    return ShiftBatch(
        ids,
        at,
        dialled,
        shifts=torch.stack([row.shifts for row in rows]),
        n_tokens=sum(len(prompt) + len(text) for prompt, text in plain)
        + int((dialled.branch_ids >= 0).sum()),
    )


@dataclass(frozen=True)
class Missing:
    """How far the states are from where they shall be: mean squared lengths over all positions."""

    unexplained: Tensor
    """Of what differs between the settings of a text."""
    disturbance: Tensor
    """Of what the control tokens do whatever they say: the mean over the settings of a text."""


def missing(model: Any, batch: ShiftBatch, layer: int) -> Missing:
    """Return how far the states of a batch are from the untouched model's plus the shifts.

    Args:
        model: A peft model; without its adapter it is the untouched one.
        batch: See :class:`ShiftBatch`.
        layer: Behind which the directions are added.
    """
    with torch.no_grad(), model.disable_adapter():
        plain = states_behind(model, layer, batch.plain_ids)[batch.plain_at].float()  # (n, D)
    read = before_labels(batch.dialled)
    states = states_behind(model, layer, **read_apart(model, batch.dialled))[read].float()
    counts = batch.plain_at.sum(dim=1).tolist()
    n_settings, width = batch.shifts.shape[1:]  # N, D
    of_texts = torch.split(states, [n_settings * count for count in counts])
    total = disturbance = states.new_zeros(())
    for got, own, shifts in zip(of_texts, torch.split(plain, counts), batch.shifts, strict=True):
        error = got.view(n_settings, len(own), width) - own - shifts[:, None]
        total = total + error.square().sum()
        disturbance = disturbance + n_settings * error.mean(dim=0).square().sum()
    n = max(1, len(states))
    return Missing((total - disturbance) / n, disturbance / n)


def disturbance_weight(progress: float) -> float:
    """Return how much the disturbance counts in the loss, by the share of the steps done.

    A tenth at first, all of it after a third of the way: counted in full from the start it teaches
    attention to look away from tokens that as yet only disturb, and the dials are found late or
    never.
    """
    at_first, in_full_after = 0.1, 1 / 3
    return min(1.0, at_first + (1 - at_first) * progress / in_full_after)


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
        steering: The directions.
        config: Budget and strength.
        levels: L.
        auto_rate: Probability, per attribute, of auto, which is taught to add nothing.
        seed: Everything random derives from it.
        checkpoints: Folder of the checkpoints; resumes from the newest complete one.
        dtype: ``float32`` or ``bfloat16``.
        on_step: Called with (steps done, steps in all).

    Returns:
        Per step, as shares of the mean squared shift, ``unexplained`` (of what differs between
        settings; about ``1 - auto_rate`` for a deaf model) and ``disturbance`` (of what does not),
        and ``tokens`` so far. Single steps scatter with the settings drawn: read a mean.

    Raises:
        TrainingError: The states or a gradient are not finite.
    """
    checkpoints.mkdir(parents=True, exist_ok=True)
    plan = ShiftPlan(
        examples, encoder, steering, config, levels=levels, auto_rate=auto_rate, seed=seed
    )
    trainer = ShiftTrainer(
        layer=steering.layer,
        wanted=plan.wanted,
        config=config,
        checkpoints=checkpoints,
        dtype=dtype,
        seed=seed,
        on_step=on_step,
        model=model,
        train_dataset=plan,
        data_collator=_inputs,
    )
    return trainer.run()


def _inputs(rows: Sequence[ShiftRow]) -> dict[str, Any]:
    batch = collate(rows)
    return {**vars(batch), "dialled": vars(batch.dialled)}


class ShiftTrainer(OrderedTrainer):
    """The shift that is still missing, on :class:`ShiftBatch`."""

    def __init__(
        self, *, layer: int, wanted: float, config: SteeredStartConfig, **kwargs: Any
    ) -> None:
        super().__init__(config=config, **kwargs)
        self.layer, self.rows_learning_rate = layer, config.rows_learning_rate
        self.wanted = max(wanted, 1e-12)

    def create_optimizer(self, model: Any = None) -> Any:
        """Give the control rows a rate of their own: a row is in few of the readings."""
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
        """Return what is unexplained and, weighted, the disturbance; note both in the curve."""
        step = self.state.global_step + 1
        batch = ShiftBatch(**{**inputs, "dialled": ControlledBatch(**inputs["dialled"])})
        found = missing(model, batch, self.layer)
        unexplained, disturbance = found.unexplained / self.wanted, found.disturbance / self.wanted
        weight = disturbance_weight(self.state.global_step / self.state.max_steps)
        loss = unexplained + weight * disturbance
        self.stop_unless_finite(
            loss,
            why="the adapter overflowed, most often from a learning rate that is too high",
            fix="lower tune.steered_start.learning_rate",
        )
        last = self.curve[-1] if self.curve else {"tokens": 0}
        self.curve.append(
            {
                "step": step,
                "unexplained": unexplained.item(),
                "disturbance": disturbance.item(),
                "tokens": last["tokens"] + inputs["n_tokens"],
            }
        )
        return (loss, None) if return_outputs else loss
