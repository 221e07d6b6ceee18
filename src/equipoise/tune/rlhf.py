"""RLHF with control: reward closeness to the setting that was asked for (DESIGN section 1).

    reward(y; ζ) = 1 - mean over the dialled attributes a of |u_a(y) - t_a|

with u the calibrated unit score of the training reward models and t the target of the level. An
attribute on auto asks for nothing and is left out. The KL to the untouched start model is part of
the loss (TRL's GRPO). A policy that is deaf to its dials and answers at the median already earns
:func:`deaf_floor`, .76 at five levels: read every reward against it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from equipoise.config import TuneConfig
from equipoise.dials.attributes import cells, target
from equipoise.dials.encode import Encoder
from equipoise.dials.tokens import install
from equipoise.models.judging import unit_scores_of
from equipoise.models.load import LoadedPolicy
from equipoise.models.sampling import TransformersEngine
from equipoise.seeds import derive_seed
from equipoise.tune.checkpoints import Curve, OnStep, settled_dtype
from equipoise.tune.counterfactual import drop_to_auto
from equipoise.tune.lora import add_lora
from equipoise.tune.online import Ask, OnlineConfig, Rollouts, StartReference, train_online
from equipoise.tune.trainer import Tuned
from equipoise.tune.trainer import tune as tune_offline
from equipoise.types import (
    ControlledExample,
    DialSetting,
    Prompt,
    RewardModel,
    Sampling,
    UnitScale,
)

Probe = Callable[[TransformersEngine, Encoder], dict[str, float]]
"""Looks at the policy: samples over the grid and measures; never part of the loss."""


def closeness(units: Sequence[float], setting: DialSetting, levels: int) -> float:
    """Return ``1 - mean |u_a - t_a|`` over the attributes that are not on auto.

    Args:
        units: Unit score in [0, 1] per attribute.
        setting: What was asked for, at least one attribute not on auto.
        levels: L.

    Returns:
        In [0, 1]; 1 is exactly on target.
    """
    gaps = [
        abs(unit - target(level, levels))
        for unit, level in zip(units, setting.levels, strict=True)
        if level is not None
    ]
    if not gaps:
        raise ValueError("a setting with every attribute on auto asks for nothing")
    return 1.0 - sum(gaps) / len(gaps)


def deaf_floor(levels: int) -> float:
    """Return the reward of a policy that always answers at the median, over all settings."""
    return 1.0 - sum(abs(0.5 - target(level, levels)) for level in range(levels)) / levels


class AskPlan:
    """Row i to a prompt and a setting, a pure function of (prompts, seed, i).

    Prompts come in epochs of permutations, settings uniformly over the control cells; each
    attribute is on auto with probability ``auto_rate``, but never all of them at once.

    Args:
        prompts: Training prompts.
        n_attributes: A.
        levels: L.
        auto_rate: Probability per attribute.
        seed: Seed of the draws.
    """

    def __init__(
        self,
        prompts: Sequence[Prompt],
        *,
        n_attributes: int,
        levels: int,
        auto_rate: float,
        seed: int,
    ) -> None:
        self._prompts, self._seed = list(prompts), seed
        self._cells = cells(n_attributes, levels)
        # At rate 1 no attribute would ever be asked for.
        self._auto_rate = min(auto_rate, 0.9)

    def __call__(self, index: int) -> Ask:
        """Return what row ``index`` asks for."""
        epoch, place = divmod(index, len(self._prompts))
        shuffled = np.random.default_rng(derive_seed(self._seed, "rlhf epoch", epoch))
        prompt = self._prompts[shuffled.permutation(len(self._prompts))[place]]
        rng = np.random.default_rng(derive_seed(self._seed, "rlhf setting", index))
        cell = self._cells[rng.integers(len(self._cells))]
        while True:
            setting = drop_to_auto(cell, self._auto_rate, rng)
            if any(level is not None for level in setting.levels):
                return Ask(prompt, setting)


def control_reward(
    reward_models: Mapping[str, RewardModel], calibration: UnitScale, levels: int
) -> Callable[[Sequence[tuple[Ask, str]]], list[float]]:
    """Return the reward function of calibrated reward models.

    Raises (when called):
        RewardError: A reward model returned the wrong number of scores, or one that is not finite.
    """

    def reward(pairs: Sequence[tuple[Ask, str]]) -> list[float]:
        units = unit_scores_of(
            [(ask.prompt, text) for ask, text in pairs], reward_models, calibration
        )
        earned = []
        for ask, text in pairs:
            found = units[ask.prompt.id, text]
            assert ask.setting is not None  # every row of an AskPlan has one
            earned.append(closeness([found[a] for a in reward_models], ask.setting, levels))
        return earned

    return reward


def tune_by_rlhf(
    policy: LoadedPolicy,
    start: LoadedPolicy,
    prompts: Sequence[Prompt],
    examples: Sequence[ControlledExample],
    reward_models: Mapping[str, RewardModel],
    calibration: UnitScale,
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
        reward_models: The training reward models, one per attribute, in attribute order.
        calibration: Their unit scale on the start model's pool.
        config: Budget; see :class:`equipoise.config.RlhfConfig`.
        levels: L.
        seed: Everything random derives from it.
        checkpoints: Folder of the checkpoints; created if missing.
        base_model: Name of the untouched model, for the manifest.
        on_step: Called with (steps done, steps in all), the warm start's steps included.
        probe: Looks at the policy every ``probe_every`` steps and at both ends; what it returns
            is kept in the curve until the next look.

    Raises:
        TrainingError: See :func:`equipoise.tune.online.train_online`.
        RewardError: See :func:`control_reward`.
    """
    rlhf, started = config.rlhf, time.monotonic()
    attributes = list(reward_models)
    checkpoints.mkdir(parents=True, exist_ok=True)

    def shifted(offset: int) -> OnStep | None:
        total = rlhf.warm_start + config.steps
        return None if on_step is None else lambda done, _: on_step(offset + done, total)

    warmed: Curve = []
    if rlhf.warm_start:
        warm = config.model_copy(update={"objective": "clm", "steps": rlhf.warm_start})
        tuned = tune_offline(
            policy,
            examples,
            warm,
            attributes=attributes,
            levels=levels,
            seed=seed,
            checkpoints=checkpoints / "warm-start",
            base_model=base_model,
            on_step=shifted(0),
        )
        model, manifest, warmed = tuned.model, tuned.manifest, tuned.curve
    else:
        manifest = install(
            policy.model,
            policy.tokenizer,
            attributes=attributes,
            levels=levels,
            base_model=base_model,
            base_model_hash=policy.hash,
        )
        model = policy.model
        if config.lora_rank:
            model = add_lora(model, manifest, rank=config.lora_rank, seed=seed)
    dtype = settled_dtype(checkpoints, config.dtype)
    online = OnlineConfig(
        steps=config.steps,
        batch_size=config.batch_size,
        group=rlhf.group,
        learning_rate=rlhf.learning_rate,
        beta=rlhf.beta,
        kl_limit=rlhf.kl_limit,
        sampling=Sampling(**rlhf.sampling.model_dump()),
        checkpoint_every=config.checkpoint_every,
        dtype=dtype,
    )
    encoder = Encoder(policy.tokenizer, manifest)
    engine = TransformersEngine(
        model, encoder, model_hash="", batch_size=max(config.batch_size, 128)
    )
    plan = AskPlan(
        prompts,
        n_attributes=len(attributes),
        levels=levels,
        auto_rate=config.auto_rate,
        seed=seed,
    )
    rollouts = Rollouts(
        engine=engine,
        encoder=encoder,
        asks=plan,
        reward=control_reward(reward_models, calibration, levels),
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
        dtype=dtype,
        seconds=time.monotonic() - started,
    )


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
