"""The rules in force: policy and keys as one immutable snapshot, replaced whole on a change.

The files are looked at before each request (two ``stat`` calls), so a revoked key is refused at
once and no request sees half of an old policy and half of a new one. A broken file puts nothing in
force: requests are refused with 503 until it is repaired. The last good rules are *not*
kept, as they may be just what the operator is trying to take away.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from equipoise.dials.dial_policy import DialPolicy, Key, Server
from equipoise.dials.policy_file import load_policy
from equipoise.errors import ConfigError, EquipoiseError
from equipoise.serve.keys import read_keys

_log = logging.getLogger("equipoise.serve")

_SETTLED_NS = 100_000_000
"""A file changed less than this before it was read may change again within one clock tick."""

_Stamp = tuple[tuple[int, ...] | None, ...]


@dataclass(frozen=True)
class Rules:
    """One consistent state of policy and keys."""

    policy: DialPolicy
    policy_hash: str
    keys: tuple[Key, ...]
    server: Server


class RulesSource:
    """Reads policy and keys, and reads them again when their files change.

    Args:
        policy: Policy file.
        keys: Keys file, or ``None`` for the fixed keys alone.
        attributes: The model's attributes.
        levels: L.
        fixed_keys: Keys that are in no file (the one made for this start of the server).
        now_ns: Clock of the files.
    """

    def __init__(
        self,
        policy: Path,
        keys: Path | None,
        *,
        attributes: tuple[str, ...],
        levels: int,
        fixed_keys: tuple[Key, ...] = (),
        now_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        self._policy, self._keys = policy, keys
        self._attributes, self._levels = attributes, levels
        self._fixed, self._now_ns = fixed_keys, now_ns
        self._stamp: _Stamp | None = None
        self._rules: Rules | None = None

    def current(self) -> Rules | None:
        """Return the rules in force, or ``None`` if there are none; never raises."""
        stamp = self._stamps()
        if stamp != self._stamp:
            # Before reading: a change while reading gives another stamp the next time.
            self._stamp = stamp if self._is_settled(stamp) else None
            try:
                rules = self.read()
            except EquipoiseError as error:
                _log.error("no dial policy in force: %s", error.what)
                self._rules = None
            else:
                if self._rules is None or rules.policy_hash != self._rules.policy_hash:
                    _log.info("dial policy %s in force", rules.policy_hash[:12])
                self._rules = rules
        return self._rules

    def reload(self) -> None:
        """Read both files again at the next request, changed or not (SIGHUP)."""
        self._stamp = None

    def read(self) -> Rules:
        """Read both files.

        Raises:
            ConfigError: One of them is missing or broken, or a key names an unknown dial.
        """
        policy = load_policy(self._policy, self._attributes, self._levels)
        keys = (*(read_keys(self._keys) if self._keys is not None else ()), *self._fixed)
        for key in keys:
            unknown = sorted(set(key.ranges) - set(self._attributes))
            if unknown:
                # A misspelt range would narrow nothing.
                raise ConfigError(
                    f"key {key.id} has a range for an unknown dial",
                    why=f"the dials are {', '.join(self._attributes)}",
                    fix="make the key anew with `equipoise keys new --range DIAL=MIN:MAX`",
                )
        server = Server(self._attributes, self._levels, policy.server, policy.round_up)
        return Rules(policy, policy.hash, keys, server)

    def _stamps(self) -> _Stamp:
        return tuple(_stamp(path) for path in (self._policy, self._keys) if path is not None)

    def _is_settled(self, stamps: _Stamp) -> bool:
        now = self._now_ns()
        return all(stamp is None or now - stamp[0] > _SETTLED_NS for stamp in stamps)


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino, status.st_mode
