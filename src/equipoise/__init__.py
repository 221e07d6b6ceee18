"""Two dials, safety and helpfulness, for an aligned language model.

The public names, resolved on first use (PEP 562): ``import equipoise`` imports neither torch nor
transformers. The function that tunes is not among them, as ``equipoise.tune`` is the package it
lives in: ``from equipoise.tune.trainer import tune``.
"""

from __future__ import annotations

import os
import sys
import warnings
from importlib import import_module
from typing import Any

__version__ = "0.1.0"


def _let_idle_threads_sleep() -> None:
    """Set ``OMP_WAIT_POLICY=PASSIVE`` unless the operator has decided; too late is said.

    OpenMP reads it once, when torch is loaded. Threads that spin while they wait take the cores
    from those that they wait for: beside one busy process work comes to a halt.
    """
    # One thread has nobody to wait for.
    decided = "OMP_WAIT_POLICY" in os.environ or os.environ.get("OMP_NUM_THREADS") == "1"
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if "torch" in sys.modules and not decided:
        warnings.warn(
            "torch was imported before equipoise, so its idle threads spin and may be many times "
            "slower beside other work; import equipoise first, or set OMP_WAIT_POLICY=PASSIVE in "
            "the environment",
            stacklevel=3,
        )


_let_idle_threads_sleep()

_HOME = {
    "Branch": "types",
    "Calibration": "pool.calibrate",
    "Completion": "types",
    "ControlReport": "evaluate.measure",
    "ControlledExample": "types",
    "Delivery": "types",
    "Dials": "dials.dials",
    "DialManifest": "dials.manifest",
    "DialSetting": "types",
    "Encoder": "encoding.encode",
    "Engine": "engine.seam",
    "EquipoiseError": "errors",
    "Estimate": "stats",
    "GenerationRequest": "types",
    "LabelledAnswer": "data.pairs",
    "LoadedPolicy": "models.load",
    "Message": "types",
    "PreferencePair": "types",
    "Model": "model",
    "Prompt": "types",
    "Prompting": "steer.prompting",
    "Recipe": "config",
    "Reranking": "steer.reranking",
    "Rendering": "types",
    "Responder": "types",
    "RewardModel": "types",
    "RunDir": "pipeline.rundir",
    "Sampling": "config",
    "ScoredCompletion": "types",
    "Scorer": "rewards.scorer",
    "TransformersEngine": "engine.sample",
    "Tuned": "steer.responders",
    "Untouched": "steer.responders",
    "back_door": "pool.backdoor",
    "calibrate": "pool.calibrate",
    "distil": "pool.moec",
    "fit_reward": "rewards.fit",
    "generate": "pool.generate",
    "install": "dials.tokens",
    "load": "model",
    "load_causal": "models.load",
    "load_prompts": "data.prompts",
    "load_recipe": "recipes.load",
    "load_reward_model": "rewards.load",
    "measure": "evaluate.measure",
    "merge": "models.adapter",
    "run_all": "pipeline.runner",
    "save_dial_model": "dials.tokens",
    "score": "pool.score",
    "sweep": "evaluate.sweep",
    "unit_scores": "pool.calibrate",
}

__all__ = sorted([*_HOME, "__version__"])


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'equipoise' has no attribute {name!r}")
    value = getattr(import_module(f"equipoise.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
