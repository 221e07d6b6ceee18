"""Online training: our sampler and rewards, TRL's GRPO step, and guards that stop a bad run.

TRL drives the loop. Three things are ours. Rollouts come from the shared-prefill engine, as ids, so
that prompts and control tokens go in as everywhere else. The reference is the start model reading
the prompt *without* control tokens, which it never learnt. And every step is checked: a run that is
not finite, has no reward to learn from, or runs away from the start model ends within three steps,
and never as if all were well.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, TrainerCallback
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from equipoise.errors import TrainingError
from equipoise.rlhf.guards import Guards
from equipoise.rlhf.reference import StartReference, log_probs
from equipoise.rlhf.rollouts import OnlineConfig, Rollouts, earned
from equipoise.tune.checkpoints import (
    AGAIN,
    Checkpoints,
    Curve,
    OnStep,
    curve_of,
    for_trainer,
    newest_complete,
    trainer_settings,
)


class OnlineTrainer(GRPOTrainer):  # type: ignore[misc, unused-ignore]
    """TRL's GRPO with our rollouts and reference, a curve, and guards."""

    def __init__(
        self, *, rollouts: Rollouts, reference: StartReference, beta: float, **kwargs: Any
    ) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*rollout_func.*")
            hand_over: Any = earned
            super().__init__(reward_funcs=[hand_over], rollout_func=rollouts, **kwargs)
        # Set afterwards: given a beta, TRL would load a reference by the model's name.
        self.beta = beta
        self.ref_model: Any = reference
        self.rollouts, self.reference = rollouts, reference
        self.curve: Curve = []

    def _get_train_sampler(self, dataset: Any = None) -> SequentialSampler:
        # The rows are in order, each as often as its group is large.
        rows: Any = dataset if dataset is not None else self.train_dataset
        return SequentialSampler(rows)

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, None]:
        # TRL reads the rows of the output head directly, which misses those that LoRA trains, and
        # counts positions from the padding on.
        if model is self.reference:
            return self.reference.log_probs(input_ids, attention_mask, logits_to_keep), None, None
        found = log_probs(
            model, input_ids, attention_mask, logits_to_keep, temperature=self.temperature
        )
        return (*found, None)

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """Write none: the run directory has its own records."""

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Return TRL's loss of one batch; append its facts to the curve."""
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        step = self.state.global_step + 1
        if not torch.isfinite(loss):
            raise TrainingError(
                f"Tuning stopped at step {step}: the loss is not finite",
                why="the policy's log-likelihoods overflowed or are not numbers, most often from a "
                "learning rate that is too high",
                fix=f"lower {self.rollouts.config.section}.learning_rate, then {AGAIN}",
            )
        trained = int(inputs["prompt_mask"].sum() + inputs["completion_mask"].sum())
        read, self.reference.tokens = self.reference.tokens, 0
        facts = dict(self.rollouts.facts)
        seen = self.curve[-1]["tokens"] if self.curve else 0.0
        self.curve.append(
            {
                "step": step,
                "loss": float(loss.detach()),
                "kl": float(self._metrics["train"]["kl"][-1]),
                **facts,
                "tokens": seen + facts["tokens"] + trained + read,
                "tokens_sampled": facts["tokens"],
                "tokens_trained": float(trained),
                "tokens_reference": float(read),
            }
        )
        return loss


def train_online(
    model: Any,
    tokenizer: Any,
    rollouts: Rollouts,
    reference: StartReference,
    config: OnlineConfig,
    *,
    checkpoints: Path,
    seed: int,
    on_step: OnStep | None = None,
    watch: Callable[[int, Curve], None] | None = None,
) -> Curve:
    """Train a policy online, in place; resumes from the newest complete checkpoint.

    Args:
        model: The policy; a peft model with LoRA.
        tokenizer: The policy's.
        rollouts: Samples and rewards.
        reference: The model that the KL is measured to.
        config: Budget and bounds.
        checkpoints: Folder of the checkpoints; created if missing.
        seed: Of everything random that is not derived elsewhere.
        on_step: Called with (steps done, steps in all).
        watch: Called with (steps done, curve) before the first step and after every step; it may
            add to the last row.

    Returns:
        One row per step.

    Raises:
        TrainingError: Not finite, no signal, or too far from the start; the last good checkpoint
            is kept.
    """
    from datasets import Dataset

    checkpoints.mkdir(parents=True, exist_ok=True)
    resume = newest_complete(checkpoints)
    n_rows = config.steps * config.batch_size // config.group
    trainer = OnlineTrainer(
        rollouts=rollouts,
        reference=reference,
        beta=config.beta,
        model=model,
        args=_arguments(config, checkpoints, seed=seed),
        train_dataset=Dataset.from_dict(
            {"prompt": [str(row) for row in range(n_rows) for _ in range(config.group)]}
        ),
        processing_class=for_trainer(tokenizer),
    )
    trainer.remove_callback(PrinterCallback)
    if resume is not None:
        trainer.curve[:] = curve_of(resume)
    trainer.add_callback(Guards(trainer.curve, config))
    if watch is not None:
        trainer.add_callback(_Watch(trainer.curve, watch))
    trainer.add_callback(Checkpoints(trainer.curve, on_step))
    reference.to(trainer.accelerator.device)
    trainer.train(resume_from_checkpoint=str(resume) if resume else None)
    return trainer.curve


class _Watch(TrainerCallback):  # type: ignore[misc, unused-ignore]
    def __init__(self, curve: Curve, watch: Callable[[int, Curve], None]) -> None:
        self._curve, self._watch = curve, watch

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._watch(state.global_step, self._curve)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._watch(state.global_step, self._curve)


def _arguments(config: OnlineConfig, folder: Path, *, seed: int) -> GRPOConfig:
    return GRPOConfig(
        **trainer_settings(folder, config, dtype=config.dtype, seed=seed),
        num_generations=config.group,
        steps_per_generation=1,
        max_completion_length=config.sampling.max_tokens,
        temperature=config.sampling.temperature,
        beta=0.0,
        shuffle_dataset=False,
        weight_decay=0.0,
        max_grad_norm=config.max_grad_norm,
        activation_checkpointing=False,
        logging_strategy="no",
        remove_unused_columns=False,
    )
