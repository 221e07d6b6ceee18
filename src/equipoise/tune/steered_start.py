"""Steering distilled into control tokens, before the objective begins; ours, not the paper's.

A steering direction steers the untouched model well, but needs a vector added at every
step. Here the adapter and the control rows learn to put it there themselves: behind one layer, the
states of a completion read under a setting shall be those of the untouched model plus the setting's
share of the directions. Every position is a target of D numbers, where likelihood gives one bit of
label for a whole completion; and only the layers up to that one are computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from equipoise.config import SteeredStartConfig
from equipoise.encoding.encode import Encoder
from equipoise.models.layers import states_behind
from equipoise.training.checkpoints import Curve
from equipoise.training.loop import PlanTrainer, Training, drive
from equipoise.tune.batch import ControlledBatch
from equipoise.tune.prefix import before_labels, read_apart
from equipoise.tune.shifts import ShiftBatch, ShiftDirections, ShiftPlan, ShiftRow, shift_batch
from equipoise.types import ControlledExample


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
    auto_rate: float,
    training: Training,
) -> Curve:
    """Teach the adapter and the control rows of a peft model the directions, in place.

    Args:
        model: With dials installed and LoRA added.
        examples: Their texts are read; their settings are not.
        encoder: Of the model with dials.
        steering: The directions.
        config: Budget and strength.
        auto_rate: Probability, per attribute, of auto, which is taught to add nothing.
        training: Where, and from which seed.

    Returns:
        Per step, as shares of the mean squared shift, ``unexplained`` (of what differs between
        settings; about ``1 - auto_rate`` for a model that ignores its dials) and ``disturbance``
        (of what does not), and ``tokens`` so far. Single steps scatter with the settings drawn:
        read a mean.

    Raises:
        TrainingError: The states or a gradient are not finite.
    """
    plan = ShiftPlan(examples, encoder, steering, config, auto_rate=auto_rate, seed=training.seed)
    trainer = ShiftTrainer(model, plan, config, training)
    return drive(trainer, training, trainer.curve)


class ShiftTrainer(PlanTrainer):
    """The shift that is still missing, on :class:`ShiftBatch`."""

    overflow = (
        "the adapter overflowed, most often from a learning rate that is too high",
        "lower tune.steered_start.learning_rate",
    )

    def __init__(
        self, model: Any, plan: ShiftPlan, config: SteeredStartConfig, training: Training
    ) -> None:
        super().__init__(model, plan, _inputs, config, training)
        self.layer, self.rows_learning_rate = plan.layer, config.rows_learning_rate
        self.wanted = max(plan.wanted, 1e-12)

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

    def loss_of(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, float]]:
        """Return what is unexplained and, weighted, the disturbance; both are facts."""
        batch = ShiftBatch(**{**inputs, "dialled": ControlledBatch(**inputs["dialled"])})
        found = missing(model, batch, self.layer)
        unexplained, disturbance = found.unexplained / self.wanted, found.disturbance / self.wanted
        weight = disturbance_weight(self.state.global_step / self.state.max_steps)
        facts = {"unexplained": unexplained.item(), "disturbance": disturbance.item()}
        return unexplained + weight * disturbance, {**facts, "tokens": batch.n_tokens}


def _inputs(rows: Sequence[ShiftRow]) -> dict[str, Any]:
    batch = shift_batch(rows)
    return {**vars(batch), "dialled": vars(batch.dialled)}
