"""Guards of online training: what ends a run, with the last good checkpoint kept."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from equipoise.errors import TrainingError
from equipoise.rlhf.rollouts import OnlineConfig
from equipoise.tune.checkpoints import AGAIN, Curve

PATIENCE = 3
"""Steps that a guard waits; no checkpoint is written meanwhile."""
_STILL = 1e-6
"""A spread of rewards under this is none."""


class Guards(TrainerCallback):  # type: ignore[misc, unused-ignore]
    """Ends a run that has nothing to learn from, or that runs away from the start model."""

    def __init__(self, curve: Curve, config: OnlineConfig) -> None:
        self._curve, self._config = curve, config
        self._still = self._away = 0

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
