"""``equipoise run`` and ``equipoise stage NAME``; both take a recipe or a run directory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from equipoise.pipeline.spec import Phase
from equipoise.pipeline.table import STAGES

if TYPE_CHECKING:
    from equipoise.pipeline.rundir import RunDir
    from equipoise.progress import Progress

RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="Name of a shipped recipe, a YAML file, or a run directory to go on with.",
        show_default=False,
    ),
]
RunArgument = Annotated[
    str,
    typer.Argument(metavar="RUN", help="A run directory that is evaluated.", show_default=False),
]
DirOption = Annotated[
    Path | None,
    typer.Option("--dir", help="Run directory.", show_default="runs/RECIPE-NAME"),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Override a field: tune.objective=exmate."),
]
DataOption = Annotated[
    str | None, typer.Option("--data", metavar="DIR", help="Folder of relative data sources.")
]
FreshOption = Annotated[
    bool,
    typer.Option(
        "--fresh",
        help="Drop what an earlier run left: the stages that a changed recipe affects, else this "
        "stage, and all that depend on them.",
    ),
]
PolicyOption = Annotated[
    str, typer.Option("--policy", metavar="FILE", help="Dial policy; `example` is shipped.")
]
TextOption = Annotated[
    bool | None,
    typer.Option(
        "--text/--no-text",
        help="Show prompts and completions in the report, or leave them out. The run remembers it.",
        show_default="as last asked for, else --text",
    ),
]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def add_commands(app: typer.Typer) -> None:
    """Add ``run``, ``stage`` and ``report`` to the command table."""
    app.command("run", help="Run all stages, or go on where an earlier run stopped.")(run)
    group = typer.Typer(help="Run one stage of a recipe.", no_args_is_help=True)
    for name, row in STAGES.items():
        if row.phase is Phase.BESIDE:
            command = BESIDE[name]
        else:
            command = _showing_command(name) if row.shows_text else _stage_command(name)
        group.command(name, help=row.help)(command)
        if row.shows_text:
            app.command(name, help=row.help)(command)
    app.add_typer(group, name="stage")


def run(
    recipe: RecipeArgument,
    directory: DirOption = None,
    set_: SetOption = None,
    data: DataOption = None,
    fresh: FreshOption = False,
    text: TextOption = None,
    debug: DebugOption = False,
) -> None:
    """Run all stages of a recipe."""
    from equipoise.pipeline.runner import run_all

    with _opened(recipe, directory, set_, data, fresh=fresh, stage=None) as (run_dir, progress):
        page = run_all(run_dir, progress=progress, text=text, fresh=fresh)
    print(f"report: {page}")


def _stage_command(name: str) -> Callable[..., None]:
    def command(
        recipe: RecipeArgument,
        directory: DirOption = None,
        set_: SetOption = None,
        data: DataOption = None,
        fresh: FreshOption = False,
        debug: DebugOption = False,
    ) -> None:
        _run_stage(name, recipe, directory, set_, data, fresh=fresh)

    return command


def _showing_command(name: str) -> Callable[..., None]:
    def command(
        recipe: RecipeArgument,
        directory: DirOption = None,
        set_: SetOption = None,
        data: DataOption = None,
        fresh: FreshOption = False,
        text: TextOption = None,
        debug: DebugOption = False,
    ) -> None:
        _run_stage(name, recipe, directory, set_, data, fresh=fresh, text=text)

    return command


def _run_stage(
    name: str,
    recipe: str,
    directory: Path | None,
    set_: list[str] | None,
    data: str | None,
    *,
    fresh: bool,
    text: bool | None = None,
) -> None:
    from equipoise.pipeline.runner import run_stage

    with _opened(recipe, directory, set_, data, fresh=fresh, stage=name) as (run_dir, progress):
        run_stage(name, run_dir, progress=progress, text=text, fresh=fresh)
        if run_dir.is_done(name):  # not if the recipe does without
            print(f"{name}: {run_dir.path / name}")


def scenarios(run: RunArgument, policy: PolicyOption, debug: DebugOption = False) -> None:
    """Measure the scenarios of a dial policy."""
    from equipoise.pipeline.runner import run_beside

    with _opened(run) as (run_dir, progress):
        place = run_beside("scenarios", run_dir, progress=progress, policy=policy)
    print(f"scenarios: {place}")


def forge(
    run: RunArgument,
    policy: PolicyOption,
    answers: Annotated[
        int, typer.Option("--answers", metavar="N", min=1, help="Per prompt and version.")
    ],
    debug: DebugOption = False,
) -> None:
    """Measure forge lift through the HTTP server."""
    from equipoise.cli.serving import need_extra
    from equipoise.pipeline.runner import run_beside

    need_extra()
    with _opened(run) as (run_dir, progress):
        place = run_beside("forge", run_dir, progress=progress, policy=policy, answers=answers)
    print(f"forge: {place}")


BESIDE: dict[str, Callable[..., None]] = {"scenarios": scenarios, "forge": forge}
"""Stages outside the order of a run, which ask for more than a recipe."""


@contextmanager
def _opened(
    recipe: str,
    directory: Path | None = None,
    set_: list[str] | None = None,
    data: str | None = None,
    *,
    fresh: bool = False,
    stage: str | None = None,
) -> Iterator[tuple[RunDir, Progress]]:
    from equipoise.pipeline.rundir import RunDir
    from equipoise.pipeline.stored import stored_recipe
    from equipoise.progress import Progress
    from equipoise.recipes.load import build_recipe, load_recipe

    given = Path(recipe)
    if given.is_dir():
        plain = stored_recipe(given).model_dump(mode="json")
        file = str(given / "recipe.json")
        resolved = build_recipe(plain, lines={}, file=file, overrides=set_ or [], data=data)
        path = directory or given
    else:
        resolved = load_recipe(recipe, overrides=set_ or [], data=data)
        path = directory or Path("runs") / resolved.name
    with RunDir.open(path, resolved, fresh=fresh, only_from=stage) as run_dir:
        yield run_dir, Progress()
