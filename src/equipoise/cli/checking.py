"""The command ``check``: what can be done with a model, before anything is run."""

from __future__ import annotations

import json
from typing import Annotated

import typer

_WIDTH = 15


def add_commands(app: typer.Typer) -> None:
    """Add the command to the table."""
    app.command("check", help="Try what can be done with a model; run this first on your own.")(
        check
    )


def check(
    model: Annotated[str, typer.Argument(help="Folder, hub id, workshop:// or cache:// name.")],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, for scripts.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Print what a model is, and try every part on two layers of it; exit 1 if one fails."""
    from equipoise.models.hub import resolve_model
    from equipoise.pipeline.runner import quieten

    quieten()
    resolve_model(model)  # a wrong name is told before seconds go into imports
    from equipoise.check.model import check_model

    found = check_model(model)
    if as_json:
        print(json.dumps(found.as_json(), indent=1, ensure_ascii=False))
    else:
        for name, value in found.lines():
            print(f"{name:<{_WIDTH}} {value}")
        for trial in found.trials:
            if trial.problem is not None:
                print(f"\n{trial.part}: {trial.problem}")
                break
    if not found.works:
        raise typer.Exit(1)
