"""The thin driver: our batches and our objective in a trainer that resumes exactly."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from equipoise.config import TuneConfig
from equipoise.dials.dials import Dials
from equipoise.dials.manifest import DialManifest
from equipoise.dials.tokens import install
from equipoise.encoding.thoughts import refuse_thoughts
from equipoise.models.adapter import refuse_adapter
from equipoise.models.limits import check_room, positions
from equipoise.models.load import LoadedPolicy
from equipoise.tune.batch import ControlledBatch, TuningPlan, collate
from equipoise.tune.checkpoints import Curve, OnStep, settled_dtype
from equipoise.tune.lora import add_lora
from equipoise.tune.objectives import Loss, clm, exmate, mean_of, preferred
from equipoise.tune.ordered import OrderedTrainer
from equipoise.tune.prefix import branch_log_likelihoods
from equipoise.tune.steered_start import ShiftDirections, steered_start
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
    """Per step: loss, m of the asked and the counterfactual setting, pull, share of branches whose
    asked cell is preferred (nan where none was looked at; fresh examples while ``epoch`` <= 1),
    epochs and tokens so far."""
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
    dials: Dials,
    seed: int,
    checkpoints: Path,
    base_model: str = "",
    steering: ShiftDirections | None = None,
    on_step: OnStep | None = None,
) -> Tuned:
    """Tune a policy on distilled examples; resumes from the newest complete checkpoint.

    Args:
        policy: The untouched model; it is changed in place.
        examples: The distilled set.
        config: Objective and budget.
        dials: Attributes and levels.
        seed: Everything random derives from it.
        checkpoints: Folder of the checkpoints; created if missing.
        base_model: Name of the untouched model, for the manifest.
        steering: The directions, for ``config.steered_start``.
        on_step: Called with (steps done, steps in all), those of a steered start included.

    Raises:
        TrainingError: A loss or a gradient is not finite; the last good checkpoint is kept.
    """
    model, manifest = with_dials(
        policy,
        dials=dials,
        lora_rank=config.lora_rank,
        base_model=base_model,
        seed=seed,
    )
    encoder = policy.encoder.with_dials(manifest)
    plan = TuningPlan(examples, encoder, config, levels=dials.levels, seed=seed)
    check_room(plan.longest + len(dials.attributes), 0, positions(model.config))
    checkpoints.mkdir(parents=True, exist_ok=True)
    dtype = settled_dtype(checkpoints, config.dtype)
    started = time.monotonic()
    first: Curve = []
    if config.steered_start is not None:
        if steering is None:
            raise ValueError("a steered start needs the steering directions")
        first = steered_start(
            model,
            examples,
            encoder,
            steering,
            config.steered_start,
            levels=dials.levels,
            auto_rate=config.auto_rate,
            seed=seed,
            checkpoints=checkpoints / "start",
            dtype=dtype,
            on_step=shown(on_step, 0, config.steps),
        )
        on_step = shown(on_step, config.steered_start.steps, 0)
    trainer = DialTrainer(
        n_examples=len(examples),
        config=config,
        checkpoints=checkpoints,
        dtype=dtype,
        seed=seed,
        on_step=on_step,
        model=model,
        train_dataset=plan,
        data_collator=lambda rows: vars(collate(rows)),
    )
    curve = trainer.run()
    return Tuned(
        model=model.eval(),
        tokenizer=policy.tokenizer,
        manifest=manifest,
        curve=curve,
        start_curve=first,
        dtype=dtype,
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


def shown(on_step: OnStep | None, before: int, after: int) -> OnStep | None:
    """Return a progress callback of one part, which reports the steps of all."""
    if on_step is None:
        return None
    return lambda done, total: on_step(before + done, before + total + after)


class DialTrainer(OrderedTrainer):
    """One of our objectives on :class:`ControlledBatch`."""

    def __init__(self, *, n_examples: int, config: TuneConfig, **kwargs: Any) -> None:
        super().__init__(config=config, **kwargs)
        self.tune_config, self.n_examples = config, n_examples

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
        loss, right = objective(model, batch, config)
        self.stop_unless_finite(
            loss.loss,
            why="the model's log-likelihoods overflowed, most often from a learning rate or a "
            "counterfactual weight that is too high",
            fix="lower tune.learning_rate or tune.weight",
        )
        self.curve.append(
            {
                "step": step,
                "loss": loss.loss.item(),
                "asked": loss.asked.item(),
                "counterfactual": loss.counterfactual.item(),
                "pull": loss.pull.item(),
                "preferred": right.item(),
                "epoch": step * config.batch_size / self.n_examples,
                "tokens": last.get("tokens", 0) + int((inputs["branch_ids"] >= 0).sum()),
            }
        )
        return (loss.loss, None) if return_outputs else loss.loss


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
