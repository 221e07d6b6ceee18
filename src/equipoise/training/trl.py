"""What the trainers of TRL need besides: a tokenizer that they take, a curve of their logs."""

from __future__ import annotations

import copy
from typing import Any

from transformers import TrainerCallback

from equipoise.encoding.encode import Encoder
from equipoise.errors import TrainingError
from equipoise.training.checkpoints import AGAIN, Curve

LOGGED: dict[str, Any] = {
    "activation_checkpointing": False,
    "logging_strategy": "steps",
    "logging_steps": 1,
    "logging_nan_inf_filter": False,
}
"""Arguments of a trainer whose curve is what it logs, see :class:`Losses`."""


class Losses(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Keeps what a trainer logs as its curve, and stops before a spoilt model is saved.

    Args:
        curve: Gets a row per log: ``step``, ``loss``, and of TRL ``accuracy`` and ``tokens``.
    """

    def __init__(self, curve: Curve) -> None:
        self._curve = curve

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Append a row.

        Raises:
            TrainingError: The loss is not finite; the last good checkpoint is kept.
        """
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        if not abs(float(loss)) < float("inf"):
            raise self.spoilt(state.global_step, float(loss))
        row = {"step": float(state.global_step), "loss": float(loss)}
        more = {"accuracy": "rewards/accuracies", "tokens": "num_tokens"}
        row |= {name: float(logs[key]) for name, key in more.items() if key in logs}
        self._curve.append(row)

    def spoilt(self, step: int, loss: float) -> TrainingError:
        """Return what is said of a loss that is not finite."""
        return TrainingError(
            f"Training stopped at step {step}: the loss is not finite",
            why="the model's log-likelihoods overflowed, most often from a learning rate that is "
            "too high",
            fix=f"lower the learning rate, then {AGAIN}",
        )


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
