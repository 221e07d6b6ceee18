"""Supervised training on ids: TRL's SFTTrainer with our encoder, our checkpoints and a curve."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import PrinterCallback, TrainerCallback
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from equipoise.config import PretrainConfig, SftConfig
from equipoise.data.dialogues import Dialogue
from equipoise.encoding.encode import Encoder
from equipoise.errors import DataError, TrainingError, named
from equipoise.tune.checkpoints import (
    AGAIN,
    Budget,
    Checkpoints,
    Curve,
    OnStep,
    curve_of,
    for_trainer,
    newest_complete,
    trainer_settings,
)

Ids = tuple[list[int], list[int]]
"""Token ids and labels of one row; label -100 is not learnt."""


def encode_rows(
    rows: Sequence[str | Dialogue], encoder: Encoder, *, max_length: int, answers_only: bool
) -> list[Ids]:
    """Encode texts and dialogues; rows that are too long are left out.

    Args:
        rows: Texts and dialogues.
        encoder: The one way from text to ids.
        max_length: Tokens.
        answers_only: Learn the last answer only; else everything.

    Raises:
        DataError: Nothing is left, or a plain text stands where answers are to be learnt.
    """
    encoded: list[Ids] = []
    for row in rows:
        if isinstance(row, str):
            if answers_only:
                raise DataError(
                    "a row of the fine-tuning data is a plain text",
                    why="there is no answer in it to learn",
                    fix="give dialogues here, and plain texts to `base`",
                )
            head, answer = [], encoder.completion_ids(row, finished=True)
        else:
            with named(row[0].place):
                head = encoder.prompt_ids(row[0].messages)
                answer = encoder.completion_ids(row[1], finished=True)
        ids = [*head, *answer]
        encoded.append((ids, [*([-100] * len(head) if answers_only else head), *answer]))
    kept = [row for row in encoded if len(row[0]) <= max_length]
    if not kept:
        raise DataError(
            "no row is short enough to train on",
            why=f"all {len(encoded)} have more than {max_length} tokens",
            fix="raise max_length",
        )
    return kept


def teach(
    model: Any,
    tokenizer: Any,
    rows: Sequence[Ids],
    config: PretrainConfig | SftConfig,
    *,
    seed: int,
    checkpoints: Path,
    dtype: str,
    on_step: OnStep | None = None,
) -> Curve:
    """Train in place on next tokens; resumes from the newest complete checkpoint.

    Returns:
        Per step ``step``, ``loss`` and ``tokens`` so far.

    Raises:
        TrainingError: A loss or a gradient is not finite; the last good checkpoint is kept.
    """
    ids, labels = (list(column) for column in zip(*rows, strict=True))

    def build(arguments: dict[str, Any]) -> Any:
        return SFTTrainer(
            model=model,
            args=SFTConfig(
                **arguments,
                max_length=None,
                dataset_kwargs={"skip_prepare_dataset": True},
                weight_decay=0.05,
            ),
            train_dataset=Dataset.from_dict({"input_ids": ids, "labels": labels}),
            processing_class=for_trainer(tokenizer),
        )

    return drive(build, config, seed=seed, checkpoints=checkpoints, dtype=dtype, on_step=on_step)


def drive(
    build: Callable[[dict[str, Any]], Any],
    config: Budget,
    *,
    seed: int,
    checkpoints: Path,
    dtype: str,
    on_step: OnStep | None,
) -> Curve:
    """Run a TRL trainer with the checkpoints, the curve and the guard that all of ours have.

    Args:
        build: Makes the trainer from the arguments that are common to all.
        config: Budget.
        seed: Of the order of the rows.
        checkpoints: Folder of the checkpoints; created if missing.
        dtype: ``float32`` or ``bfloat16`` (mixed precision).
        on_step: Called with (steps done, steps in all).
    """
    checkpoints.mkdir(parents=True, exist_ok=True)
    resume = newest_complete(checkpoints)
    trainer = build(
        {
            **trainer_settings(checkpoints, config, dtype=dtype, seed=seed % 2**31),
            "max_grad_norm": 1.0,
            "activation_checkpointing": False,
            "logging_strategy": "steps",
            "logging_steps": 1,
            "logging_nan_inf_filter": False,
        }
    )
    # The run directory has its own records, so no card per checkpoint.
    trainer.create_model_card = lambda **_: None
    curve: Curve = curve_of(resume) if resume is not None else []
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Losses(curve))
    trainer.add_callback(Checkpoints(curve, on_step))
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return curve


class _Losses(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Keeps every step's loss, and stops before a checkpoint of a spoilt model is written."""

    def __init__(self, curve: Curve) -> None:
        self._curve = curve

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        loss = (logs or {}).get("loss")
        if loss is None:
            return
        loss = float(loss)
        if loss != loss or loss in (float("inf"), float("-inf")):
            raise TrainingError(
                f"Training stopped at step {state.global_step}: the loss is not finite",
                why="the model's log-likelihoods overflowed, most often from a learning rate that "
                "is too high",
                fix=f"lower the learning rate, then {AGAIN}",
            )
        row = {"step": float(state.global_step), "loss": loss}
        more = {"accuracy": "rewards/accuracies", "tokens": "num_tokens"}
        row |= {name: float(logs[key]) for name, key in more.items() if key in logs}
        self._curve.append(row)
