"""``equipoise run`` and one command per stage; all take a recipe or a run directory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from equipoise.progress import Progress
    from equipoise.store.rundir import RunDir

START_COMMANDS = {
    "base": "Train a base model from raw text (recipes that make their start model).",
    "sft": "Fine-tune it on dialogues.",
    "align": "Align it: DPO on preference pairs, or RLHF on rewards.",
}
COMMANDS = {
    "fit-reward": "Train the recipe's own reward models.",
    "generate": "Sample completions of the training prompts from the untouched model.",
    "score": "Score the pool with the reward models and calibrate.",
    "steer": "Find what to add to the model's states to steer it, and how strongly.",
    "regenerate": "Sample a second pool under steering, for the cells that are rare.",
    "distil": "Distil the scored pool (MOEC).",
    "tune": "Tune the dials (CLM, ExMATE or RLHF).",
    "judge": "Let the judges read the pool: the scale of what they will say.",
    "evaluate": "Turn every dial on unseen prompts and measure.",
    "report": "Write the report: HTML, JSON and figures.",
}

RecipeArgument = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE",
        help="Name of a shipped recipe, a YAML file, or a run directory to go on with.",
        show_default=False,
    ),
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
        help="Drop what an earlier run left: from the first stage that a changed recipe affects, "
        "else from this stage on.",
    ),
]
PolicyOption = Annotated[
    str | None,
    typer.Option("--policy", metavar="FILE", help="Also measure the scenarios of a dial policy."),
]
ForgeOption = Annotated[
    int,
    typer.Option(
        "--forge",
        metavar="N",
        min=0,
        help="With --policy: measure forge lift over HTTP, N answers per prompt.",
    ),
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
    """Add ``run`` and the stages to the command table."""
    app.command("run", help="Run all stages, or go on where an earlier run stopped.")(run)
    for name, text in (START_COMMANDS | COMMANDS).items():
        app.command(name, help=text)(_stage_command(name))


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

    def report(
        recipe: RecipeArgument,
        directory: DirOption = None,
        set_: SetOption = None,
        data: DataOption = None,
        fresh: FreshOption = False,
        text: TextOption = None,
        debug: DebugOption = False,
    ) -> None:
        _run_stage(name, recipe, directory, set_, data, fresh=fresh, text=text)

    def evaluate(
        recipe: RecipeArgument,
        directory: DirOption = None,
        set_: SetOption = None,
        data: DataOption = None,
        fresh: FreshOption = False,
        policy: PolicyOption = None,
        forge: ForgeOption = 0,
        debug: DebugOption = False,
    ) -> None:
        _run_stage(name, recipe, directory, set_, data, fresh=fresh, policy=policy, forge=forge)

    others: dict[str, Callable[..., None]] = {"report": report, "evaluate": evaluate}
    return others.get(name, command)


def _run_stage(
    name: str,
    recipe: str,
    directory: Path | None,
    set_: list[str] | None,
    data: str | None,
    *,
    fresh: bool,
    text: bool | None = None,
    policy: str | None = None,
    forge: int = 0,
) -> None:
    from equipoise.pipeline.runner import run_scenarios, run_stage

    if forge:
        from equipoise.cli.serving import need_extra

        need_extra()

    with _opened(recipe, directory, set_, data, fresh=fresh, stage=name) as (run_dir, progress):
        run_stage(name, run_dir, progress=progress, text=text, fresh=fresh)
        if run_dir.is_done(name):  # not if the recipe does without
            print(f"{name}: {run_dir.path / name}")
        if policy is not None:
            print(f"scenarios: {run_scenarios(policy, run_dir, progress=progress, forge=forge)}")


@contextmanager
def _opened(
    recipe: str,
    directory: Path | None,
    set_: list[str] | None,
    data: str | None,
    *,
    fresh: bool,
    stage: str | None,
) -> Iterator[tuple[RunDir, Progress]]:
    from equipoise.progress import Progress
    from equipoise.recipes.load import build_recipe, load_recipe
    from equipoise.store.rundir import RunDir, stored_recipe

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
