"""RLHF with control: an optional warm start by CLM, then TRL's GRPO on closeness to the setting.

The KL to the untouched start model is part of the loss. A policy that is deaf to its dials and
answers at the median already earns :func:`equipoise.rlhf.closeness.deaf_floor`, .76 at five levels:
read every reward against it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from pathlib import Path
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
from equipoise.rlhf.online import train_online
from equipoise.rlhf.reference import StartReference
from equipoise.rlhf.rollouts import OnlineConfig, Rollouts
from equipoise.tune.checkpoints import Curve, OnStep, settled_dtype
from equipoise.tune.trainer import Tuned, with_dials
from equipoise.tune.trainer import tune as tune_offline
from equipoise.types import ControlledExample, Prompt

Probe = Callable[[TransformersEngine, Encoder], dict[str, float]]
"""Looks at the policy: samples over the grid and measures; never part of the loss."""


def tune_by_rlhf(
    policy: LoadedPolicy,
    start: LoadedPolicy,
    prompts: Sequence[Prompt],
    examples: Sequence[ControlledExample],
    scorer: Scorer,
    config: TuneConfig,
    *,
    levels: int,
    seed: int,
    checkpoints: Path,
    base_model: str = "",
    on_step: OnStep | None = None,
    probe: Probe | None = None,
) -> Tuned:
    """Tune a policy by RLHF; resumes from the newest complete checkpoint.

    Args:
        policy: The untouched model; it is changed in place.
        start: The untouched model again: the KL is measured to it.
        prompts: Training prompts that settings are asked of.
        examples: The distilled set, for the warm start.
        scorer: Of the training reward models.
        config: Budget; see :class:`equipoise.config.RlhfConfig`.
        levels: L.
        seed: Everything random derives from it.
        checkpoints: Folder of the checkpoints; created if missing.
        base_model: Name of the untouched model, for the manifest.
        on_step: Called with (steps done, steps in all), the warm start's steps included.
        probe: Looks at the policy every ``probe_every`` steps and at both ends; what it returns
            is kept in the curve until the next look.

    Raises:
        DataError: A prompt leaves no room for an answer in the model's context.
        TrainingError: See :func:`equipoise.rlhf.online.train_online`.
        RewardError: See :func:`control_reward`.
    """
    rlhf, started = config.rlhf, time.monotonic()
    dials = Dials(tuple(scorer.reward_models), levels)
    check_prompts(
        prompts,
        policy.encoder,
        positions(policy.model.config),
        n_controls=len(dials.attributes),
        max_tokens=rlhf.sampling.max_tokens,
        setting="tune.rlhf.sampling.max_tokens",
    )
    checkpoints.mkdir(parents=True, exist_ok=True)

    total = rlhf.warm_start + config.steps

    def shifted(offset: int) -> OnStep | None:
        return None if on_step is None else lambda done, _: on_step(offset + done, total)

    model, manifest, warmed = _begun(
        policy,
        examples,
        config,
        dials=dials,
        seed=seed,
        checkpoints=checkpoints / "warm-start",
        base_model=base_model,
        on_step=shifted(0),
    )
    dtype = settled_dtype(checkpoints, config.dtype)
    online = OnlineConfig(
        steps=config.steps,
        batch_size=config.online_batch_size,
        group=rlhf.group,
        learning_rate=rlhf.learning_rate,
        beta=rlhf.beta,
        kl_limit=rlhf.kl_limit,
        sampling=rlhf.sampling,
        checkpoint_every=rlhf.checkpoint_every,
        dtype=dtype,
        section="tune.rlhf",
    )
    encoder = policy.encoder.with_dials(manifest)
    engine = TransformersEngine(
        model, encoder, model_hash="", batch_size=max(online.batch_size, 128)
    )
    plan = AskPlan(
        prompts,
        dials=dials,
        auto_rate=config.auto_rate,
        seed=seed,
    )
    rollouts = Rollouts(
        engine=engine,
        encoder=encoder,
        asks=plan,
        reward=control_reward(scorer, levels),
        config=online,
        seed=seed,
    )
    curve = train_online(
        model,
        policy.tokenizer,
        rollouts,
        StartReference(start.model, manifest.all_ids, online.sampling.temperature),
        online,
        checkpoints=checkpoints,
        seed=seed,
        on_step=shifted(rlhf.warm_start),
        watch=_looks(probe, engine, encoder, rlhf.probe_every, config.steps),
    )
    model.train(False)
    return Tuned(
        model=model,
        tokenizer=policy.tokenizer,
        manifest=manifest,
        curve=_joined(warmed, curve, deaf_floor(levels)),
        start_curve=[],
        dtype=dtype,
        seconds=time.monotonic() - started,
    )


def _begun(
    policy: LoadedPolicy,
    examples: Sequence[ControlledExample],
    config: TuneConfig,
    *,
    dials: Dials,
    seed: int,
    checkpoints: Path,
    base_model: str,
    on_step: OnStep | None,
) -> tuple[Any, DialManifest, Curve]:
    """Return the policy with its dials installed, after the warm start if there is one."""
    if config.rlhf.warm_start:
        warm = {"objective": "clm", "steps": config.rlhf.warm_start}
        tuned = tune_offline(
            policy,
            examples,
            config.model_copy(update=warm),
            dials=dials,
            seed=seed,
            checkpoints=checkpoints,
            base_model=base_model,
            on_step=on_step,
        )
        return tuned.model, tuned.manifest, tuned.curve
    model, manifest = with_dials(
        policy,
        dials=dials,
        lora_rank=config.lora_rank,
        base_model=base_model,
        seed=seed,
    )
    return model, manifest, []


def _looks(
    probe: Probe | None, engine: TransformersEngine, encoder: Encoder, every: int, steps: int
) -> Callable[[int, Curve], None] | None:
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
