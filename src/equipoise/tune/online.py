"""Online training: our sampler and rewards, TRL's GRPO step, and guards that stop a bad run.

TRL drives the loop. Three things are ours. Rollouts come from the shared-prefill engine, as ids, so
that prompts and control tokens go in as everywhere else. The reference is the start model reading
the prompt *without* control tokens, which it never learnt. And every step is checked: a run that is
not finite, has no reward to learn from, or runs away from the start model ends within three steps.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import SequentialSampler
from transformers import PrinterCallback, TrainerCallback
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from equipoise.denoise import is_degenerate, shorten
from equipoise.dials.encode import Encoder
from equipoise.errors import TrainingError
from equipoise.models.sampling import TransformersEngine
from equipoise.seeds import derive_seed
from equipoise.tune.checkpoints import Checkpoints, Curve, OnStep, curve_of, newest_complete
from equipoise.types import Branch, DialSetting, GenerationRequest, Prompt, Sampling

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PATIENCE = 3
"""Steps that a guard waits; no checkpoint is written meanwhile."""
_STILL = 1e-6
"""A spread of rewards under this is none."""


@dataclass(frozen=True)
class Ask:
    """One group: a prompt, and the setting it is asked under (``None``: a model without dials)."""

    prompt: Prompt
    setting: DialSetting | None = None


Reward = Callable[[Sequence[tuple[Ask, str]]], list[float]]
"""Maps (ask, completion text) to finite rewards, in order."""


@dataclass(frozen=True)
class OnlineConfig:
    """Budget and bounds of an online run; the fields of the recipe explain them."""

    steps: int
    batch_size: int
    group: int
    learning_rate: float
    beta: float
    kl_limit: float
    sampling: Sampling
    checkpoint_every: int
    dtype: str
    max_grad_norm: float = 1.0


@dataclass
class Rollouts:
    """Samples and rewards the groups of one step; TRL's ``rollout_func``.

    Row i of the data set is ``asks(i)``, and its samples are seeded by (seed, i): so a resumed run
    repeats what a run without a stop would have done.
    """

    engine: TransformersEngine
    encoder: Encoder
    asks: Callable[[int], Ask]
    reward: Reward
    config: OnlineConfig
    seed: int
    facts: dict[str, float] = field(default_factory=dict)
    """Of the last step: mean reward, spread within groups, length, degenerate, tokens."""

    def __call__(self, prompts: Sequence[str], trainer: Any) -> dict[str, list[Any]]:
        """Return ``prompt_ids``, ``completion_ids`` and ``earned``, one per requested row."""
        rows = [int(text) for text in prompts[:: self.config.group]]
        asks = [self.asks(row) for row in rows]
        heads = [tuple(self.encoder.prompt_ids(ask.prompt.messages)) for ask in asks]
        controls = [
            () if ask.setting is None else self.encoder.control_ids(ask.setting) for ask in asks
        ]
        requests = [
            GenerationRequest(
                head,
                tuple(
                    Branch(ids, derive_seed(self.seed, "rollout", row, k))
                    for k in range(self.config.group)
                ),
            )
            for row, head, ids in zip(rows, heads, controls, strict=True)
        ]
        before = self.engine.prompt_positions + self.engine.branch_positions
        self.engine.model.train(False)
        sampled = self.engine.generate(requests, self.config.sampling)
        self.engine.model.train()
        tokens = self.engine.prompt_positions + self.engine.branch_positions - before
        pairs = []
        for ask, group in zip(asks, sampled, strict=True):
            for item in group:
                completion = item.as_completion(ask.prompt.id, 0, model_hash="")
                pairs.append((ask, shorten(completion) or completion.text))
        earned = self.reward(pairs)
        spread = torch.tensor(earned).view(len(asks), -1).std(dim=1)
        flat = [item for group in sampled for item in group]
        self.facts = {
            "reward": sum(earned) / len(earned),
            "spread": float(spread.max()),
            "length": sum(item.n_tokens for item in flat) / len(flat),
            "degenerate": sum(is_degenerate(text) for _, text in pairs) / len(pairs),
            "tokens": float(tokens),
        }
        end = [self.encoder.eos_id]
        return {
            "prompt_ids": [
                [*head, *ids]
                for head, ids, group in zip(heads, controls, sampled, strict=True)
                for _ in group
            ],
            # The end token is a choice of the policy like the others.
            "completion_ids": [
                [*item.token_ids, *(end if item.finish == "stop" else [])] for item in flat
            ],
            "logprobs": None,  # type: ignore[dict-item]  # the trainer computes its own
            "earned": earned,
        }


def earned(earned: list[float], **_: Any) -> list[float]:
    """Hand the rewards that :class:`Rollouts` has computed to TRL."""
    return earned


class StartReference(torch.nn.Module):
    """The start model as TRL's reference: reads each row without its control tokens.

    Args:
        model: The untouched start model.
        control_ids: Ids of all control tokens; empty for a model without dials.
        temperature: As the rollouts'.
    """

    def __init__(
        self, model: PreTrainedModel, control_ids: Sequence[int], temperature: float
    ) -> None:
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
                fix="lower the learning rate and run again with --fresh; the last good checkpoint "
                "is kept",
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


class Guards(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Ends a run that has nothing to learn from, or that runs away from the start model."""

    def __init__(self, curve: Curve, kl_limit: float) -> None:
        self._curve, self._kl_limit = curve, kl_limit
        self._still = self._away = 0

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse gradients that are not finite before they reach the weights."""
        parameters = kwargs["model"].parameters()
        gradients = [p.grad for p in parameters if p.grad is not None]
        if not all(bool(torch.isfinite(gradient).all()) for gradient in gradients):
            raise TrainingError(
                f"Tuning stopped at step {state.global_step + 1}: a gradient is not finite",
                why="one step more would have spoilt the weights",
                fix="lower the learning rate and run again with --fresh; the last good checkpoint "
                "is kept",
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Count the steps without signal and the steps too far away."""
        row = self._curve[-1]
        self._still = self._still + 1 if row["spread"] < _STILL else 0
        self._away = self._away + 1 if not row["kl"] <= self._kl_limit else 0
        if self._still or self._away:
            # What may be a bad state must not replace the last good checkpoint.
            control.should_save = False
        if self._still >= PATIENCE:
            raise TrainingError(
                f"Tuning stopped at step {state.global_step}: no reward to learn from",
                why=f"in {PATIENCE} steps all completions of a prompt under one setting earned the "
                f"same (the last mean is {row['reward']:.3f}), so nothing tells good from bad",
                fix="check that the reward models tell the pool's completions apart, raise the "
                "sampling temperature, or warm-start; the last good checkpoint is kept",
            )
        if self._away >= PATIENCE:
            raise TrainingError(
                f"Tuning stopped at step {state.global_step}: the policy runs away from the start",
                why=f"the KL to the start model was above {self._kl_limit:g} nats per token for "
                f"{PATIENCE} steps (the last is {row['kl']:.3g})",
                fix="raise rlhf.beta or lower rlhf.learning_rate and run again with --fresh; the "
                "last good checkpoint is kept",
            )


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
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    if resume is not None:
        trainer.curve[:] = curve_of(resume)
    trainer.add_callback(Guards(trainer.curve, config.kl_limit))
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
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    return GRPOConfig(
        output_dir=str(folder),
        max_steps=config.steps,
        per_device_train_batch_size=config.batch_size,
        num_generations=config.group,
        steps_per_generation=1,
        max_completion_length=config.sampling.max_tokens,
        temperature=config.sampling.temperature,
        beta=0.0,
        shuffle_dataset=False,
        learning_rate=config.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=max(1, config.steps // 20),
        weight_decay=0.0,
        adam_beta2=0.98,
        max_grad_norm=config.max_grad_norm,
        activation_checkpointing=False,
        bf16=config.dtype == "bfloat16",
        use_cpu=not torch.cuda.is_available(),
        logging_strategy="no",
        save_strategy="steps",
        save_steps=config.checkpoint_every,
        save_total_limit=2,
        remove_unused_columns=False,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        report_to=[],
        seed=seed,
        data_seed=seed,
    )
