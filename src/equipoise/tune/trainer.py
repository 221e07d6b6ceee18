"""The thin driver: ``transformers.Trainer`` with our batches, our objective and exact resume.

Differs from a plain Trainer run in three ways: the data order is a pure function of the index (see
``batch.py``), so resuming replays nothing; a checkpoint counts only once its marker is written; and
a loss that is not finite stops the run before it can reach the weights.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, Trainer

from equipoise.config import TuneConfig
from equipoise.dials.encode import Encoder
from equipoise.dials.tokens import DialManifest, install
from equipoise.errors import TrainingError
from equipoise.models.load import LoadedPolicy
from equipoise.tune.batch import ControlledBatch, TuningPlan, collate
from equipoise.tune.checkpoints import (
    Checkpoints,
    Curve,
    OnStep,
    curve_of,
    in_order,
    newest_complete,
    settled_dtype,
)
from equipoise.tune.lora import add_lora
from equipoise.tune.objectives import (
    Loss,
    clm,
    exmate,
    mean_of,
    preferred,
    running_mean,
)
from equipoise.tune.prefix import branch_log_likelihoods
from equipoise.tune.steered_start import steered_start
from equipoise.types import ControlledExample

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Tuned:
    """A tuned policy, not yet saved."""

    model: PreTrainedModel
    """With LoRA: the peft model."""
    tokenizer: PreTrainedTokenizerBase
    manifest: DialManifest
    curve: list[dict[str, float]]
    """Per step: loss, m of the asked and the counterfactual setting, pull, running mean of exp(m')
    (``usual``), share of branches whose asked cell is preferred (nan where none was looked at;
    fresh examples while ``epoch`` <= 1), epochs and tokens so far."""
    start_curve: Curve
    """Of a steered start, see :func:`equipoise.tune.steered_start.steered_start`; else empty."""
    dtype: str
    seconds: float
    """Of this process; a resumed run counts its last part only."""


def tune(
    policy: LoadedPolicy,
    examples: Sequence[ControlledExample],
    config: TuneConfig,
    *,
    attributes: Sequence[str],
    levels: int,
    seed: int,
    checkpoints: Path,
    base_model: str = "",
    steering: tuple[Tensor, int] | None = None,
    on_step: OnStep | None = None,
) -> Tuned:
    """Tune a policy on distilled examples; resumes from the newest complete checkpoint.

    Args:
        policy: The untouched model; it is changed in place.
        examples: The distilled set.
        config: Objective and budget.
        attributes: Attribute names.
        levels: L.
        seed: Everything random derives from it.
        checkpoints: Folder of the checkpoints; created if missing.
        base_model: Name of the untouched model, for the manifest.
        steering: Directions (A, D) and their layer, for ``config.steered_start``.
        on_step: Called with (steps done, steps in all), those of a steered start included.

    Raises:
        TrainingError: If the loss is not finite; the last good checkpoint is kept.
    """
    manifest = install(
        policy.model,
        policy.tokenizer,
        attributes=attributes,
        levels=levels,
        base_model=base_model,
        base_model_hash=policy.hash,
    )
    encoder = Encoder(policy.tokenizer, manifest)
    plan = TuningPlan(examples, encoder, config, levels=levels, seed=seed)
    model: Any = policy.model
    if config.lora_rank:
        model = add_lora(model, manifest, rank=config.lora_rank, seed=seed)
    checkpoints.mkdir(parents=True, exist_ok=True)
    dtype = settled_dtype(checkpoints, config.dtype)
    resume = newest_complete(checkpoints)
    started = time.monotonic()
    first: Curve = []
    if config.steered_start is not None and steering is not None:
        first = steered_start(
            model,
            examples,
            encoder,
            steering,
            config.steered_start,
            levels=levels,
            auto_rate=config.auto_rate,
            seed=seed,
            checkpoints=checkpoints / "start",
            dtype=dtype,
            on_step=shown(on_step, 0, config.steps),
        )
        on_step = shown(on_step, config.steered_start.steps, 0)
    trainer = DialTrainer(
        model=model,
        args=in_order(config, checkpoints, dtype=dtype, seed=seed),
        train_dataset=plan,
        data_collator=lambda rows: vars(collate(rows)),
        tune_config=config,
        n_examples=len(examples),
        on_step=on_step,
    )
    if resume is not None:
        trainer.curve[:] = curve_of(resume)
    if config.steps:
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return Tuned(
        model=model.eval(),
        tokenizer=policy.tokenizer,
        manifest=manifest,
        curve=trainer.curve,
        start_curve=first,
        dtype=dtype,
        seconds=time.monotonic() - started,
    )


def shown(on_step: OnStep | None, before: int, after: int) -> OnStep | None:
    """Return a progress callback of one part, which reports the steps of all."""
    if on_step is None:
        return None
    return lambda done, total: on_step(before + done, before + total + after)


class DialTrainer(Trainer):
    """``transformers.Trainer`` on :class:`ControlledBatch` with one of our objectives."""

    def __init__(
        self, *, tune_config: TuneConfig, n_examples: int, on_step: OnStep | None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.tune_config = tune_config
        self.n_examples = n_examples
        self.curve: list[dict[str, float]] = []
        self.model_accepts_loss_kwargs = False
        self.remove_callback(PrinterCallback)
        self.add_callback(Checkpoints(self.curve, on_step))

    def _get_train_sampler(self, train_dataset: Any = None) -> SequentialSampler:
        # The plan is already in order; shuffling again would make resume inexact.
        plan: Any = train_dataset if train_dataset is not None else self.train_dataset
        return SequentialSampler(plan)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the objective of one batch, and append it to the curve."""
        last = self.curve[-1] if self.curve else {}
        step = self.state.global_step + 1
        batch, config = ControlledBatch(**inputs), self.tune_config
        loss, right = objective(
            model, batch, config, weight=weight_at(step, config), usual_effect=last.get("usual")
        )
        if not torch.isfinite(loss.loss):
            raise TrainingError(
                f"Tuning stopped at step {step}: the loss is not finite",
                why="the model's log-likelihoods overflowed, most often from a learning rate or a "
                "counterfactual weight that is too high",
                fix="lower tune.learning_rate or tune.weight and run again with --fresh; the last "
                "good checkpoint is kept",
            )
        self.curve.append(
            {
                "step": step,
                "loss": loss.loss.item(),
                "asked": loss.asked.item(),
                "counterfactual": loss.counterfactual.item(),
                "pull": loss.pull.item(),
                "usual": running_mean(last.get("usual"), loss.effect.item()),
                "preferred": right.item(),
                "epoch": step * config.batch_size / self.n_examples,
                "tokens": last.get("tokens", 0) + int((inputs["branch_ids"] >= 0).sum()),
            }
        )
        return (loss.loss, None) if return_outputs else loss.loss


def objective(
    model: Any,
    batch: ControlledBatch,
    config: TuneConfig,
    *,
    weight: float | None = None,
    usual_effect: float | None = None,
) -> tuple[Loss, Tensor]:
    """Return the objective of one batch under ``model``, and how often it prefers the asked cell.

    Args:
        model: The policy.
        batch: Asked and counterfactual branches.
        config: Which objective.
        weight: ``w`` of this step; the config's by default.
        usual_effect: The running mean of exp(m') before this step, for ``weight_relative``.
    """
    sums, counts = branch_log_likelihoods(model, batch)
    m, weights, exists = mean_of(sums, counts), batch.weights, batch.exists
    w = config.weight if weight is None else weight
    right = preferred(sums.detach(), exists)
    if config.objective == "exmate":
        loss = exmate(
            m,
            weights,
            exists,
            weight=w,
            exp_of=config.exp_of,
            relative=config.weight_relative,
            usual_effect=usual_effect,
        )
    else:
        loss = clm(m, weights, exists)
    return loss, right


def weight_at(step: int, config: TuneConfig) -> float:
    """Return ``w`` of a step, counted from 1: it rises on a straight line in the warm-up."""
    if not config.weight_warm_up:
        return config.weight
    return config.weight * min(1.0, step / config.weight_warm_up)
