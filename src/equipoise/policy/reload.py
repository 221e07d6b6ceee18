"""The rules in force: policy and keys as one immutable snapshot, replaced whole on a change.

The files are looked at before each request (two ``stat`` calls), so a revoked key is refused at
once and no request sees half of an old policy and half of a new one. A broken file puts nothing in
force: requests are refused with 503 until it is repaired. The last good rules are *not*
kept, as they may be just what the operator is trying to take away.

A policy that is being written may be usable YAML already and lack its last ranges. One that ends
with the line ``...`` is taken at once; any other once it has lain unchanged for two seconds.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from equipoise.dials.dials import Dials
from equipoise.errors import ConfigError, EquipoiseError
from equipoise.policy.decide import Server
from equipoise.policy.file import find_policy, is_closed, parse_policy, read_policy
from equipoise.policy.keys import read_keys
from equipoise.policy.rules import DialPolicy, Key
from equipoise.types import Rendering

_log = logging.getLogger("equipoise.serve")

_SETTLED_NS = 100_000_000
"""A file changed less than this before it was read may change again within one clock tick."""
_WRITTEN_NS = 2_000_000_000
"""A policy without an end mark that is younger than this may still be being written."""

_Stamp = tuple[tuple[int, ...] | None, ...]


@dataclass(frozen=True)
class Rules:
    """One consistent state of policy and keys."""

    policy: DialPolicy
    policy_hash: str
    rendering: Rendering
    """What the chat template is given besides the turns."""
    keys: tuple[Key, ...]
    server: Server


class RulesSource:
    """Reads policy and keys, and reads them again when their files change.

    Args:
        policy: Policy file.
        keys: Keys file, or ``None`` for the fixed keys alone.
        dials: The model's.
        fixed_keys: Keys that are in no file (of the environment, or made for this start).
        now_ns: Clock of the files.
        fits: Raises ConfigError if a policy does not fit the model's chat template.
    """

    def __init__(
        self,
        policy: Path,
        keys: Path | None,
        *,
        dials: Dials,
        fixed_keys: tuple[Key, ...] = (),
        now_ns: Callable[[], int] = time.time_ns,
        fits: Callable[[DialPolicy], object] = lambda _: None,
    ) -> None:
        self._policy, self._keys = policy, keys
        self._dials = dials
        self.fixed_keys, self._now_ns, self._fits = fixed_keys, now_ns, fits
        self._stamp: _Stamp | None = None
        self._first = _stamp(policy)
        """What lay there at the start is what the operator started the server with."""
        self._rules: Rules | None = None
        self._lost: set[tuple[str, str]] = set()
        """Of the rules last in force: key id and a scenario of the key that the policy lacks."""

    def current(self) -> Rules | None:
        """Return the rules in force, or ``None`` if there are none; never raises."""
        stamp = self._stamps()
        if stamp != self._stamp:
            # Before reading: a change while reading gives another stamp the next time.
            self._stamp = stamp if self._is_settled(stamp) else None
            # Whatever happens while reading, the old rules are gone.
            before, self._rules = self._rules, None
            try:
                self._rules, closed = self._read()
            except Exception as error:
                what = error.what if isinstance(error, EquipoiseError) else type(error).__name__
                _log.error("no dial policy in force: %s", what)
                return None
            if not closed and self._is_being_written(stamp[0]):
                _log.error("no dial policy in force: it is new and does not end with a line `...`")
                self._stamp = self._rules = None
                return None
            if before is None or before.policy_hash != self._rules.policy_hash:
                _log.info("dial policy %s in force", self._rules.policy_hash[:12])
            self._warn_of_lost_scenarios(self._rules)
        return self._rules

    def reload(self) -> None:
        """Read both files again at the next request, changed or not (SIGHUP)."""
        self._stamp = None

    def read(self) -> Rules:
        """Read both files.

        Raises:
            ConfigError: One of them is missing or broken, others may write to it, or a key names an
                unknown dial.
        """
        return self._read()[0]

    def _read(self) -> tuple[Rules, bool]:
        """Return the rules, and whether the policy has an end mark."""
        data = read_policy(self._policy, owned=True)
        name = find_policy(self._policy).name
        policy = parse_policy(data, self._dials, file=name)
        self._fits(policy)
        keys = (*(read_keys(self._keys) if self._keys is not None else ()), *self.fixed_keys)
        for key in keys:
            unknown = sorted(set(key.ranges) - set(self._dials.attributes))
            if unknown:
                # A misspelt range would narrow nothing.
                raise ConfigError(
                    f"key {key.id} has a range for an unknown dial",
                    why=f"the dials are {', '.join(self._dials.attributes)}",
                    fix="make the key anew with `equipoise keys new --range DIAL=MIN:MAX`",
                )
        server = Server(self._dials, policy.server, policy.round_up)
        return Rules(policy, policy.hash, policy.rendering, keys, server), is_closed(data)

    def _warn_of_lost_scenarios(self, rules: Rules) -> None:
        """Log each once; no error, as a policy may well drop a scenario that keys still name."""
        lost = {
            (key.id, name)
            for key in rules.keys
            if not key.revoked
            for name in key.scenarios
            if name not in rules.policy.scenarios
        }
        text = "key %s: the policy has no scenario %s; what it asks for there gets 404"
        for key_id, name in sorted(lost - self._lost):
            _log.warning(text, key_id, name)
        self._lost = lost

    def _stamps(self) -> _Stamp:
        return tuple(_stamp(path) for path in (self._policy, self._keys) if path is not None)

    def _is_being_written(self, stamp: tuple[int, ...] | None) -> bool:
        if stamp is None or stamp == self._first:
            return False
        return self._now_ns() - max(stamp[:2]) < _WRITTEN_NS

    def _is_settled(self, stamps: _Stamp) -> bool:
        now = self._now_ns()
        return all(stamp is None or now - stamp[0] > _SETTLED_NS for stamp in stamps)


def _stamp(path: Path) -> tuple[int, ...] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino, status.st_mode
