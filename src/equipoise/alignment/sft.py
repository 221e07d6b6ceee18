"""Supervised training on ids: TRL's SFTTrainer with our encoder, our checkpoints and a curve."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from datasets import Dataset
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from equipoise.config import PretrainConfig, SftConfig
from equipoise.data.dialogues import Dialogue
from equipoise.encoding.encode import Encoder
from equipoise.errors import DataError, named
from equipoise.training.checkpoints import Curve
from equipoise.training.loop import Training, arguments, drive
from equipoise.training.trl import LOGGED, Losses, for_trainer

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
    training: Training,
) -> Curve:
    """Train in place on next tokens; resumes from the newest complete checkpoint.

    Returns:
        Per step ``step``, ``loss`` and ``tokens`` so far.

    Raises:
        TrainingError: A loss or a gradient is not finite; the last good checkpoint is kept.
    """
    ids, labels = (list(column) for column in zip(*rows, strict=True))
    trainer = SFTTrainer(
        model=model,
        args=SFTConfig(
            **arguments(training, config),
            **LOGGED,
            max_length=None,
            dataset_kwargs={"skip_prepare_dataset": True},
            weight_decay=0.05,
        ),
        train_dataset=Dataset.from_dict({"input_ids": ids, "labels": labels}),
        processing_class=for_trainer(tokenizer),
    )
    curve: Curve = []
    return drive(trainer, training, curve, [Losses(curve)])
