"""The order of the stages: the one place, beside the command line, that knows it."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path

from equipoise.pipeline.job import MADE, Job
from equipoise.progress import Progress
from equipoise.stages import distil as distilling
from equipoise.stages import evaluate as measuring
from equipoise.stages import judge as bench
from equipoise.stages import pool, start
from equipoise.stages import steer as steering
from equipoise.stages import tune as tuning
from equipoise.stages.unseen import judges_by_name, warn_of_judges
from equipoise.store.rundir import RunDir

StageFunction = Callable[[Job], None]

STAGES: Mapping[str, StageFunction] = {
    "prompts": pool.prompts,
    "fit-reward": pool.fit_reward,
    "generate": pool.generate,
    "score": pool.score,
    "steer": steering.steer,
    "regenerate": steering.regenerate,
    "distil": distilling.distil,
    "tune": tuning.tune,
    "judge": bench.judge,
    "evaluate": measuring.evaluate,
    "report": measuring.report,
}
"""Command name to stage, in order."""

START_STAGES: Mapping[str, StageFunction] = {
    "base": start.base,
    "sft": start.sft,
    "align": start.align,
}
"""The same for the stages that make a start model; they come before all others."""


def run_all(
    run: RunDir, *, progress: Progress | None = None, text: bool | None = None, fresh: bool = False
) -> Path:
    """Run every stage that is not complete and return the report's page.

    Args:
        run: An open run directory.
        progress: Where to report; stderr by default.
        text: Whether the report shows prompts and completions; the run remembers it. By default
            what was asked for the last time, else true.
        fresh: Drop stages that were made under other conditions instead of refusing.

    Raises:
        EquipoiseError: With what happened, why, and what to do; what was finished is kept.
    """
    from equipoise.pipeline.pace import Pace
    from equipoise.pipeline.plan import print_plan

    job = _job(run, progress, text=text, fresh=fresh)
    warn_of_judges(job, judges_by_name(job.recipe))
    for name, make in START_STAGES.items():
        if getattr(run.recipe, name) is not None:
            make(job)
    if not run.is_done("tune"):
        tuning.check_thoughts(job)
    pool.prompts(job)
    pace = Pace(print_plan(job), job.progress.say)
    with job.progress.watched(pace.check):
        for name, stage in list(STAGES.items())[1:]:
            pace.begin(name)
            stage(job)
            pace.end(run.done(name).minutes if run.is_done(name) else 0.0)
    minutes = run.minutes()
    listed = ", ".join(f"{name} {spent:.1f}" for name, spent in minutes.items())
    job.progress.say(f"minutes: {listed}; {sum(minutes.values()):.1f} in all")
    return run.path / "report" / measuring.PAGE


def run_stage(
    name: str,
    run: RunDir,
    *,
    progress: Progress | None = None,
    text: bool | None = None,
    fresh: bool = False,
) -> None:
    """Run one stage (and the loading of prompts, which all of them need).

    Args:
        name: A key of :data:`STAGES` or :data:`START_STAGES`.
        run: See :func:`run_all`.
        progress: See :func:`run_all`.
        text: See :func:`run_all`.
        fresh: See :func:`run_all`.
    """
    job = _job(run, progress, text=text, fresh=fresh)
    if name in START_STAGES:
        START_STAGES[name](job)
        return
    if run.recipe.model.startswith(MADE):
        run.done(run.recipe.model.removeprefix(MADE))
    if name in ("steer", "regenerate", "tune") and not run.is_done(name):
        tuning.check_thoughts(job)
    if name not in ("prompts", "fit-reward") and not run.is_done("prompts"):
        pool.prompts(job)
    STAGES[name](job)


def run_scenarios(
    policy: str, run: RunDir, *, progress: Progress | None = None, forge: int = 0
) -> Path:
    """Measure what every scenario of a dial policy delivers, and return the folder of the result.

    Args:
        policy: A policy file, or the name of a shipped policy.
        run: A run directory whose evaluate stage is complete.
        progress: See :func:`run_all`.
        forge: Also measure forge lift over HTTP, with so many answers per prompt.
    """
    from equipoise.stages.scenarios import evaluate_scenarios

    job = _job(run, progress, text=None, fresh=False)
    place = evaluate_scenarios(job, policy)
    if forge:
        from equipoise.serve.forge import forge_over_http

        forge_over_http(job, policy, repeats=forge)
    return place


def _job(run: RunDir, progress: Progress | None, *, text: bool | None, fresh: bool) -> Job:
    quieten()
    shown = run.shows_text(text)
    return Job(run=run, progress=progress or Progress(), fresh=fresh, text=shown)


def quieten() -> None:
    """Silence the progress bars and hints of libraries; warnings and errors stay.

    By environment, as importing them here would make "nothing to do" take seconds. Of warnings go
    those that a user can do nothing about: what a library will rename, and that rows of tokens are
    saved with a LoRA, which is what we want.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    for library in ("transformers", "peft", "trl", "accelerate"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=rf"{library}\b")
    warnings.filterwarnings("ignore", "Setting `save_embedding_layers`", module=r"peft\b")
