"""The start paradigm on disk: a base model, fine-tuned, aligned, each a stage of the run."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from equipoise.errors import RunError
from equipoise.pipeline.job import Job, note_skipped, policy_hash, reward_hashes
from equipoise.store.stagedir import Stage

if TYPE_CHECKING:
    from equipoise.config import AlignConfig
    from equipoise.data.sources import Skipped
    from equipoise.models.load import LoadedPolicy
    from equipoise.training.checkpoints import Curve
    from equipoise.training.loop import Training

MODEL = "model"


def base(job: Job) -> None:
    """Train a tokenizer and a base model from raw text; resumes from a checkpoint."""
    recipe, config = job.recipe, job.recipe.base
    if config is None:
        _not_asked_for(job, "base")
        return
    stage = job.begin("base")
    if stage is None:
        return
    from equipoise.alignment.pretrain import new_model, train_tokenizer
    from equipoise.alignment.sft import encode_rows, teach
    from equipoise.data.dialogues import load_rows
    from equipoise.data.sources import Skipped
    from equipoise.encoding.encode import Encoder

    n_rows, skipped = config.steps * config.batch_size, Skipped()
    rows = load_rows(
        config.sources, n_rows=n_rows, data=job.data, seed=recipe.seed, skipped=skipped
    )
    note_skipped(stage, skipped)
    tokenizer = train_tokenizer(rows, config.vocabulary)
    encoded = encode_rows(
        rows, Encoder(tokenizer), max_length=config.max_length, answers_only=False
    )
    model = new_model(tokenizer, config, seed=recipe.seed)
    _train_and_publish(
        job,
        stage,
        (model, tokenizer),
        partial(teach, model, tokenizer, encoded, config),
        rows=len(encoded),
        left_out=len(rows) - len(encoded),
    )


def sft(job: Job) -> None:
    """Fine-tune on dialogues; resumes from a checkpoint."""
    recipe, config = job.recipe, job.recipe.sft
    if config is None:
        _not_asked_for(job, "sft")
        return
    stage = _begin(job, "sft", config.model)
    if stage is None:
        return
    from equipoise.alignment.sft import encode_rows, teach
    from equipoise.data.dialogues import load_rows
    from equipoise.data.sources import Skipped
    from equipoise.encoding.thoughts import refuse_thoughts
    from equipoise.models.load import load_causal
    from equipoise.seeds import derive_seed

    policy, skipped = load_causal(config.model, rendering=job.rendering), Skipped()
    refuse_thoughts(policy.encoder)
    rows = load_rows(
        config.sources,
        n_rows=config.steps * config.batch_size,
        data=job.data,
        seed=derive_seed(recipe.seed, "sft rows"),
        skipped=skipped,
    )
    note_skipped(stage, skipped)
    encoded = encode_rows(rows, policy.encoder, max_length=config.max_length, answers_only=True)

    _train_and_publish(
        job,
        stage,
        (policy.model, policy.tokenizer),
        partial(teach, policy.model, policy.tokenizer, encoded, config),
        rows=len(encoded),
        left_out=len(rows) - len(encoded),
    )


def align(job: Job) -> None:
    """Align by DPO or RLHF; resumes from a checkpoint."""
    config = job.recipe.align
    if config is None:
        _not_asked_for(job, "align")
        return
    stage = _begin(job, "align", config.model, reward_hashes(config.rewards, job))
    if stage is None:
        return
    from equipoise.data.sources import Skipped
    from equipoise.encoding.thoughts import refuse_thoughts
    from equipoise.models.load import load_causal

    policy, before = (
        load_causal(config.model, rendering=job.rendering),
        load_causal(config.model, rendering=job.rendering),
    )
    refuse_thoughts(policy.encoder)
    skipped = Skipped()
    learn = (_by_dpo if config.method == "dpo" else _by_rlhf)(job, config, policy, before, skipped)
    note_skipped(stage, skipped)
    parts = (policy.model, policy.tokenizer)
    _train_and_publish(job, stage, parts, learn, method=config.method)


def _by_dpo(
    job: Job,
    config: AlignConfig,
    policy: LoadedPolicy,
    before: LoadedPolicy,
    skipped: Skipped,
) -> Callable[[Training], Curve]:
    from equipoise.alignment.align import align_by_dpo
    from equipoise.data.pairs import load_pairs
    from equipoise.data.prompts import load_prompts
    from equipoise.overlap import prompt_key
    from equipoise.seeds import derive_seed

    recipe = job.recipe
    loaded = load_prompts(recipe.prompts, data=job.data, seed=recipe.seed)
    unseen = {prompt_key(prompt.messages) for prompt in loaded if prompt.split != "train"}
    seed = derive_seed(recipe.seed, "align")
    found = load_pairs(config.sources, data=job.data, seed=seed, skipped=skipped)
    pairs = [pair for pair in found if prompt_key(pair.prompt.messages) not in unseen]
    return partial(align_by_dpo, policy, before, pairs, config)


def _by_rlhf(
    job: Job,
    config: AlignConfig,
    policy: LoadedPolicy,
    before: LoadedPolicy,
    skipped: Skipped,
) -> Callable[[Training], Curve]:
    from equipoise.alignment.align import align_by_rlhf
    from equipoise.config import PromptsConfig
    from equipoise.data.prompts import load_prompts
    from equipoise.rewards.load import load_reward_model

    # Read like training prompts, so that no test prompt is among them.
    asked = PromptsConfig(train=config.sources, test=job.recipe.prompts.test)
    loaded = load_prompts(asked, data=job.data, seed=job.recipe.seed, skipped=skipped)
    prompts = [prompt for prompt in loaded if prompt.split == "train"]
    rewards = {
        name: load_reward_model(reward, attribute=name, fitted_root=None)
        for name, reward in config.rewards.items()
    }
    return partial(align_by_rlhf, policy, before, prompts, rewards, config)


def _begin(job: Job, name: str, model: str, models: dict[str, str] | None = None) -> Stage | None:
    place = Path(model)
    if place.is_relative_to(job.run.path) and not place.is_dir():
        needed = place.relative_to(job.run.path).parts[0]
        raise RunError(
            f"stage {name} of {job.run.path} starts from made://{needed}, which is not there",
            why="that stage is not complete",
            fix=f"run it first: equipoise {needed} {job.run.path}",
        )
    return job.begin(name, {"policy": policy_hash(model), **(models or {})})


def _train_and_publish(
    job: Job,
    stage: Stage,
    parts: tuple[Any, Any],
    train: Callable[[Training], Curve],
    **facts: Any,
) -> None:
    """Train model and tokenizer by the stage's own seed, and publish both with the curve."""
    from equipoise.seeds import derive_seed
    from equipoise.training.loop import Training

    name = stage.path.name
    with job.progress.steps(name) as on_step, job.run.writing():
        seed = derive_seed(job.recipe.seed, name)
        curve = train(Training(stage.work / "checkpoints", seed, on_step))
    _publish(stage, parts, curve, **facts)


def _publish(stage: Stage, parts: tuple[Any, Any], curve: Curve, **facts: Any) -> None:
    def build(directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        for part in parts:
            part.save_pretrained(directory)

    stage.publish_directory(MODEL, build)
    stage.publish_json("curve.json", curve)
    stage.finish(steps=len(curve), **facts)


def _not_asked_for(job: Job, name: str) -> None:
    job.progress.say(f"{name}: nothing to do (the recipe has no `{name}`)")
