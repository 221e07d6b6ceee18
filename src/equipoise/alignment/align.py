"""Alignment: DPO on preference pairs, or RLHF on a weighted sum of rewards; both by TRL."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from datasets import Dataset
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer

from equipoise.config import AlignConfig, Sampling
from equipoise.engine.sample import TransformersEngine
from equipoise.errors import DataError, named
from equipoise.models.limits import check_prompts, positions
from equipoise.models.load import LoadedPolicy
from equipoise.rlhf.online import StartReference, train_online
from equipoise.rlhf.rollouts import Ask, OnlineConfig, Rollouts
from equipoise.seeds import derive_seed
from equipoise.training.checkpoints import Curve
from equipoise.training.loop import Training, arguments, drive
from equipoise.training.trl import LOGGED, Losses, for_trainer
from equipoise.types import Branch, GenerationRequest, PreferencePair, Prompt, RewardModel

SCALE_PROMPTS = 128
"""Prompts whose answers give each reward its unit."""


class PairTrainer(DPOTrainer):  # type: ignore[misc, unused-ignore]
    """TRL's DPO on ids that our encoder made."""

    def _prepare_dataset(self, dataset: Any, *args: Any, **kwargs: Any) -> Any:
        # It would write the pairs down as text, and read them back with the markers in it; unlike
        # SFTTrainer and RewardTrainer it has no setting for rows that are ids already.
        return dataset


def align_by_dpo(
    policy: LoadedPolicy,
    before: LoadedPolicy,
    pairs: Sequence[PreferencePair],
    config: AlignConfig,
    training: Training,
) -> Curve:
    """Align in place by Direct Preference Optimization; resumes from the newest checkpoint.

    Args:
        policy: The model to align.
        before: The same model, the reference.
        pairs: Preference pairs.
        config: Budget and ``beta``.
        training: Where, and from which seed.

    Returns:
        Per step the loss and the accuracy of the implicit reward.

    Raises:
        DataError: No pair is short enough.
        TrainingError: A loss or a gradient is not finite; the last good checkpoint is kept.
    """
    encoder = policy.encoder
    columns: dict[str, list[list[int]]] = {"prompt_ids": [], "chosen_ids": [], "rejected_ids": []}
    for pair in pairs:
        with named(pair.prompt.place):
            head = encoder.prompt_ids(pair.prompt.messages)
            sides = [encoder.completion_ids(t, finished=True) for t in (pair.chosen, pair.rejected)]
        if len(head) + max(map(len, sides)) <= config.max_length:
            for column, ids in zip(columns.values(), (head, *sides), strict=True):
                column.append(ids)
    if not columns["prompt_ids"]:
        raise DataError(
            "no preference pair is short enough to align on",
            why=f"all {len(pairs)} have more than {config.max_length} tokens",
            fix="raise align.max_length",
        )

    trainer = PairTrainer(
        model=policy.model,
        ref_model=before.model.requires_grad_(False),
        args=DPOConfig(
            **arguments(training, config),
            **LOGGED,
            beta=config.beta,
            max_length=None,
            weight_decay=0.0,
        ),
        train_dataset=Dataset.from_dict(columns),
        processing_class=for_trainer(policy.tokenizer),
    )
    curve: Curve = []
    return drive(trainer, training, curve, [Losses(curve)])


def align_by_rlhf(
    policy: LoadedPolicy,
    before: LoadedPolicy,
    prompts: Sequence[Prompt],
    rewards: Mapping[str, RewardModel],
    config: AlignConfig,
    training: Training,
) -> Curve:
    """Align in place by RLHF on a weighted sum of rewards; resumes from the newest checkpoint.

    Each reward is measured in standard deviations of its scores over the model's own completions,
    so that weights mean the same for any reward model.

    Args:
        policy: The model to align.
        before: The same model; the KL is measured to it.
        prompts: What is asked.
        rewards: Reward models by name.
        config: Budget, ``beta`` and ``weights``.
        training: Where, and from which seed.

    Returns:
        One row per step, see :func:`equipoise.rlhf.online.train_online`.

    Raises:
        DataError: A prompt leaves no room for an answer in the model's context.
        TrainingError: Not finite, no signal, or too far from the model before.
    """
    check_prompts(
        prompts,
        policy.encoder,
        positions(policy.model.config),
        n_controls=0,
        max_tokens=config.rlhf.sampling.max_tokens,
        setting="align.rlhf.sampling.max_tokens",
    )
    seed = training.seed
    order = sorted(prompts, key=lambda prompt: derive_seed(seed, "align", prompt.id))
    online = OnlineConfig(
        steps=config.steps,
        batch_size=config.batch_size,
        group=config.rlhf.group,
        learning_rate=config.learning_rate,
        beta=config.beta,
        kl_limit=config.rlhf.kl_limit,
        sampling=config.rlhf.sampling,
        checkpoint_every=config.checkpoint_every,
        section="align",
    )
    reward = weighted_reward(
        rewards, config.weights, _own_answers(before, order, online.sampling, seed=seed)
    )
    rollouts = Rollouts(
        engine=TransformersEngine(policy.model, policy.encoder, model_hash=""),
        encoder=policy.encoder,
        asks=lambda index: Ask(order[index % len(order)]),
        reward=reward,
        config=online,
        seed=derive_seed(seed, "align rollouts"),
    )
    return train_online(
        policy.model,
        policy.tokenizer,
        rollouts,
        StartReference(before.model, (), online.sampling.temperature),
        training,
    )


def weighted_reward(
    rewards: Mapping[str, RewardModel],
    weights: Mapping[str, float],
    own: Sequence[tuple[Prompt, str]],
) -> Callable[[Sequence[tuple[Ask, str]]], list[float]]:
    """Return the reward ``sum_r w_r (score_r - mean_r) / std_r``.

    Args:
        rewards: Reward models by name.
        weights: Weight per name; 1 where none is given.
        own: Completions of the model before, whose scores give mean and std.

    Raises:
        DataError: A reward is the same for all of them.
    """
    scales: dict[str, tuple[float, float]] = {}
    for name, model in rewards.items():
        scores = model.score(list(own))
        spread = statistics.pstdev(scores)
        if not spread > 1e-6:
            raise DataError(
                f"the reward {name} is the same for all of the model's own completions",
                why="nothing can be learnt from it",
                fix="check the reward model, or leave it out of align.rewards",
            )
        scales[name] = (statistics.fmean(scores), spread)

    def reward(pairs: Sequence[tuple[Ask, str]]) -> list[float]:
        texts = [(ask.prompt, text) for ask, text in pairs]
        total = [0.0] * len(pairs)
        for name, model in rewards.items():
            mean, spread = scales[name]
            for row, score in enumerate(model.score(texts)):
                total[row] += weights.get(name, 1.0) * (score - mean) / spread
        return total

    return reward


def _own_answers(
    before: LoadedPolicy, prompts: Sequence[Prompt], sampling: Sampling, *, seed: int
) -> list[tuple[Prompt, str]]:
    asked = prompts[:SCALE_PROMPTS]
    requests = [
        GenerationRequest(
            tuple(before.encoder.prompt_ids(prompt.messages)),
            tuple(Branch((), derive_seed(seed, "scale", prompt.id, k)) for k in range(2)),
        )
        for prompt in asked
    ]
    engine = TransformersEngine.of(before)
    sampled = engine.generate(requests, sampling)
    return [
        (prompt, item.judged) for prompt, row in zip(asked, sampled, strict=True) for item in row
    ]
