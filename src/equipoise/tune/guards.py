"""Guards of online training: what ends a run, with the last good checkpoint kept."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from equipoise.errors import TrainingError
from equipoise.tune.checkpoints import Curve

PATIENCE = 3
"""Steps that a guard waits; no checkpoint is written meanwhile."""
_STILL = 1e-6
"""A spread of rewards under this is none."""


class Guards(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Ends a run that has nothing to learn from, or that runs away from the start model."""

    def __init__(self, curve: Curve, kl_limit: float) -> None:
        self._curve, self._kl_limit = curve, kl_limit
        self._still = self._away = 0

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
