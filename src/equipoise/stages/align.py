"""An aligned model of the run's own, by DPO or RLHF."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from equipoise.alignment.align import align_by_dpo, align_by_rlhf
from equipoise.config import AlignConfig, PromptsConfig
from equipoise.data.pairs import load_pairs
from equipoise.data.prompts import load_prompts
from equipoise.data.sources import Skipped
from equipoise.encoding.thoughts import refuse_thoughts
from equipoise.models.load import LoadedPolicy, load_causal
from equipoise.overlap import prompt_key
from equipoise.pipeline.job import Job, publish_model
from equipoise.pipeline.readers import note_skipped
from equipoise.rewards.load import load_reward_model
from equipoise.seeds import derive_seed
from equipoise.store.stagedir import Stage
from equipoise.training.checkpoints import Curve
from equipoise.training.loop import Training

Learn = Callable[[Training], Curve]


def align(job: Job, stage: Stage) -> None:
    """Align by DPO or RLHF; resumes from a checkpoint."""
    config = job.recipe.align
    assert config is not None
    place = job.place(config.model)
    policy, before = (load_causal(place, rendering=job.rendering) for _ in range(2))
    refuse_thoughts(policy.encoder)
    skipped = Skipped()
    learn = (_by_dpo if config.method == "dpo" else _by_rlhf)(job, config, policy, before, skipped)
    note_skipped(stage, skipped)
    with job.progress.steps("align") as on_step, job.run.writing():
        seed = derive_seed(job.recipe.seed, "align")
        curve = learn(Training(stage.work / "checkpoints", seed, on_step))
    publish_model(stage, policy.model, policy.tokenizer, curve, method=config.method)


def _by_dpo(
    job: Job, config: AlignConfig, policy: LoadedPolicy, before: LoadedPolicy, skipped: Skipped
) -> Learn:
    recipe = job.recipe
    loaded = load_prompts(recipe.prompts, data=job.data, seed=recipe.seed)
    unseen = {prompt_key(prompt.messages) for prompt in loaded if prompt.split != "train"}
    seed = derive_seed(recipe.seed, "align")
    found = load_pairs(config.sources, data=job.data, seed=seed, skipped=skipped)
    pairs = [pair for pair in found if prompt_key(pair.prompt.messages) not in unseen]
    return partial(align_by_dpo, policy, before, pairs, config)


def _by_rlhf(
    job: Job, config: AlignConfig, policy: LoadedPolicy, before: LoadedPolicy, skipped: Skipped
) -> Learn:
    # Read like training prompts, so that no test prompt is among them.
    asked = PromptsConfig(train=config.sources, test=job.recipe.prompts.test)
    loaded = load_prompts(asked, data=job.data, seed=job.recipe.seed, skipped=skipped)
    prompts = [prompt for prompt in loaded if prompt.split == "train"]
    rewards = {
        name: load_reward_model(reward, attribute=name, fitted_root=None)
        for name, reward in config.rewards.items()
    }
    return partial(align_by_rlhf, policy, before, prompts, rewards, config)
