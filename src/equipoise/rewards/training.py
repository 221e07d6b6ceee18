"""The two ways to train: the whole model, or a linear head on frozen features."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Trainer, TrainingArguments

from equipoise.config import FitRewardConfig
from equipoise.errors import TrainingError
from equipoise.rewards.classifier import answer_mean, head_of, model_inputs
from equipoise.rewards.input import EncodedRow, RewardInput, length_batches
from equipoise.training.checkpoints import Curve, OnStep
from equipoise.training.loop import Training, drive
from equipoise.training.trl import Losses

_LOGS = 50
_WARMUP = 0.1


def fit_whole(
    model: Any,
    tokenizer: Any,
    rows: Sequence[EncodedRow],
    config: FitRewardConfig,
    *,
    seed: int,
    on_step: OnStep | None = None,
) -> tuple[float, ...]:
    """Train all weights in place.

    Returns:
        Training losses, about fifty over the run.

    Raises:
        TrainingError: The loss is not finite.
    """
    from datasets import Dataset
    from trl.trainer.reward_config import RewardConfig
    from trl.trainer.reward_trainer import RewardTrainer

    paired = config.kind == "pairs"
    steps = max(1, round(config.epochs * len(rows) / config.batch_size))

    def collate(items: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Row numbers to a batch; of pairs first all chosen, then all rejected, as TRL reads it."""
        chosen = [rows[item["row"]] for item in items]
        sides = [row.sides[side] for side in range(2 if paired else 1) for row in chosen]
        batch = model_inputs(model, sides)
        labels = torch.tensor([[row.score] for row in chosen])  # (B, 1)
        return batch if paired else {**batch, "labels": labels}

    # The trainers see row numbers and lengths; the ids stay with `collate`, as our encoder
    # made them. RewardTrainer takes rows with `chosen_ids` and `rejected_ids` for tokenised.
    columns: dict[str, list[Any]] = {
        "row": list(range(len(rows))),
        "length": [max(len(side.ids) for side in row.sides) for row in rows],
    }
    if paired:
        columns |= {"chosen_ids": [[0]] * len(rows), "rejected_ids": [[0]] * len(rows)}
    with tempfile.TemporaryDirectory() as work:
        common: dict[str, Any] = {
            "output_dir": work,
            "per_device_train_batch_size": config.batch_size,
            "max_steps": steps,
            "learning_rate": config.learning_rate,
            "warmup_steps": int(_WARMUP * steps),
            "lr_scheduler_type": "linear",
            "train_sampling_strategy": "group_by_length",
            "length_column_name": "length",
            "remove_unused_columns": False,
            "dataloader_pin_memory": False,
            "save_strategy": "no",
            "report_to": [],
            "logging_steps": max(1, steps // _LOGS),
            "logging_nan_inf_filter": False,
            "disable_tqdm": True,
            "seed": seed % 2**31,
            "bf16": False,
        }
        given: dict[str, Any] = {
            "model": model,
            "train_dataset": Dataset.from_dict(columns),
            "processing_class": tokenizer,
            "data_collator": collate,
        }
        if paired:
            arguments = RewardConfig(max_length=None, activation_checkpointing=False, **common)
            trainer: Any = RewardTrainer(args=arguments, **given)
        else:
            # With one label this problem type is binary cross-entropy on a score in [0, 1].
            model.config.problem_type = "multi_label_classification"
            trainer = Trainer(args=TrainingArguments(**common), **given)
        curve: Curve = []
        drive(trainer, Training(Path(work), seed, on_step), curve, [_Losses(curve)])
    return tuple(row["loss"] for row in curve)


def fit_head(
    model: Any,
    rows: Sequence[EncodedRow],
    config: FitRewardConfig,
    *,
    on_step: OnStep | None = None,
) -> None:
    """Fit the linear head on frozen features (mean over the completion), in place.

    The upper third of the layers is cut off: it serves the backbone's old task, and features from
    below it know more of ours (all-MiniLM-L6-v2, AUC of safety .777 against .742 at the top,
    accuracy of helpfulness .62 against .58) and cost a third less.

    Logistic regression on standardised features, its strength chosen by 4-fold cross-validation;
    pairs enter as differences without an intercept.
    """
    from sklearn.linear_model import LogisticRegressionCV

    head = head_of(model)
    keep_lower_layers(model)
    features = _features(model, [side for row in rows for side in row.sides], config, on_step)
    if config.kind == "pairs":
        inputs = features[0::2] - features[1::2]  # (R, D)
        flips = np.where(np.arange(len(rows)) % 2 == 0, 1.0, -1.0)
        spread = inputs.std(0) + 1e-6
        inputs, labels, centre = inputs * flips[:, None] / spread, flips > 0, 0.0
        weights = None
    else:
        centre, spread = features.mean(0), features.std(0) + 1e-6
        inputs = (features - centre) / spread  # (R, D)
        scores = np.array([row.score for row in rows])
        # A score between 0 and 1 counts as a share of both labels.
        inputs = np.concatenate([inputs, inputs])
        labels = np.repeat([True, False], len(rows))
        weights = np.concatenate([scores, 1.0 - scores])
        inputs, labels, weights = (part[weights > 0] for part in (inputs, labels, weights))
    chosen = LogisticRegressionCV(
        Cs=np.logspace(-4, -1, 4),
        cv=4,
        fit_intercept=config.kind == "labels",
        max_iter=300,
        l1_ratios=(0.0,),
        use_legacy_attributes=False,
        scoring="neg_log_loss",
    ).fit(inputs, labels, sample_weight=weights)
    weight = chosen.coef_[0] / spread
    with torch.no_grad():
        head.weight.copy_(torch.tensor(weight[None], dtype=head.weight.dtype))
        if head.bias is not None:
            intercept = float(np.ravel(chosen.intercept_)[0]) if config.kind == "labels" else 0.0
            head.bias.fill_(intercept - float(np.sum(weight * centre)))


def keep_lower_layers(model: Any) -> None:
    """Cut the upper third of a transformer's layers off, in place, config included."""
    config = model.config.get_text_config()
    n_layers = int(config.num_hidden_layers)
    kept = -(-2 * n_layers // 3)
    for parent in model.base_model.modules():
        for name, child in parent.named_children():
            if isinstance(child, torch.nn.ModuleList) and len(child) == n_layers:
                setattr(parent, name, child[:kept])
                config.num_hidden_layers = kept
                if getattr(config, "layer_types", None):
                    config.layer_types = config.layer_types[:kept]
                return


def _features(
    model: Any, inputs: Sequence[RewardInput], config: FitRewardConfig, on_step: OnStep | None
) -> Any:
    model.eval()
    found = np.zeros((len(inputs), model.config.get_text_config().hidden_size))  # (R, D)
    done = 0
    for batch in length_batches([len(row.ids) for row in inputs], config.batch_size):
        rows = [inputs[i] for i in batch]
        with torch.inference_mode():
            read = answer_mean(model, model_inputs(model, rows), rows)
        found[batch] = read.float().cpu().numpy()
        done += len(batch)
        if on_step is not None:
            on_step(done, len(inputs))
    return found


class _Losses(Losses):
    def spoilt(self, step: int, loss: float) -> TrainingError:
        return TrainingError(
            f"The reward model diverged at step {step}",
            why=f"Its loss is {loss}.",
            fix="Lower learning_rate.",
        )
