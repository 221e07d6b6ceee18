"""``equipoise serve`` and ``equipoise keys``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from equipoise.policy.rules import Range

KeysOption = Annotated[Path, typer.Option("--keys", metavar="FILE", help="The keys file.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]


def add_commands(app: typer.Typer) -> None:
    """Add the commands to the table."""
    app.command("serve", help="Serve a tuned model behind an OpenAI-compatible API.")(serve)
    keys = typer.Typer(help="API keys of the server.", no_args_is_help=True)
    keys.command("new", help="Make a key; it is shown this once.")(keys_new)
    keys.command("list", help="List the keys (never their secrets).")(keys_list)
    keys.command("revoke", help="Revoke a key; a running server obeys at once.")(keys_revoke)
    app.add_typer(keys, name="keys")


def serve(
    model: Annotated[str, typer.Argument(metavar="MODEL_DIR", help="A tuned model's directory.")],
    policy: Annotated[
        Path, typer.Option("--policy", metavar="FILE", help="Dial policy; `example` is shipped.")
    ],
    keys: Annotated[
        Path | None,
        typer.Option(
            "--keys", metavar="FILE", help="Keys file.", show_default="EQUIPOISE_KEYS, or a new key"
        ),
    ] = None,
    host: Annotated[str, typer.Option("--host", help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535)] = 8000,
    name: Annotated[
        str, typer.Option("--name", help="Name in the API.", show_default="the directory's")
    ] = "",
    slots: Annotated[int, typer.Option("--slots", min=1, help="Completions sampled at once.")] = 16,
    allow_host: Annotated[
        list[str] | None,
        typer.Option("--allow-host", metavar="NAME", help="A further Host header to serve."),
    ] = None,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            "--cors-origin",
            metavar="ORIGIN",
            help="Pages of this origin (https://app.example.org) may call it; may be repeated.",
            show_default="none",
        ),
    ] = None,
    content_log: Annotated[
        Path | None,
        typer.Option("--content-log", metavar="FILE", help="Log prompts and completions here."),
    ] = None,
    content_log_days: Annotated[
        int, typer.Option("--content-log-days", min=1, help="Nothing in it gets older.")
    ] = 30,
    score: Annotated[
        bool, typer.Option("--score", help="Score every answer; allows best_of in requests.")
    ] = False,
    run: Annotated[
        Path | None,
        typer.Option(
            "--run",
            metavar="RUN",
            help="Where --score finds the reward models.",
            show_default="the run that MODEL_DIR lies in",
        ),
    ] = None,
    drain_seconds: Annotated[
        int, typer.Option("--drain-seconds", min=1, help="Time to finish on SIGTERM.")
    ] = 30,
    debug: DebugOption = False,
) -> None:
    """Serve a tuned model."""
    need_extra()
    from equipoise.models.load import load_causal
    from equipoise.pipeline.runner import quieten
    from equipoise.policy.file import find_policy
    from equipoise.policy.keys import environment_keys
    from equipoise.serve.http import listening
    from equipoise.serve.main import ServeOptions, check_start
    from equipoise.serve.main import serve as run_server

    options = ServeOptions(
        policy=find_policy(policy),
        keys=keys,
        environment_keys=environment_keys() if keys is None else (),
        host=host,
        port=port,
        name=name,
        slots=slots,
        allow_hosts=tuple(allow_host or ()),
        cors_origins=tuple(cors_origin or ()),
        content_log=content_log,
        content_log_days=content_log_days,
        drain_seconds=drain_seconds,
    )
    check_start(options)
    with listening(options.host, options.port):
        pass  # a port that is taken is known now, not when a large model has been loaded
    quieten()
    loaded, scorer = load_causal(model), None
    if score and loaded.manifest is not None:
        from equipoise.serve.scorer import load_scorer

        scorer = load_scorer(Path(model), loaded.manifest, run=run)
    run_server(options, loaded, Path(model).resolve().name, scorer)


def keys_new(
    name: Annotated[str, typer.Argument(help="Whose key it is, for you to remember.")],
    keys: KeysOption,
    scenario: Annotated[
        list[str] | None,
        typer.Option(
            "--scenario",
            help="A scenario it may use; the first is its default.",
            show_default="the policy's default scenario only",
        ),
    ] = None,
    range_: Annotated[
        list[str] | None,
        typer.Option("--range", metavar="DIAL=MIN:MAX", help="Narrow a dial for this key."),
    ] = None,
    requests_per_minute: Annotated[
        int | None, typer.Option("--requests-per-minute", min=1, show_default="the policy's")
    ] = None,
    content_log: Annotated[
        bool, typer.Option(help="Whether its texts may stand in a content log.")
    ] = True,
    debug: DebugOption = False,
) -> None:
    """Make a key."""
    import datetime
    import secrets

    from pydantic import ValidationError

    from equipoise.errors import ConfigError
    from equipoise.policy.file import validation_fault
    from equipoise.policy.keys import add_key, digest, new_secret
    from equipoise.policy.rules import Key

    secret = new_secret()
    try:
        key = Key(
            id=secrets.token_hex(4),
            name=name,
            sha256=digest(secret),
            scenarios=tuple(scenario or ()),
            ranges=dict(_range(item) for item in range_ or ()),
            requests_per_minute=requests_per_minute,
            content_log=content_log,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        )
    except ValidationError as error:
        raise ConfigError(
            "no key was made",
            why="; ".join(validation_fault(item) for item in error.errors(include_url=False)),
            fix="`equipoise keys new --help` says what a key holds",
        ) from None
    add_key(keys, key)
    print(f"key {key.id}; it is shown this once, only its hash is kept:", file=sys.stderr)
    print(secret)


def keys_list(keys: KeysOption, debug: DebugOption = False) -> None:
    """List the keys."""
    from equipoise.policy.keys import read_keys

    for key in read_keys(keys):
        state = "revoked" if key.revoked else "active"
        scenarios = ",".join(key.scenarios) or "(default)"
        ranges = " ".join(f"{dial}={r.min:g}:{r.max:g}" for dial, r in key.ranges.items())
        print(f"{key.id}  {state:<7}  {key.created}  {scenarios}  {ranges}  {key.name}")


def keys_revoke(
    key_id: Annotated[str, typer.Argument(metavar="ID", help="See `equipoise keys list`.")],
    keys: KeysOption,
    debug: DebugOption = False,
) -> None:
    """Revoke a key."""
    from equipoise.policy.keys import revoke_key

    print(f"revoked {revoke_key(keys, key_id).id}")


def _range(item: str) -> tuple[str, Range]:
    from equipoise.errors import ConfigError
    from equipoise.policy.rules import Range

    dial, equals, ends = item.partition("=")
    low, colon, high = ends.partition(":")
    try:
        if not (dial and equals and colon):
            raise ValueError("the form is DIAL=MIN:MAX")
        return dial, Range(min=float(low), max=float(high))
    except ValueError as error:
        raise ConfigError(
            f"--range {item} cannot be used",
            why=str(error).splitlines()[0],
            fix="for instance: --range safety=0.5:1",
        ) from None


def need_extra() -> None:
    """Say how to install what the server needs, if it is not there."""
    from importlib.util import find_spec

    from equipoise.errors import ConfigError

    missing = [
        name for name in ("starlette", "uvicorn", "prometheus_client") if find_spec(name) is None
    ]
    if missing:
        raise ConfigError(
            "the server's packages are not installed",
            why=f"{' and '.join(missing)} cannot be imported",
            fix='pip install -c constraints.txt "equipoise[serve]"',
        )
