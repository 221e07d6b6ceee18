"""The one loop that trains: it resumes exactly and never saves a spoilt model.

The trainers differ in their loss and their data: ours below, TRL's for fine-tuning, DPO, reward
models and RLHF. :func:`drive` runs them all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from equipoise.errors import TrainingError
from equipoise.training.checkpoints import (
    AGAIN,
    Checkpoints,
    Curve,
    OnStep,
    curve_of,
    newest_complete,
)


class Budget(Protocol):
    """What every config of a training has."""

    @property
    def steps(self) -> int: ...
    @property
    def batch_size(self) -> int: ...
    @property
    def learning_rate(self) -> float: ...
    @property
    def checkpoint_every(self) -> int: ...


@dataclass(frozen=True)
class Training:
    """How one training is run, whatever is trained."""

    checkpoints: Path
    """Folder of the checkpoints, created if missing; the newest complete one is gone on from."""
    seed: int
    """Everything random derives from it."""
    on_step: OnStep | None = None
    """Called with (steps done, steps in all)."""
    dtype: str = "float32"
    """``float32`` or ``bfloat16``, which is mixed precision."""

    def part(self, folder: str, *, before: int = 0, after: int = 0) -> Training:
        """Return one part of this training: its progress is shown among the steps of all parts.

        Args:
            folder: Of its checkpoints, inside this one's; ``""`` for the same.
            before: Steps of the parts before it.
            after: Steps of the parts after it.
        """
        tell = self.on_step

        def on_step(done: int, total: int) -> None:
            if tell is not None:
                tell(before + done, before + total + after)

        return replace(self, checkpoints=self.checkpoints / folder, on_step=on_step)


def arguments(training: Training, budget: Budget) -> dict[str, Any]:
    """Return what every trainer that keeps checkpoints is told: schedule, silence, seeds."""
    return {
        "output_dir": str(training.checkpoints),
        "max_steps": budget.steps,
        "per_device_train_batch_size": budget.batch_size,
        "learning_rate": budget.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, budget.steps // 20),
        "adam_beta2": 0.98,
        "max_grad_norm": 1.0,
        "bf16": training.dtype == "bfloat16",
        "use_cpu": not torch.cuda.is_available(),
        "save_strategy": "steps",
        "save_steps": budget.checkpoint_every,
        "save_total_limit": 2,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "report_to": [],
        "seed": training.seed % 2**31,
        "data_seed": training.seed % 2**31,
    }


def drive(
    trainer: Any, training: Training, curve: Curve, watchers: list[TrainerCallback] | None = None
) -> Curve:
    """Train, from the newest complete checkpoint where there is one; return the whole curve.

    Args:
        trainer: A ``transformers.Trainer``, ours or TRL's.
        training: Where its checkpoints lie, and whom it tells.
        curve: What the trainer or a watcher appends to at every step; the rows of a checkpoint
            are put into it.
        watchers: Called before the checkpoint of a step is written.

    Raises:
        TrainingError: A gradient is not finite; the last good checkpoint is kept.
    """
    training.checkpoints.mkdir(parents=True, exist_ok=True)
    resume = newest_complete(training.checkpoints)
    if resume is not None:
        curve[:] = curve_of(resume)
    # TRL writes a card into every checkpoint, and no setting of it says not to.
    trainer.create_model_card = lambda **_: None
    trainer.remove_callback(PrinterCallback)
    for watcher in (*(watchers or ()), Checkpoints(curve, training.on_step)):
        trainer.add_callback(watcher)
    if trainer.args.max_steps:
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return curve


class PlanTrainer(Trainer):
    """Batches in the order of a plan, and a row of the curve for each; the loss is a subclass's.

    The plan is a pure function of the index, so resuming replays nothing.

    Args:
        model: What is trained.
        plan: A data set, in order.
        collate: Rows of the plan to the inputs of :meth:`loss_of`.
        config: Steps, batch size and rate.
        training: Where, and from which seed.
    """

    overflow: tuple[str, str]
    """Why a loss is not finite, most often, and what to do."""

    def __init__(
        self,
        model: Any,
        plan: Any,
        collate: Callable[[Any], dict[str, Any]],
        config: Budget,
        training: Training,
    ) -> None:
        given = TrainingArguments(
            **arguments(training, config),
            weight_decay=0.0,
            logging_strategy="no",
            remove_unused_columns=False,
            train_sampling_strategy="sequential",
        )
        super().__init__(model=model, args=given, train_dataset=plan, data_collator=collate)
        self.curve: Curve = []
        self.model_accepts_loss_kwargs = False

    def loss_of(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, float]]:
        """Return the loss of a batch and its facts; ``tokens`` are those of this batch alone."""
        raise NotImplementedError

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the loss of one batch, and append its facts to the curve.

        Raises:
            TrainingError: The loss is not finite; the last good checkpoint is kept.
        """
        step = self.state.global_step + 1
        loss, facts = self.loss_of(model, inputs)
        refuse_not_finite(loss, step, *self.overflow)
        seen = self.curve[-1]["tokens"] if self.curve else 0
        self.curve.append({"step": step, **facts, "tokens": seen + facts["tokens"]})
        return (loss, None) if return_outputs else loss


def refuse_not_finite(loss: Tensor, step: int, why: str, fix: str) -> None:
    """Raise before a loss that is not finite can reach the weights.

    Raises:
        TrainingError: It is not; the last good checkpoint is kept.
    """
    if not torch.isfinite(loss):
        raise TrainingError(
            f"Tuning stopped at step {step}: the loss is not finite",
            why=why,
            fix=f"{fix}, then {AGAIN}",
        )
