"""Tuning on distilled examples: our batches and objectives in the loop of all trainings."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor

from equipoise.config import TuneConfig
from equipoise.dials.dials import Dials
from equipoise.dials.manifest import DialManifest
from equipoise.dials.tokens import install
from equipoise.encoding.thoughts import refuse_thoughts
from equipoise.models.adapter import refuse_adapter
from equipoise.models.limits import check_room, positions
from equipoise.models.load import Dtype, LoadedPolicy, torch_dtype
from equipoise.store.publish import publish_bytes
from equipoise.training.checkpoints import Curve
from equipoise.training.loop import PlanTrainer, Training, drive
from equipoise.tune.batch import ControlledBatch, TuningPlan, collate
from equipoise.tune.lora import add_lora
from equipoise.tune.objectives import Loss, clm, exmate, mean_of, preferred
from equipoise.tune.prefix import branch_log_likelihoods
from equipoise.tune.shifts import ShiftDirections
from equipoise.tune.steered_start import steered_start
from equipoise.types import ControlledExample

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class TunedPolicy:
    """A tuned policy, not yet saved."""

    model: PreTrainedModel
    """With LoRA: the peft model."""
    tokenizer: PreTrainedTokenizerBase
    manifest: DialManifest
    curve: Curve
    """Per step: loss, m of the asked and the counterfactual setting, pull, share of branches whose
    asked cell is preferred (nan where none was looked at; fresh examples while ``epoch`` <= 1),
    epochs and tokens so far."""
    start_curve: Curve
    """Of :func:`equipoise.tune.steered_start.steered_start`; else empty."""
    dtype: str
    seconds: float
    """Of this process; a resumed run counts its last part only."""


def tune(
    policy: LoadedPolicy,
    examples: Sequence[ControlledExample],
    config: TuneConfig,
    *,
    dials: Dials,
    training: Training,
    base_model: str = "",
    steering: ShiftDirections | None = None,
) -> TunedPolicy:
    """Tune a policy on distilled examples; resumes from the newest complete checkpoint.

    Args:
        policy: The untouched model; it is changed in place.
        examples: The distilled set.
        config: Objective and budget.
        dials: Attributes and levels.
        training: Where, and from which seed; the number type is the config's.
        base_model: Name of the untouched model, for the manifest.
        steering: The directions, for ``config.steered_start``.

    Raises:
        TrainingError: A loss or a gradient is not finite; the last good checkpoint is kept.
    """
    started = time.monotonic()
    model, manifest = with_dials(
        policy,
        dials=dials,
        lora_rank=config.lora_rank,
        base_model=base_model,
        seed=training.seed,
    )
    encoder = policy.encoder.with_dials(manifest)
    plan = TuningPlan(examples, encoder, config, levels=dials.levels, seed=training.seed)
    check_room(plan.longest + len(dials.attributes), 0, positions(model.config))
    training = with_settled_dtype(training, config.dtype)
    first: Curve = []
    if config.steered_start is not None:
        if steering is None:
            raise ValueError("tune.steered_start needs the steering directions")
        first = steered_start(
            model,
            examples,
            encoder,
            steering,
            config.steered_start,
            auto_rate=config.auto_rate,
            training=training.part("start", after=config.steps),
        )
        training = training.part("", before=config.steered_start.steps)
    trainer = DialTrainer(model, plan, config, training)
    curve = drive(trainer, training, trainer.curve)
    return TunedPolicy(
        model=model.eval(),
        tokenizer=policy.tokenizer,
        manifest=manifest,
        curve=curve,
        start_curve=first,
        dtype=training.dtype,
        seconds=time.monotonic() - started,
    )


def with_dials(
    policy: LoadedPolicy,
    *,
    dials: Dials,
    lora_rank: int,
    base_model: str,
    seed: int,
) -> tuple[Any, DialManifest]:
    """Return the policy ready to be tuned: control tokens installed, an adapter if there is a rank.

    The policy is changed in place. With LoRA the model is the peft model.

    Raises:
        ModelError: The policy is a LoRA directory itself, or LoRA cannot tune its head.
        ConfigError: The model thinks before it answers.
    """
    refuse_adapter(policy.model)
    refuse_thoughts(policy.encoder)
    manifest = install(
        policy.model,
        policy.tokenizer,
        dials=dials,
        base_model=base_model,
        base_model_hash=policy.hash,
    )
    if lora_rank:
        wrapped = add_lora(
            policy.model, manifest, rank=lora_rank, seed=seed, revision=policy.revision
        )
        return wrapped, manifest
    return policy.model, manifest


def with_settled_dtype(training: Training, wanted: Dtype) -> Training:
    """Return the training with its number type; a resumed one keeps what it was begun with."""
    path = training.checkpoints / "dtype.json"
    if path.is_file():
        return replace(training, dtype=str(json.loads(path.read_text())["dtype"]))
    dtype = str(torch_dtype(wanted)).removeprefix("torch.")
    path.parent.mkdir(parents=True, exist_ok=True)
    publish_bytes(path, json.dumps({"dtype": dtype}).encode())
    return replace(training, dtype=dtype)


class DialTrainer(PlanTrainer):
    """One of our objectives on :class:`ControlledBatch`."""

    overflow = (
        "the model's log-likelihoods overflowed, most often from a learning rate or a "
        "counterfactual weight that is too high",
        "lower tune.learning_rate or tune.weight",
    )

    def __init__(
        self, model: Any, plan: TuningPlan, config: TuneConfig, training: Training
    ) -> None:
        super().__init__(model, plan, lambda rows: vars(collate(rows)), config, training)
        self.tune_config, self.n_examples = config, plan.n_examples

    def loss_of(self, model: Any, inputs: dict[str, Any]) -> tuple[Tensor, dict[str, float]]:
        """Return the objective of one batch, and what it was made of."""
        loss, right = objective(model, ControlledBatch(**inputs), self.tune_config)
        shown = (self.state.global_step + 1) * self.tune_config.batch_size
        return loss.loss, {
            "loss": loss.loss.item(),
            "asked": loss.asked.item(),
            "counterfactual": loss.counterfactual.item(),
            "pull": loss.pull.item(),
            "preferred": right.item(),
            "epoch": shown / self.n_examples,
            "tokens": int((inputs["branch_ids"] >= 0).sum()),
        }


def objective(model: Any, batch: ControlledBatch, config: TuneConfig) -> tuple[Loss, Tensor]:
    """Return the objective of one batch under ``model``, and how often it prefers the asked cell.

    Args:
        model: The policy.
        batch: Asked and counterfactual branches.
        config: Which objective.
    """
    sums, counts = branch_log_likelihoods(model, batch)
    m, weights, exists = mean_of(sums, counts), batch.weights, batch.exists
    right = preferred(sums.detach(), exists)
    if config.objective == "exmate":
        loss = exmate(m, weights, exists, weight=config.weight, exp_of=config.exp_of)
    else:
        loss = clm(m, weights, exists)
    return loss, right
