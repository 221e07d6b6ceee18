"""``transformers.Trainer`` on batches of our own order, with a curve and exact resume.

The data order is a pure function of the index, so resuming replays nothing; and a checkpoint counts
only once its marker is written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, Trainer, TrainingArguments

from equipoise.errors import TrainingError
from equipoise.tune.checkpoints import (
    AGAIN,
    Budget,
    Checkpoints,
    Curve,
    OnStep,
    curve_of,
    newest_complete,
    trainer_settings,
)


class OrderedTrainer(Trainer):
    """What trainers of a plan have in common; ``compute_loss`` is theirs.

    Args:
        config: Steps, batch size and rate.
        checkpoints: Folder of the checkpoints.
        dtype: ``float32`` or ``bfloat16``.
        seed: Of everything random that is not derived elsewhere.
        on_step: Called with (steps done, steps in all).
        kwargs: Of ``transformers.Trainer``: the model, the plan as ``train_dataset``, the collator.
    """

    def __init__(
        self,
        *,
        config: Budget,
        checkpoints: Path,
        dtype: str,
        seed: int,
        on_step: OnStep | None,
        **kwargs: Any,
    ) -> None:
        arguments = TrainingArguments(
            **trainer_settings(checkpoints, config, dtype=dtype, seed=seed),
            weight_decay=0.0,
            max_grad_norm=1.0,
            logging_strategy="no",
            remove_unused_columns=False,
        )
        super().__init__(args=arguments, **kwargs)
        self.curve: Curve = []
        self.model_accepts_loss_kwargs = False
        self.remove_callback(PrinterCallback)
        self.add_callback(Checkpoints(self.curve, on_step))

    def run(self) -> Curve:
        """Train, from the newest complete checkpoint where there is one; return the whole curve."""
        resume = newest_complete(Path(str(self.args.output_dir)))
        if resume is not None:
            self.curve[:] = curve_of(resume)
        if self.args.max_steps:
            self.train(resume_from_checkpoint=str(resume) if resume else None)
        return self.curve

    def stop_unless_finite(self, loss: Tensor, *, why: str, fix: str) -> None:
        """Raise before a loss that is not finite can reach the weights.

        Raises:
            TrainingError: It is not; the last good checkpoint is kept.
        """
        if not torch.isfinite(loss):
            raise TrainingError(
                f"Tuning stopped at step {self.state.global_step + 1}: the loss is not finite",
                why=why,
                fix=f"{fix}, then {AGAIN}",
            )

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        # The plan is already in order; shuffling again would make resume inexact.
        plan: Any = train_dataset if train_dataset is not None else self.train_dataset
        return SequentialSampler(plan)
