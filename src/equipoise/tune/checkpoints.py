"""Checkpoints that are whole and sound: every byte is on disk, and no weight came from a NaN."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from equipoise.encoding.encode import Encoder
from equipoise.errors import TrainingError
from equipoise.models.load import Dtype, torch_dtype
from equipoise.store.publish import publish_bytes

_MARKER = "equipoise.json"
AGAIN = (
    "run again with --fresh, which drops this stage with its checkpoints, or with a new --dir, "
    "which keeps them"
)
"""What to do once the recipe is corrected: a checkpoint serves the recipe that it was made with."""
OnStep = Callable[[int, int], None]
Curve = list[dict[str, float]]


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


def trainer_settings(folder: Path, budget: Budget, *, dtype: str, seed: int) -> dict[str, Any]:
    """Return what every trainer of ours is told alike: schedule, checkpoints, silence, seeds."""
    return {
        "output_dir": str(folder),
        "max_steps": budget.steps,
        "per_device_train_batch_size": budget.batch_size,
        "learning_rate": budget.learning_rate,
        "lr_scheduler_type": "cosine",
        "warmup_steps": max(1, budget.steps // 20),
        "adam_beta2": 0.98,
        "bf16": dtype == "bfloat16",
        "use_cpu": not torch.cuda.is_available(),
        "save_strategy": "steps",
        "save_steps": budget.checkpoint_every,
        "save_total_limit": 2,
        "dataloader_pin_memory": False,
        "disable_tqdm": True,
        "report_to": [],
        "seed": seed,
        "data_seed": seed,
    }


def for_trainer(tokenizer: Any) -> Any:
    """Return a tokenizer with an end and a padding token, which every trainer of TRL asks for.

    Where the tokenizer names none, a copy of it gets the end that its chat template writes.

    Raises:
        ModelError: The template writes none either.
    """
    if tokenizer.eos_token_id is not None and tokenizer.pad_token_id is not None:
        return tokenizer
    settled = copy.deepcopy(tokenizer)
    if settled.eos_token_id is None:
        settled.eos_token = settled.convert_ids_to_tokens(Encoder(tokenizer).eos_id)
    if settled.pad_token_id is None:
        settled.pad_token = settled.eos_token
    return settled


class Checkpoints(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Keeps checkpoints that a run can go on from; every trainer of ours has it.

    A checkpoint is marked as complete only when every byte of it is on disk. A gradient that is
    not finite ends the run before it reaches the weights, so that the newest checkpoint is good.

    Args:
        curve: Rows so far; they travel with the checkpoint.
        on_step: Called with (steps done, steps in all).
    """

    def __init__(self, curve: Curve, on_step: OnStep | None) -> None:
        self._curve, self._on_step = curve, on_step

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse gradients that are not finite; a finite loss does not rule them out.

        Raises:
            TrainingError: One is not; the last good checkpoint is kept.
        """
        gradients = [p.grad for p in kwargs["model"].parameters() if p.grad is not None]
        if not all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
            raise TrainingError(
                f"Training stopped at step {state.global_step + 1}: a gradient is not finite",
                why="one step more would have spoilt the weights",
                fix=f"lower the learning rate, then {AGAIN}",
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Report progress."""
        if self._on_step is not None:
            self._on_step(state.global_step, state.max_steps)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Sync what the trainer wrote, then write the marker."""
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


def newest_complete(checkpoints: Path) -> Path | None:
    """Return the newest checkpoint with a marker; half-written ones are removed."""
    found = sorted(checkpoints.glob("checkpoint-*"), key=lambda p: int(p.name.split("-")[1]))
    for path in found:
        if not (path / _MARKER).is_file():
            shutil.rmtree(path)
    complete = [path for path in found if path.exists()]
    return complete[-1] if complete else None


def curve_of(checkpoint: Path) -> Curve:
    """Return the curve up to a checkpoint."""
    curve: Curve = json.loads((checkpoint / _MARKER).read_text())["curve"]
    return curve


def settled_dtype(checkpoints: Path, wanted: Dtype) -> str:
    """Return the number type; a resumed run keeps the one that it was begun with."""
    path = checkpoints / "dtype.json"
    if path.is_file():
        return str(json.loads(path.read_text())["dtype"])
    dtype = str(torch_dtype(wanted)).removeprefix("torch.")
    publish_bytes(path, json.dumps({"dtype": dtype}).encode())
    return dtype
