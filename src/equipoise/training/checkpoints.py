"""Checkpoints that are whole and sound: every byte is on disk, and no weight came from a NaN."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from equipoise.errors import TrainingError

_MARKER = "equipoise.json"
AGAIN = (
    "run again with --fresh, which drops this stage with its checkpoints, or with a new --dir, "
    "which keeps them"
)
"""What to do once the recipe is corrected: a checkpoint serves the recipe that it was made with."""
OnStep = Callable[[int, int], None]
Curve = list[dict[str, float]]


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
        if args.save_strategy == "no":
            return  # there is none to keep: what is logged at the end of the step is judged
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
