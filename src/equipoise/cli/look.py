"""Commands that look around or bring things in: check, recipes, fetch, doctor."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

_WIDTH = 15
"""Columns of the names of what was tried."""


def add_commands(app: typer.Typer) -> None:
    """Add the commands to the table."""
    app.command("check", help="Try what can be done with a model; run this first on your own.")(
        check
    )
    app.command("recipes", help="List the shipped recipes.")(recipes)
    app.command("fetch", help="Bring a real model into the local cache, hashes checked.")(fetch)
    app.command("doctor", help="Check this machine.")(doctor)


def recipes(
    show: Annotated[str | None, typer.Argument(help="Print this recipe.")] = None,
) -> None:
    """List the shipped recipes, or print one."""
    from equipoise.recipes.load import describe_shipped, find_recipe

    if show is not None:
        print(find_recipe(show).read_text(encoding="utf-8"), end="")
        return
    described = describe_shipped()
    width = max(len(name) for name in described)
    for name, text in described.items():
        print(f"{name:<{width}}  {text}")


def fetch(
    name: Annotated[str, typer.Argument(help="What to fetch; `smollm2` is known.")],
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    """Bring a real model into the local cache."""
    from equipoise.fetch.fetch import fetch as fetch_models

    for fetched, path in fetch_models(name).items():
        print(f"{fetched}: {path}")


def doctor() -> None:
    """Check the parts that runs depend on; exit code 1 if one is missing."""
    import importlib.metadata
    import shutil

    from equipoise.pipeline.threads import cores

    bad = 0
    print(f"python      {sys.version.split()[0]}")
    for name in ("torch", "transformers", "trl", "peft", "pyarrow"):
        try:
            print(f"{name:<11} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            bad += 1
            print(f"{name:<11} MISSING  fix: pip install -c constraints.txt equipoise")
    print(f"cores       {cores()}")
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    note = "" if free > 2 else "  LOW  fix: a run of a small real model needs about 2 GiB"
    print(f"free disk   {free:.1f} GiB{note}")
    if bad:
        raise typer.Exit(1)


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
