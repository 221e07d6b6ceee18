"""RLHF with control: an optional warm start by CLM, then TRL's GRPO on closeness to the setting.

The KL to the untouched start model is part of the loss. A policy that ignores its dials and
answers at the median already earns :func:`equipoise.rlhf.closeness.deaf_floor`, .76 at five levels:
read every reward against it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from equipoise.config import TuneConfig
from equipoise.dials.dials import Dials
from equipoise.dials.manifest import DialManifest
from equipoise.encoding.encode import Encoder
from equipoise.engine.sample import TransformersEngine
from equipoise.models.limits import check_prompts, positions
from equipoise.models.load import LoadedPolicy
from equipoise.rewards.scorer import Scorer
from equipoise.rlhf.closeness import AskPlan, control_reward, deaf_floor
from equipoise.rlhf.online import StartReference, Watch, train_online
from equipoise.rlhf.rollouts import OnlineConfig, Rollouts
from equipoise.training.checkpoints import Curve
from equipoise.training.loop import Training
from equipoise.tune.trainer import TunedPolicy, tune, with_dials, with_settled_dtype
from equipoise.types import ControlledExample, Prompt

Probe = Callable[[TransformersEngine, Encoder], dict[str, float]]
"""Looks at the policy: samples over the grid and measures; never part of the loss."""


@dataclass(frozen=True)
class Material:
    """What RLHF with control learns from."""

    start: LoadedPolicy
    """The untouched model again: the KL is measured to it."""
    prompts: Sequence[Prompt]
    """Training prompts that settings are asked of."""
    examples: Sequence[ControlledExample]
    """The distilled set, for the warm start."""
    scorer: Scorer
    """Of the training reward models."""


def tune_by_rlhf(
    policy: LoadedPolicy,
    material: Material,
    config: TuneConfig,
    *,
    dials: Dials,
    training: Training,
    base_model: str = "",
    probe: Probe | None = None,
) -> TunedPolicy:
    """Tune a policy by RLHF; resumes from the newest complete checkpoint.

    Args:
        policy: The untouched model; it is changed in place.
        material: Prompts, examples and rewards.
        config: Budget; see :class:`equipoise.config.RlhfConfig`.
        dials: Attributes and levels.
        training: Where, and from which seed; the number type is the config's.
        base_model: Name of the untouched model, for the manifest.
        probe: Looks at the policy every ``probe_every`` steps and at both ends; what it returns
            is kept in the curve until the next look.

    Raises:
        DataError: A prompt leaves no room for an answer in the model's context.
        TrainingError: See :func:`equipoise.rlhf.online.train_online`.
        RewardError: See :func:`control_reward`.
    """
    started = time.monotonic()
    check_prompts(
        material.prompts,
        policy.encoder,
        positions(policy.model.config),
        n_controls=len(dials.attributes),
        max_tokens=config.rlhf.sampling.max_tokens,
        setting="tune.rlhf.sampling.max_tokens",
    )
    model, manifest, warmed = _begun(
        policy, material.examples, config, dials=dials, training=training, base_model=base_model
    )
    training = with_settled_dtype(training, config.dtype)
    online = _online(config)
    encoder = policy.encoder.with_dials(manifest)
    engine = TransformersEngine(
        model, encoder, model_hash="", batch_size=max(online.batch_size, 128)
    )
    rollouts = Rollouts(
        engine=engine,
        encoder=encoder,
        asks=AskPlan(material.prompts, dials=dials, auto_rate=config.auto_rate, seed=training.seed),
        reward=control_reward(material.scorer, dials.levels),
        config=online,
        seed=training.seed,
    )
    curve = train_online(
        model,
        policy.tokenizer,
        rollouts,
        StartReference(material.start.model, manifest.all_ids, online.sampling.temperature),
        training.part("", before=config.rlhf.warm_start),
        watch=_looks(probe, engine, encoder, config.rlhf.probe_every, config.steps),
    )
    return TunedPolicy(
        model=model.train(False),
        tokenizer=policy.tokenizer,
        manifest=manifest,
        curve=_joined(warmed, curve, deaf_floor(dials.levels)),
        start_curve=[],
        dtype=training.dtype,
        seconds=time.monotonic() - started,
    )


def _online(config: TuneConfig) -> OnlineConfig:
    return OnlineConfig(
        steps=config.steps,
        batch_size=config.online_batch_size,
        group=config.rlhf.group,
        learning_rate=config.rlhf.learning_rate,
        beta=config.rlhf.beta,
        kl_limit=config.rlhf.kl_limit,
        sampling=config.rlhf.sampling,
        checkpoint_every=config.rlhf.checkpoint_every,
        section="tune.rlhf",
    )


def _begun(
    policy: LoadedPolicy,
    examples: Sequence[ControlledExample],
    config: TuneConfig,
    *,
    dials: Dials,
    training: Training,
    base_model: str,
) -> tuple[Any, DialManifest, Curve]:
    """Return the policy with its dials installed, after the warm start if there is one."""
    steps = config.rlhf.warm_start
    if not steps:
        model, manifest = with_dials(
            policy,
            dials=dials,
            lora_rank=config.lora_rank,
            base_model=base_model,
            seed=training.seed,
        )
        return model, manifest, []
    tuned = tune(
        policy,
        examples,
        config.model_copy(update={"objective": "clm", "steps": steps}),
        dials=dials,
        training=training.part("warm-start", after=config.steps),
        base_model=base_model,
    )
    return tuned.model, tuned.manifest, tuned.curve


def _looks(
    probe: Probe | None, engine: TransformersEngine, encoder: Encoder, every: int, steps: int
) -> Watch | None:
    """Return a watcher that probes at both ends and every so many steps."""
    if probe is None or not every:
        return None
    latest: dict[str, float] = {}

    def watch(done: int, curve: Curve) -> None:
        if not latest and curve:  # resumed
            latest.update({k: v for k, v in curve[-1].items() if k.startswith("probe_")})
        due = done in (0, steps) or done % every == 0
        if due and latest.get("probe_step") != done:
            was_training = engine.model.training
            engine.model.train(False)
            found = probe(engine, encoder)
            engine.model.train(was_training)
            latest.update({"probe_step": float(done)})
            latest.update({f"probe_{name}": value for name, value in found.items()})
        if curve:
            curve[-1].update(latest)

    return watch


def _joined(warmed: Curve, curve: Curve, floor: float) -> Curve:
    """Return the rows of both parts, with the same fields in all of them."""
    nothing = float("nan")
    spent = warmed[-1]["tokens"] if warmed else 0.0
    offset = len(warmed)
    rows = [{**row, "warm_start": 1.0} for row in warmed]
    for row in curve:
        moved = {"step": row["step"] + offset, "tokens": row["tokens"] + spent}
        rows.append({**row, **moved, "warm_start": 0.0, "floor": floor})
    fields = dict.fromkeys(name for row in rows for name in row)
    return [{name: row.get(name, nothing) for name in fields} for row in rows]
