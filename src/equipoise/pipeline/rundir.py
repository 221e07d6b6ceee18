"""The run directory: the only interface between stages, and the only writer of their files.

    RUN/
    ├── recipe.json             the resolved recipe
    ├── format.json             number of this layout
    ├── machine.json            number of threads that the run computes with
    ├── date.json               the date that chat templates write
    ├── plan.json               minutes that were planned for each stage
    ├── view.json               whether the report shows prompts and completions
    └── STAGE/                  see equipoise.store.rundir

A stage's fingerprint (config fields it reads, hashes of its inputs, model hashes, package version)
decides between reuse, resume and refusal.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from equipoise.config import Recipe
from equipoise.errors import RunError
from equipoise.pipeline.stored import FORMAT, FORMAT_FILE, RECIPE, check_format, with_new_defaults
from equipoise.pipeline.table import (
    ORDER,
    STAGES,
    affected_by,
    inputs_of,
    is_asked_for,
    needed_by,
    read_fields,
    reads_of,
    with_later,
)
from equipoise.recipes.source import settled_paths
from equipoise.store.publish import read_json_or_none
from equipoise.store.rundir import LockedDir, diff
from equipoise.store.stagedir import Stage
from equipoise.store.stagefiles import StageFiles


class RunDir(LockedDir):
    """A locked run directory. Make one with :meth:`open`."""

    def __init__(self, path: Path, recipe: Recipe) -> None:
        super().__init__(path)
        self.recipe = recipe

    @classmethod
    @contextmanager
    def open(
        cls, path: Path, recipe: Recipe, *, fresh: bool = False, only_from: str | None = None
    ) -> Iterator[RunDir]:
        """Lock the directory (made if missing), check the recipe against the stored one.

        Args:
            path: The run directory.
            recipe: The resolved recipe; relative paths in it are those of the working directory.
            fresh: With a changed recipe, drop the stages that it affects; with an unchanged one,
                drop all stages, or ``only_from``. What depends on a dropped stage is dropped too.
            only_from: The stage that the user named, if any.

        Raises:
            RunError: Another process holds the directory, it has another format, the recipe has
                changed and ``fresh`` is false, or the disk is full.
        """
        run = cls(path, settled_paths(recipe, None))
        with run.held(mark=RECIPE, ours=ORDER):
            check_format(path)
            run._accept_recipe(fresh=fresh, only_from=only_from)
            yield run

    def begin(
        self, name: str, *, models: Mapping[str, str] | None = None, fresh: bool = False
    ) -> Stage:
        """Start, resume or reuse a stage; ``stage.complete`` says that there is nothing to do.

        Args:
            name: One of :data:`~equipoise.pipeline.table.ORDER`.
            models: Name to hash of the models that the stage uses.
            fresh: Drop what an earlier run with another fingerprint left, instead of refusing.

        Raises:
            RunError: An input stage is missing, or the stage was begun with another fingerprint.
        """
        stage = Stage(self.path / name, fingerprint=self._fingerprint(name, models), run=self)
        changes = self._changes(name, stage)
        if changes and fresh:
            self.drop_from({name})
        elif changes:
            raise RunError(
                f"stage {name} in {self.path} was made under other conditions",
                why="changed:\n" + "\n".join(f"    {line}" for line in changes),
                fix=f"run again with --fresh, which drops {name} and the stages that depend on it "
                "and keeps the others; or name a new directory with --dir",
            )
        stage.prepare()
        return stage

    def done(self, name: str) -> StageFiles:
        """Return a complete stage, to read from.

        Raises:
            RunError: The stage is not complete.
        """
        stage = StageFiles(self.path / name)
        if not stage.complete:
            missing = [one for one in needed_by(name, self.recipe) if not self.is_done(one)]
            # The first stage is made by every command.
            command = "run" if missing[0] == "prompts" else f"stage {missing[0]}"
            every = f"; or all that is missing ({', '.join(missing)}): {self.resume_command}"
            raise RunError(
                f"stage {name} of {self.path} is not complete",
                why="a later stage needs its files",
                fix=f"run it first: equipoise {command} {self.path}"
                f"{every if len(missing) > 1 else ''}",
            )
        return stage

    def asks_for(self, name: str) -> bool:
        """True if the recipe has the stage."""
        return is_asked_for(STAGES[name], self.recipe)

    def drop_from(self, names: Collection[str]) -> None:
        """Delete stages and all that depend on them."""
        self.drop(with_later(names, self.recipe))

    def shows_text(self, asked: bool | None) -> bool:
        """Return whether the report shows prompts and completions, and remember what was asked.

        Args:
            asked: ``None`` = as it was asked for the last time, or true.
        """
        file = self.path / "view.json"
        stored = (read_json_or_none(file) or StageFiles(self.path / "report").facts()).get("text")
        shown = bool(stored) if asked is None and stored is not None else asked is not False
        if asked is not None and asked != stored:
            self.write_json(file.name, {"text": asked})
        return shown

    def minutes(self) -> dict[str, float]:
        """Return minutes spent per complete stage."""
        done = [name for name in ORDER if self.is_done(name)]
        return {name: self.done(name).minutes for name in done}

    def _fingerprint(self, name: str, models: Mapping[str, str] | None) -> dict[str, Any]:
        from equipoise import __version__

        row, plain = STAGES[name], self.recipe.model_dump(mode="json")
        return {
            "config": read_fields(plain, reads_of(row, self.recipe)),
            "inputs": {one: self.done(one).outputs_hash for one in inputs_of(row, self.recipe)},
            "models": dict(sorted((models or {}).items())),
            "version": __version__,
        }

    def _changes(self, name: str, stage: Stage) -> list[str]:
        """Return how the fingerprint differs from the one that the stage was begun with.

        What the older one lacks was not in the table's row then: it is not compared, as the stored
        recipe is.
        """
        old = stage.begun_with()
        if old is None:
            return []
        row, stored = STAGES[name], old["config"]
        reads = [
            path
            for path in reads_of(row, self.recipe)
            if (parts := path.split("."))[0] in stored
            and (len(parts) == 1 or parts[1] in (stored[parts[0]] or {}))
        ]
        config = read_fields(with_new_defaults(stored, self.recipe), reads)
        now = dict(stage.fingerprint)
        later = {*row.also.inputs} - {*old["inputs"]}
        now["config"] = read_fields(now["config"], reads)
        now["inputs"] = {one: now["inputs"][one] for one in now["inputs"] if one not in later}
        return diff({**old, "config": config}, now)

    def _accept_recipe(self, *, fresh: bool, only_from: str | None) -> None:
        new = self.recipe.model_dump(mode="json")
        old = read_json_or_none(self.path / RECIPE)
        changes = diff(with_new_defaults(old, self.recipe), new) if old is not None else []
        if changes and not any(map(self.has_begun, ORDER)):
            # Such as the corrected recipe after a first try that failed at once.
            self.drop(ORDER)
        elif changes and not fresh:
            raise RunError(
                f"the recipe is not the one that {self.path} was made with",
                why="changed:\n" + "\n".join(f"    {line}" for line in changes),
                fix="run again with --fresh, which drops the stages that the change affects and "
                "keeps the others; or name a new directory with --dir",
            )
        if fresh and changes:
            self.drop_from(affected_by(changes, self.recipe))
        elif fresh:
            self.drop_from(ORDER if only_from is None else {only_from})
        if old != new:
            self.write_json(RECIPE, new)
        if not (self.path / FORMAT_FILE).exists():
            self.write_json(FORMAT_FILE, {"format": FORMAT})
