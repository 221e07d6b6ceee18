"""Runs stages: fingerprint, "nothing to do", threads, and only then the stage's module."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from equipoise.pipeline.job import Job
from equipoise.pipeline.memory import give_back
from equipoise.pipeline.rundir import RunDir
from equipoise.pipeline.spec import Phase, StageSpec, view_of
from equipoise.pipeline.table import STAGES, is_asked_for, of_phase, reads_of
from equipoise.pipeline.unseen import judges_by_name, warn_of_judges
from equipoise.progress import Progress
from equipoise.store.stagedir import Stage

PAGE = "report.html"


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

    job = _job(run, progress, text)
    warn_of_judges(job, judges_by_name(run.recipe))
    for row in of_phase(Phase.START):
        if is_asked_for(row, run.recipe):
            _make(row, job, fresh=fresh)
    first, *others = of_phase(Phase.RUN)
    _check_start([row for row in others if is_asked_for(row, run.recipe)], job)
    _make(first, job, fresh=fresh)
    pace = Pace(print_plan(job), job.progress.say)
    give_back()
    with job.progress.watched(pace.check):
        for row in others:
            pace.begin(row.name)
            _make(row, job, fresh=fresh)
            pace.end(run.done(row.name).minutes if run.is_done(row.name) else 0.0)
    minutes = run.minutes()
    listed = ", ".join(f"{name} {spent:.1f}" for name, spent in minutes.items())
    job.progress.say(f"minutes: {listed}; {sum(minutes.values()):.1f} in all")
    return run.path / others[-1].name / PAGE


def run_stage(
    name: str,
    run: RunDir,
    *,
    progress: Progress | None = None,
    text: bool | None = None,
    fresh: bool = False,
) -> None:
    """Run one stage, and before it the loading of prompts, if it needs them.

    Args:
        name: A stage that has a folder of its own.
        run: See :func:`run_all`.
        progress: See :func:`run_all`.
        text: See :func:`run_all`.
        fresh: See :func:`run_all`.
    """
    job, row = _job(run, progress, text), STAGES[name]
    _check_start([row], job)
    first = of_phase(Phase.RUN)[0]
    if row.prompts_first(run.recipe) and not run.is_done(first.name):
        _make(first, job, fresh=fresh)
    _make(row, job, fresh=fresh)


def run_beside(name: str, run: RunDir, *, progress: Progress | None = None, **options: Any) -> Path:
    """Measure something more of a run that is evaluated, and return where the result lies.

    Args:
        name: A stage of the phase ``BESIDE``.
        run: A run directory whose evaluate stage is complete.
        progress: See :func:`run_all`.
        options: What the stage's function asks for.
    """
    row, job = STAGES[name], _job(run, progress, None)
    for needed in row.inputs:
        run.done(needed)
    job.settle_threads()
    place: Path = _imported(row)(_seen_by(row, job), **options)
    return place


def _make(row: StageSpec, whole: Job, *, fresh: bool) -> None:
    """Bring one stage to its end; its module is imported only if there is something to do."""
    run, job = whole.run, _seen_by(row, whole)
    if not is_asked_for(row, run.recipe):
        job.progress.say(f"{row.name}: nothing to do (the recipe has no `{row.optional}`)")
        return
    stage = _begin(row, job, fresh=fresh)
    if stage.complete and row.shows_text and stage.facts().get("text") != job.text:
        # With and without text are two views of one run: no reason to refuse.
        run.drop_from({row.name})
        stage = _begin(row, job, fresh=fresh)
    if stage.complete:
        job.progress.say(f"{row.name}: nothing to do")
        return
    if row.computes:
        whole.settle_threads()
    _imported(row)(job, stage)
    give_back()


def _begin(row: StageSpec, job: Job, *, fresh: bool) -> Stage:
    return job.run.begin(row.name, models=row.models(job), fresh=fresh)


def _imported(row: StageSpec) -> Any:
    module, _, function = row.where.partition(":")
    return getattr(import_module(module), function)


def _seen_by(row: StageSpec, job: Job) -> Job:
    recipe = job.run.recipe
    reads = (*reads_of(row, recipe), *row.checks)
    return Job(job.run, job.progress, view_of(recipe, reads, stage=row.name), job.text)


def _check_start(rows: Sequence[StageSpec], job: Job) -> None:
    """Refuse a start model that thinks before it answers, at no more cost than its tokenizer."""
    if not any(row.refuses_thoughts and not job.run.is_done(row.name) for row in rows):
        return
    from equipoise.encoding.encode import Encoder
    from equipoise.encoding.thoughts import refuse_thoughts
    from equipoise.models.hub import resolve_model
    from equipoise.models.load import load_tokenizer

    tokenizer = load_tokenizer(resolve_model(job.place(job.recipe.model)))
    refuse_thoughts(Encoder(tokenizer, rendering=job.rendering))


def _job(run: RunDir, progress: Progress | None, text: bool | None) -> Job:
    quieten()
    return Job.of(run, progress or Progress(), text=run.shows_text(text))


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
