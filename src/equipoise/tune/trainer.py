"""The thin driver: ``transformers.Trainer`` with our batches, our objective and exact resume.

Differs from a plain Trainer run in three ways: the data order is a pure function of the index (see
``batch.py``), so resuming replays nothing; a checkpoint counts only once its marker is written; and
a loss that is not finite stops the run before it can reach the weights.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import SequentialSampler
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

from equipoise.config import TuneConfig
from equipoise.dials.encode import Encoder
from equipoise.dials.tokens import DialManifest, install
from equipoise.errors import TrainingError
from equipoise.models.load import LoadedPolicy, torch_dtype
from equipoise.tune.batch import ControlledBatch, TuningPlan, collate
from equipoise.tune.lora import add_lora
from equipoise.tune.objectives import Loss, clm, exmate, mean_log_likelihood
from equipoise.tune.prefix import branch_logits
from equipoise.types import ControlledExample

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_MARKER = "equipoise.json"
OnStep = Callable[[int, int], None]


@dataclass(frozen=True)
class Tuned:
    """A tuned policy, not yet saved."""

    model: PreTrainedModel
    """With LoRA: the peft model."""
    tokenizer: PreTrainedTokenizerBase
    manifest: DialManifest
    curve: list[dict[str, float]]
    """Per step: loss, m of the asked and the counterfactual setting, pull, tokens so far."""
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
        on_step: Called with (steps done, steps in all).

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
    dtype = _settled_dtype(checkpoints, config)
    resume = _newest_complete(checkpoints)
    started = time.monotonic()
    trainer = DialTrainer(
        model=model,
        args=_arguments(config, checkpoints, dtype=dtype, seed=seed),
        train_dataset=plan,
        data_collator=lambda rows: vars(collate(rows)),
        tune_config=config,
        on_step=on_step,
    )
    if resume is not None:
        trainer.curve[:] = json.loads((resume / _MARKER).read_text())["curve"]
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return Tuned(
        model=model.eval(),
        tokenizer=policy.tokenizer,
        manifest=manifest,
        curve=trainer.curve,
        dtype=dtype,
        seconds=time.monotonic() - started,
    )


class DialTrainer(Trainer):
    """``transformers.Trainer`` on :class:`ControlledBatch` with CLM or ExMATE."""

    def __init__(self, *, tune_config: TuneConfig, on_step: OnStep | None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.tune_config = tune_config
        self.curve: list[dict[str, float]] = []
        self.model_accepts_loss_kwargs = False
        self.remove_callback(PrinterCallback)
        self.add_callback(_Checkpoints(self.curve, on_step))

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
        loss = objective(model, ControlledBatch(**inputs), self.tune_config)
        if not torch.isfinite(loss.loss):
            raise TrainingError(
                f"Tuning stopped at step {self.state.global_step + 1}: the loss is not finite",
                why="the model's log-likelihoods overflowed, most often from a learning rate or a "
                "counterfactual weight that is too high",
                fix="lower tune.learning_rate or tune.weight and run again with --fresh; the last "
                "good checkpoint is kept",
            )
        seen = self.curve[-1]["tokens"] if self.curve else 0
        self.curve.append(
            {
                "step": self.state.global_step + 1,
                "loss": loss.loss.item(),
                "asked": loss.asked.item(),
                "counterfactual": loss.counterfactual.item(),
                "pull": loss.pull.item(),
                "tokens": seen + int((inputs["branch_ids"] >= 0).sum()),
            }
        )
        return (loss.loss, None) if return_outputs else loss.loss


def objective(model: Any, batch: ControlledBatch, config: TuneConfig) -> Loss:
    """Return the objective of one batch under ``model``."""
    _, n_branches, length = batch.completion_mask.shape
    logits = branch_logits(
        model,
        batch.input_ids,
        batch.position_ids,
        batch.branch_ids,
        n_branches=n_branches,
        branch_length=length,
    )
    ids = batch.input_ids[:, -n_branches * length :].reshape(-1, n_branches, length)
    m = mean_log_likelihood(logits, ids, batch.completion_mask)
    if config.objective == "clm" or n_branches == 1:
        return clm(m, batch.weights)
    return exmate(m, batch.weights, batch.exists, weight=config.weight, exp_of=config.exp_of)


class _Checkpoints(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Marks a checkpoint as complete only when every byte of it is on disk."""

    def __init__(self, curve: list[dict[str, float]], on_step: OnStep | None) -> None:
        self._curve, self._on_step = curve, on_step

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._on_step is not None:
            self._on_step(state.global_step, state.max_steps)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        for path in (p for p in folder.rglob("*") if p.is_file()):
            with path.open("rb") as file:
                os.fsync(file.fileno())
        marker = folder / f"{_MARKER}.tmp"
        with marker.open("w") as file:
            json.dump({"curve": self._curve}, file)
            file.flush()
            os.fsync(file.fileno())
        marker.replace(folder / _MARKER)


def _newest_complete(checkpoints: Path) -> Path | None:
    """Return the newest checkpoint with a marker; half-written ones are removed."""
    found = sorted(checkpoints.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    for path in found:
        if not (path / _MARKER).is_file():
            shutil.rmtree(path)
    complete = [path for path in found if path.exists()]
    return complete[-1] if complete else None


def _settled_dtype(checkpoints: Path, config: TuneConfig) -> str:
    """Return the number type; a resumed run keeps the one that it was begun with."""
    path = checkpoints / "dtype.json"
    if path.is_file():
        return str(json.loads(path.read_text())["dtype"])
    dtype = str(torch_dtype(config.dtype)).removeprefix("torch.")
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"dtype": dtype}))
    temporary.replace(path)
    return dtype


def _arguments(config: TuneConfig, folder: Path, *, dtype: str, seed: int) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, config.steps // 20),
        weight_decay=0.0,
        adam_beta2=0.98,
        max_grad_norm=1.0,
        bf16=dtype == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        logging_strategy="no",
        save_strategy="steps",
        save_steps=config.checkpoint_every,
        save_total_limit=2,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to=[],
        seed=seed,
        data_seed=seed,
    )
