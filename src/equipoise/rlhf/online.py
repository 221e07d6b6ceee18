"""Online training: our sampler and rewards, TRL's GRPO step, and guards that stop a bad run.

Three things are ours. Rollouts come from the shared-prefill engine, as ids, so
that prompts and control tokens go in as everywhere else. The reference is the start model reading
the prompt *without* control tokens, which it never learnt. And every step is checked: a run that is
not finite, has no reward to learn from, or runs away from the start model ends within three steps,
and never as if all were well.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import TrainerCallback
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from equipoise.errors import TrainingError
from equipoise.rlhf.rollouts import OnlineConfig, Rollouts, earned
from equipoise.training.checkpoints import AGAIN, Curve
from equipoise.training.loop import Training, arguments, drive, refuse_not_finite
from equipoise.training.trl import for_trainer

PATIENCE = 3
"""Steps that a guard waits; no checkpoint is written meanwhile."""
_STILL = 1e-6
"""A spread of rewards under this is none."""
Watch = Callable[[int, Curve], None]
"""Called with (steps done, curve) before the first step and after every step; may add to the last
row of the curve."""


def train_online(
    model: Any,
    tokenizer: Any,
    rollouts: Rollouts,
    reference: StartReference,
    training: Training,
    *,
    watch: Watch | None = None,
) -> Curve:
    """Train a policy online, in place; resumes from the newest complete checkpoint.

    Args:
        model: The policy; a peft model with LoRA.
        tokenizer: The policy's.
        rollouts: Samples and rewards, and their budget.
        reference: The model that the KL is measured to.
        training: Where, and from which seed.
        watch: Looks on; see :data:`Watch`.

    Returns:
        One row per step.

    Raises:
        TrainingError: Not finite, no signal, or too far from the start; the last good checkpoint
            is kept.
    """
    config = rollouts.config
    n_rows = config.steps * config.batch_size // config.group
    trainer = OnlineTrainer(
        rollouts=rollouts,
        reference=reference,
        model=model,
        args=GRPOConfig(
            **arguments(training, config),
            num_generations=config.group,
            steps_per_generation=1,
            max_completion_length=config.sampling.max_tokens,
            temperature=config.sampling.temperature,
            beta=0.0,
            shuffle_dataset=False,
            weight_decay=0.0,
            activation_checkpointing=False,
            logging_strategy="no",
            remove_unused_columns=False,
        ),
        train_dataset=Dataset.from_dict({"prompt": [str(row) for row in range(n_rows)]}),
        processing_class=for_trainer(tokenizer),
    )
    reference.to(trainer.accelerator.device)
    return drive(trainer, training, trainer.curve, [Guards(trainer.curve, config, watch)])


class OnlineTrainer(GRPOTrainer):  # type: ignore[misc, unused-ignore]
    """TRL's GRPO with our rollouts and reference, and a curve."""

    def __init__(self, *, rollouts: Rollouts, reference: StartReference, **kwargs: Any) -> None:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*rollout_func.*")
            super().__init__(reward_funcs=[earned], rollout_func=rollouts, **kwargs)
        # Set afterwards: given a beta, TRL would load a reference by the model's name.
        self.beta = rollouts.config.beta
        self.ref_model: Any = reference
        self.rollouts, self.reference = rollouts, reference
        self.curve: Curve = []

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: Tensor,
        attention_mask: Tensor,
        logits_to_keep: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None, None]:
        # No setting does this: TRL reads the rows of the output head directly, which misses those
        # that LoRA trains, and counts positions from the padding on; and its reference would read
        # the control tokens.
        if model is self.reference:
            return self.reference.log_probs(input_ids, attention_mask, logits_to_keep), None, None
        found = log_probs(
            model, input_ids, attention_mask, logits_to_keep, temperature=self.temperature
        )
        return (*found, None)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Return TRL's loss of one batch; append its facts to the curve."""
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        step = self.state.global_step + 1
        refuse_not_finite(
            loss,
            step,
            "the policy's log-likelihoods overflowed or are not numbers, most often from a "
            "learning rate that is too high",
            f"lower {self.rollouts.config.section}.learning_rate",
        )
        trained = int(inputs["prompt_mask"].sum() + inputs["completion_mask"].sum())
        read, self.reference.tokens = self.reference.tokens, 0
        facts = dict(self.rollouts.facts)
        seen = self.curve[-1]["tokens"] if self.curve else 0.0
        self.curve.append(
            {
                "step": step,
                "loss": float(loss.detach()),
                # What TRL logs, but at the end of the step, when the guards have had their say.
                "kl": float(self._metrics["train"]["kl"][-1]),
                **facts,
                "tokens": seen + facts["tokens"] + trained + read,
                "tokens_sampled": facts["tokens"],
                "tokens_trained": float(trained),
                "tokens_reference": float(read),
            }
        )
        return loss


class StartReference(torch.nn.Module):
    """The start model as TRL's reference: reads each row without its control tokens.

    Args:
        model: The untouched start model.
        control_ids: Ids of all control tokens; empty for a model without dials.
        temperature: As the rollouts'.
    """

    def __init__(self, model: Any, control_ids: Sequence[int], temperature: float) -> None:
        super().__init__()
        self.model = model.requires_grad_(False)
        self.model.train(False)
        self._control_ids = torch.tensor(sorted(control_ids), dtype=torch.long)
        self._temperature = temperature
        self.tokens = 0
        """Tokens read so far."""

    def log_probs(self, ids: Tensor, mask: Tensor, n_kept: int) -> Tensor:
        """Return the log-probabilities (B, R) of the last R = ``n_kept`` columns.

        Prompts are padded on the left, so the controls stand in the same columns of every row.
        """
        kept = ~torch.isin(ids[0], self._control_ids.to(ids.device))
        self.tokens += int(mask[:, kept].sum())
        with torch.no_grad():
            return log_probs(
                self.model, ids[:, kept], mask[:, kept], n_kept, temperature=self._temperature
            )[0]


def log_probs(
    model: Any, ids: Tensor, mask: Tensor, n_kept: int, *, temperature: float
) -> tuple[Tensor, Tensor]:
    """Return log-probabilities and entropies, both (B, R), of the last R = ``n_kept`` columns.

    Args:
        model: A causal LM.
        ids: (B, T), padded on the left of the prompt and on the right of the completion.
        mask: (B, T), 0 on padding.
        n_kept: R.
        temperature: Divides the logits.
    """
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    output = model(
        input_ids=ids, attention_mask=mask, position_ids=positions, logits_to_keep=n_kept + 1
    )
    scores = (output.logits[:, -n_kept - 1 : -1].float() / temperature).log_softmax(-1)
    picked = scores.gather(-1, ids[:, -n_kept:, None])[..., 0]
    return picked, -(scores.exp() * scores).sum(-1)


class Guards(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Ends a run that has nothing to learn from, or that runs away from the start model."""

    def __init__(self, curve: Curve, config: OnlineConfig, watch: Watch | None = None) -> None:
        self._curve, self._config, self._watch = curve, config, watch
        self._still = self._away = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let the watcher look."""
        if self._watch is not None:
            self._watch(state.global_step, self._curve)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the steps without signal and the steps too far away.

        Raises:
            TrainingError: There were too many in a row, or none are left and what would be
                published never had a signal, or is too far away.
        """
        row, config = self._curve[-1], self._config
        self._still = self._still + 1 if row["spread"] < _STILL else 0
        self._away = self._away + 1 if not row["kl"] <= config.kl_limit else 0
        if self._still or self._away:
            # What may be a bad state must not replace the last good checkpoint.
            control.should_save = False
        if self._still >= min(PATIENCE, state.max_steps):
            raise TrainingError(
                f"Tuning stopped at step {state.global_step}: no reward to learn from",
                why="all completions of a prompt under one setting earned the same (steps in a "
                f"row: {self._still}; the last mean is {row['reward']:.3f}), so nothing tells good "
                "from bad",
                fix="check that the reward models tell the pool's completions apart, raise the "
                f"sampling temperature, or (in `tune`) warm-start; then {AGAIN}",
            )
        # At the end there is no patience: the policy of the last step is the one to be published.
        if self._away and (self._away >= PATIENCE or state.global_step >= state.max_steps):
            raise TrainingError(
                f"Tuning stopped at step {state.global_step}: the policy runs away from the start",
                why=f"the KL to the start model was not within {config.kl_limit:g} nats per token "
                f"(steps in a row: {self._away}; the last is {row['kl']:.3g})",
                fix=f"raise {config.section}.beta or lower {config.section}.learning_rate, then "
                f"{AGAIN}",
            )
        if self._watch is not None:
            self._watch(state.global_step, self._curve)
