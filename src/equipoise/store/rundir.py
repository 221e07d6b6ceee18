"""The run directory: the only interface between stages, and the only writer of their files.

    RUN/
    ├── recipe.json             the resolved recipe
    ├── machine.json            number of threads that the run computes with
    ├── view.json               whether the report shows prompts and completions
    ├── .lock                   flock of the process at work: pid, host, start time
    └── STAGE/
        ├── started.json        fingerprint, written first
        ├── published.json      files published so far, with hashes and seconds
        ├── shard-00000.parquet ...
        ├── work/               scratch that survives a kill (checkpoints); deleted at the end
        └── stage.json          hashes of every output, minutes; written last

A stage is *complete* if its ``stage.json`` is there; its fingerprint (config fields it reads,
hashes of its inputs, model hashes, package version) decides between reuse, resume and refusal.
"""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from equipoise.config import Recipe
from equipoise.errors import RunError
from equipoise.recipes.gone import readable
from equipoise.recipes.source import settled_paths
from equipoise.store.fingerprint import (
    ORDER,
    diff,
    first_affected,
    inputs_of,
    needed_by,
    read_fields,
    reads_of,
    with_new_defaults,
)
from equipoise.store.lock import locked
from equipoise.store.publish import (
    TEMPORARY,
    is_full,
    json_bytes,
    publish_bytes,
    read_json,
    read_json_or_none,
    remove_orphans,
)
from equipoise.store.stagedir import Stage
from equipoise.store.stagefiles import RunFile, StageFiles

BROKEN = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EIO, errno.ENOTDIR)
"""Errors of a disk or its rights, as opposed to mistakes in this program."""


class RunDir:
    """A locked run directory. Make one with :meth:`open`."""

    def __init__(self, path: Path, recipe: Recipe) -> None:
        self.path, self.recipe = path, recipe

    @classmethod
    @contextmanager
    def open(
        cls, path: Path, recipe: Recipe, *, fresh: bool = False, only_from: str | None = None
    ) -> Iterator[RunDir]:
        """Lock the directory (made if missing), check the recipe against the stored one.

        Args:
            path: The run directory.
            recipe: The resolved recipe; relative paths in it are those of the working directory.
            fresh: With a changed recipe, drop the stages from the first affected one on; with an
                unchanged one, drop all stages, or those from ``only_from`` on.
            only_from: The stage that the user named, if any.

        Raises:
            RunError: Another process holds the directory, the recipe has changed and ``fresh`` is
                false, or the disk is full.
        """
        run = cls(path, settled_paths(recipe, None))
        if path.exists() and not path.is_dir():
            raise RunError(f"{path} is not a directory", why="a file is there", fix="name another")
        with run.writing():
            path.mkdir(parents=True, exist_ok=True)
            foreign = [
                item.name
                for item in path.iterdir()
                if not item.name.startswith((".lock", TEMPORARY))
            ]
        if foreign and not (path / "recipe.json").exists() and not set(foreign) <= {*ORDER}:
            raise RunError(
                f"{path} is not a run directory",
                why=f"it holds other files ({', '.join(sorted(foreign)[:3])}) and no recipe.json",
                fix="name a new or empty directory with --dir",
            )
        with locked(path), run.writing():
            remove_orphans(path)
            run._accept_recipe(fresh=fresh, only_from=only_from)
            yield run

    @property
    def resume_command(self) -> str:
        """The command that goes on with this run."""
        return f"equipoise run {self.path}"

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Turn a full or failing disk into a :class:`RunError` with the resume command."""
        try:
            yield
        except RunError:
            raise
        except Exception as error:
            if is_full(error):
                free = shutil.disk_usage(_existing(self.path)).free
                raise RunError(
                    f"no space left on the disk of {self.path}",
                    why=f"{free / 2**20:.1f} MiB are free ({error}); what was being written was "
                    "dropped, all that was published before is kept",
                    fix=f"free some space, then resume with: {self.resume_command}",
                ) from error
            if isinstance(error, OSError) and error.errno in BROKEN:
                raise RunError(
                    f"cannot write to {self.path}",
                    why=str(error),
                    fix=f"repair the disk or its rights, then resume with: {self.resume_command}",
                ) from error
            raise

    def begin(
        self, name: str, *, models: Mapping[str, str] | None = None, fresh: bool = False
    ) -> Stage:
        """Start, resume or reuse a stage; ``stage.complete`` says that there is nothing to do.

        Args:
            name: One of :data:`ORDER`.
            models: Name to hash of the models that the stage uses.
            fresh: Drop what an earlier run with another fingerprint left, instead of refusing.

        Raises:
            RunError: An input stage is missing, or the stage was begun with another fingerprint.
        """
        fingerprint = self._fingerprint(name, models or {})
        stage = Stage(self.path / name, fingerprint=fingerprint, run=self)
        changes = stage.changes()
        if changes and fresh:
            self.drop_from(name)
            stage = Stage(self.path / name, fingerprint=fingerprint, run=self)
        elif changes:
            raise RunError(
                f"stage {name} in {self.path} was made under other conditions",
                why="changed:\n" + "\n".join(f"    {line}" for line in changes),
                fix=f"run again with --fresh, which drops {name} and the stages after it and keeps "
                "the others; or name a new directory with --dir",
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
            first = f"equipoise {'run' if missing[0] == 'prompts' else missing[0]} {self.path}"
            every = f"; or all that is missing ({', '.join(missing)}): {self.resume_command}"
            raise RunError(
                f"stage {name} of {self.path} is not complete",
                why="a later stage needs its files",
                fix=f"run it first: {first}{every if len(missing) > 1 else ''}",
            )
        return stage

    def is_done(self, name: str) -> bool:
        """True if the stage is complete."""
        return StageFiles(self.path / name).complete

    def drop_from(self, name: str) -> None:
        """Delete a stage and all that come after it."""
        for later in ORDER[ORDER.index(name) :]:
            shutil.rmtree(self.path / later, ignore_errors=True)

    def shows_text(self, asked: bool | None) -> bool:
        """Return whether the report shows prompts and completions, and remember what was asked.

        Args:
            asked: ``None`` = as it was asked for the last time, or true.
        """
        file = self.path / "view.json"
        stored = (read_json_or_none(file) or StageFiles(self.path / "report").facts()).get("text")
        shown = bool(stored) if asked is None and stored is not None else asked is not False
        if asked is not None and asked != stored:
            with self.writing():
                publish_bytes(file, json_bytes({"text": asked}))
        return shown

    def minutes(self) -> dict[str, float]:
        """Return minutes spent per complete stage."""
        done = [name for name in ORDER if self.is_done(name)]
        return {name: self.done(name).minutes for name in done}

    def _fingerprint(self, name: str, models: Mapping[str, str]) -> dict[str, Any]:
        from equipoise import __version__

        plain = self.recipe.model_dump(mode="json")
        return {
            "config": read_fields(plain, reads_of(name, self.recipe)),
            "inputs": {item: self.done(item).outputs_hash for item in inputs_of(name, self.recipe)},
            "models": dict(sorted(models.items())),
            "version": __version__,
        }

    def _accept_recipe(self, *, fresh: bool, only_from: str | None) -> None:
        file, new = self.path / "recipe.json", self.recipe.model_dump(mode="json")
        old = read_json_or_none(file)
        changes = diff(with_new_defaults(old, self.recipe), new) if old is not None else []
        if changes and not self._begun():
            # Such as the corrected recipe after a first try that failed at once.
            self.drop_from(ORDER[0])
        elif changes and not fresh:
            raise RunError(
                f"the recipe is not the one that {self.path} was made with",
                why="changed:\n" + "\n".join(f"    {line}" for line in changes),
                fix="run again with --fresh, which drops the stages from the first affected one on "
                "and keeps the others; or name a new directory with --dir",
            )
        if fresh:
            first = first_affected(changes, self.recipe) if changes else (only_from or ORDER[0])
            if first is not None:
                self.drop_from(first)
        if old != new:
            publish_bytes(file, json_bytes(new))

    def _begun(self) -> bool:
        """True if a stage holds anything that was made, be it a checkpoint."""
        made = (file for name in ORDER for file in (self.path / name).rglob("*") if file.is_file())
        return any(file.name != RunFile.STARTED for file in made)


def stored_recipe(path: Path) -> Recipe:
    """Return the recipe that a run directory was made with.

    Raises:
        RunError: There is none, or it cannot be read, or asks for what is no longer done.
    """
    try:
        return Recipe.model_validate(readable(read_json(path / "recipe.json"), path))
    except (OSError, ValueError) as error:
        raise RunError(
            f"cannot read the recipe of {path}",
            why=str(error).splitlines()[0],
            fix="name a run directory, or a recipe: `equipoise recipes` lists the shipped ones",
        ) from error


def _existing(path: Path) -> Path:
    return next(item for item in (path, *path.absolute().parents) if item.exists())
