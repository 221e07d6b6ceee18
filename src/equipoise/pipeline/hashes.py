"""Name to hash of the models that a stage uses: a part of its fingerprint."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from equipoise.config import RewardModelConfig

if TYPE_CHECKING:
    from equipoise.pipeline.job import Job

Hashes = dict[str, str]


def of_policy(job: Job) -> Hashes:
    """The start model's."""
    return {"policy": policy_hash(job.place(job.recipe.model))}


def of_sft(job: Job) -> Hashes:
    """The base model's."""
    config = job.recipe.sft
    return {} if config is None else {"policy": policy_hash(job.place(config.model))}


def of_align(job: Job) -> Hashes:
    """The fine-tuned model's, and those of the rewards by name."""
    config = job.recipe.align
    if config is None:
        return {}
    return {"policy": policy_hash(job.place(config.model)), **reward_hashes(config.rewards, job)}


def of_backbones(job: Job) -> Hashes:
    """Those of the backbones, and of the prompts whose rows are left out."""
    from equipoise.pipeline.readers import prompt_keys

    configs = job.recipe.fit_reward
    found = {name: policy_hash(job.place(one.backbone)) for name, one in configs.items()}
    for name, splits, asked in (
        ("dev and test prompts", ("dev", "test"), [c.leave_out_test for c in configs.values()]),
        ("training prompts", ("train",), [c.leave_out_train for c in configs.values()]),
    ):
        if any(asked):
            keys = prompt_keys(job.run, splits)
            found[name] = hashlib.sha256("\n".join(sorted(keys)).encode()).hexdigest()
    return found


def of_reward_models(job: Job) -> Hashes:
    """Those of the reward models, by attribute."""
    return reward_hashes(job.recipe.reward_models, job)


def of_judges(job: Job) -> Hashes:
    """Those of the judges, by attribute."""
    return reward_hashes(job.recipe.judges, job)


def of_steering(job: Job) -> Hashes:
    """The start model's and those of the reward models."""
    return {**of_policy(job), **_kind("reward", of_reward_models(job))}


def of_tuning(job: Job) -> Hashes:
    """The start model's; by RLHF also those of the reward models and judges."""
    if job.recipe.tune.objective != "rlhf":
        return of_policy(job)
    return {**of_steering(job), **_kind("judge", of_judges(job))}


def of_evaluation(job: Job) -> Hashes:
    """The start model's and those of the reward models and all judges."""
    found = {**of_steering(job), **_kind("judge", of_judges(job))}
    if job.recipe.refusal_judge is not None:
        found |= reward_hashes({"refusal judge": job.recipe.refusal_judge}, job)
    return found


def policy_hash(name: str) -> str:
    """Return the hash of a policy's files; a hub model is brought into the cache first.

    Raises:
        ModelError: There is no such model, or it is an adapter.
    """
    from equipoise.models.adapter import refuse_adapter
    from equipoise.models.hub import model_hash, resolve_model

    place = resolve_model(name)
    refuse_adapter(place)
    return model_hash(place)


def reward_hashes(configs: Mapping[str, RewardModelConfig], job: Job) -> Hashes:
    """Return name to hash of the files of reward models (or judges).

    For fingerprints, which hold how the recipe reads those files beside it.
    """
    from equipoise.rewards.load import files_hash

    root = job.fitted_root
    return {name: files_hash(config, fitted_root=root) for name, config in configs.items()}


def _kind(kind: str, hashes: Hashes) -> Hashes:
    return {f"{kind}/{name}": digest for name, digest in hashes.items()}
