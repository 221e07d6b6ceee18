"""Starting the server: what is refused before it listens, and how it stops."""

from __future__ import annotations

import ipaddress
import logging
import os
import re
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from equipoise.engine.batcher import ContinuousBatcher
from equipoise.errors import ConfigError, ModelError
from equipoise.models.limits import positions
from equipoise.policy.keys import digest, new_secret
from equipoise.policy.reload import RulesSource
from equipoise.policy.rules import DialPolicy, Key
from equipoise.serve.app import Api, build_app
from equipoise.serve.content_log import ContentLog
from equipoise.serve.cors import check_origin
from equipoise.serve.http import listening, run_app
from equipoise.serve.prepare import ServedModel

if TYPE_CHECKING:
    from equipoise.models.load import LoadedPolicy
    from equipoise.serve.scorer import LiveScorer

LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})


@dataclass(frozen=True)
class ServeOptions:
    """What ``equipoise serve`` was asked for."""

    policy: Path
    keys: Path | None
    environment_keys: tuple[Key, ...] = ()
    """Keys for the whole life of the server; see :func:`equipoise.policy.keys.environment_keys`."""
    host: str = "127.0.0.1"
    port: int = 8000
    name: str = ""
    """Name of the model in the API; by default that of its directory."""
    slots: int = 16
    allow_hosts: tuple[str, ...] = ()
    cors_origins: tuple[str, ...] = ()
    """Origins of pages that may read answers; see :mod:`equipoise.serve.cors`."""
    content_log: Path | None = None
    content_log_days: int = 30
    drain_seconds: int = 30


def check_start(options: ServeOptions) -> None:
    """Refuse to listen where strangers are without keys of the operator's own.

    Raises:
        ConfigError: The address is not a loopback one, and there are no keys; or an origin is none.
    """
    for origin in options.cors_origins:
        check_origin(origin)
    if options.keys is None and not options.environment_keys and not _is_loopback(options.host):
        raise ConfigError(
            f"refusing to listen on {options.host} without keys",
            why="others can reach this address, and the key of a single start is for this machine",
            fix="make keys (`equipoise keys new NAME --keys FILE`) and pass --keys FILE",
        )


def allowed_hosts(options: ServeOptions) -> frozenset[str]:
    """Return the values of the Host header that are served."""
    named = {host.lower().strip("[]") for host in (options.host, *options.allow_hosts)}
    return frozenset(named - {"0.0.0.0", "::"}) | LOCAL_HOSTS


def served_model(loaded: LoadedPolicy, name: str, *, scored: bool = False) -> ServedModel:
    """Return what the server needs to know of a loaded model.

    Args:
        loaded: The model.
        name: In the API.
        scored: Whether answers are scored.

    Raises:
        ModelError: The model has no dials.
        ConfigError: The name cannot stand in the API.
    """
    if loaded.manifest is None:
        raise ModelError(
            "this model has no dials",
            why="its directory holds no dials.json",
            fix="tune it first: `equipoise stage tune`",
        )
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", name):
        raise ConfigError(
            f"{name!r} cannot be a model name",
            why="names are letters, digits, `.`, `_` and `-`, at most 64; `@` parts the scenario",
            fix="pass --name",
        )
    config = loaded.model.config.get_text_config()
    return ServedModel(
        name=name,
        hash=loaded.hash,
        encoder=loaded.encoder,
        dials=loaded.manifest.dials,
        vocab_size=min(len(loaded.tokenizer), int(config.vocab_size)),
        context=positions(config) or 1 << 30,
        scored=scored,
    )


def check_policy(model: ServedModel, policy: DialPolicy) -> None:
    """Hold a policy against what only the model decides: variables of its template, its thoughts.

    Raises:
        ConfigError: The two do not fit.
    """
    limits = policy.limits
    each = limits.max_prompt_tokens + limits.max_tokens + limits.max_thought_tokens
    tokens = limits.choices * each
    # The same rule as for answers alone, which the policy file is read by.
    if model.encoder.with_rendering(policy.rendering).thinks and tokens > limits.waiting_tokens:
        raise ConfigError(
            "waiting_tokens is too small for a model that thinks",
            why=f"a request of {limits.choices} choices takes up to {tokens} tokens with thoughts",
            fix="raise limits.waiting_tokens, or lower max_thought_tokens or choices",
        )


def rules_source(options: ServeOptions, model: ServedModel) -> tuple[RulesSource, str | None]:
    """Return the rules and, where the operator gave no keys, the key of this start.

    Raises:
        ConfigError: Policy or keys cannot be used; the server does not start then.
    """
    source = RulesSource(
        options.policy,
        options.keys,
        dials=model.dials,
        fixed_keys=options.environment_keys,
        fits=partial(check_policy, model),
    )
    rules = source.read()
    if options.keys is not None or options.environment_keys:
        if not rules.keys:
            raise ConfigError(
                f"{options.keys} holds no keys",
                why="nobody could use the server",
                fix=f"equipoise keys new NAME --keys {options.keys}",
            )
        return source, None
    secret = new_secret()
    first = rules.policy.default_scenario
    scenarios = (first, *(name for name in rules.policy.scenarios if name != first))
    source.fixed_keys = (Key(id="this-start", sha256=digest(secret), scenarios=scenarios),)
    return source, secret


def serve(
    options: ServeOptions, loaded: LoadedPolicy, name: str, scorer: LiveScorer | None = None
) -> None:
    """Serve until SIGTERM or Ctrl-C, then finish what runs.

    Where a thread of the model or the scorer hangs then, the process ends here, with 0.

    Args:
        options: What was asked for.
        loaded: The model.
        name: Of the model, unless the options have one.
        scorer: Scores every answer.

    Raises:
        EquipoiseError: Something is wrong before the server listens.
    """
    check_start(options)
    model = served_model(loaded, options.name or name, scored=scorer is not None)
    source, secret = rules_source(options, model)
    engine = ContinuousBatcher(loaded.model, loaded.encoder, slots=options.slots)
    content_log = None
    if options.content_log is not None:
        content_log = ContentLog(options.content_log, days=options.content_log_days)
    api = Api(model, engine, content_log, scorer)
    app = build_app(
        api,
        source.current,
        hosts=allowed_hosts(options),
        cors_origins=options.cors_origins,
        drain_seconds=options.drain_seconds,
    )
    log_to_stderr()
    source.current()  # what is odd about it is to be seen now, not at the first request

    def on_stop() -> None:
        api.draining = True

    with listening(options.host, options.port) as sockets:
        _announce(options, model.name, secret)
        run_app(
            app,
            sockets=sockets,
            drain_seconds=options.drain_seconds,
            on_stop=on_stop,
            on_reload=source.reload,
        )
    if engine.lingers or (scorer is not None and scorer.lingers):
        # Given up, but still inside a library, which aborts the process if it comes back while the
        # interpreter is being taken down.
        logging.shutdown()
        sys.stderr.flush()
        os._exit(0)


def _announce(options: ServeOptions, name: str, secret: str | None) -> None:
    host = f"[{options.host}]" if ":" in options.host else options.host
    url = f"http://{host}:{options.port}"
    print(f"{name} on {url}/v1 with policy {options.policy}", file=sys.stderr)
    if secret is not None:
        # Not on stderr, which is where the log goes and from there to whoever reads logs.
        print("key of this start, shown once on standard output:", file=sys.stderr)
        print(secret, flush=True)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def log_to_stderr() -> None:
    """Write the server's log to standard error, and nowhere else."""
    log = logging.getLogger("equipoise.serve")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    log.propagate = False
