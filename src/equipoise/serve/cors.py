"""Pages of other origins: those that the operator lists may read answers, no others (CORS).

Browsers ask first, without a key (a preflight), and learn only which methods and headers a route
takes. What a key may do does not depend on any of this.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING

from equipoise.errors import ConfigError

if TYPE_CHECKING:
    from starlette.routing import Route
    from starlette.types import Scope

Headers = list[tuple[bytes, bytes]]

_ORIGIN = re.compile(
    r"(?P<scheme>[a-z][a-z0-9+.-]*)://([a-z0-9_-]+(\.[a-z0-9_-]+)*|\[[0-9a-f:.]+\])"
    r"(:(?P<port>[1-9][0-9]{0,4}))?"
)
_DEFAULT_PORTS = {"http": 80, "https": 443}
_REQUEST_HEADER = re.compile(
    # What browsers may always send, our key, and what OpenAI's JavaScript client sends beside it.
    r"accept|accept-language|content-language|content-type|authorization"
    r"|openai-organization|openai-project|x-stainless-[a-z-]+"
)
_EXPOSED = (
    b"x-request-id, x-dial-requested, x-dial-effective, x-dial-scenario, x-dial-policy, "
    b"x-dial-model, retry-after"
)
_PREFLIGHT_SECONDS = b"600"


def check_origin(origin: str) -> None:
    """Refuse what no browser sends as an origin, or what stands for many.

    Raises:
        ConfigError: It is not scheme://host[:port] as browsers write it.
    """
    found = _ORIGIN.fullmatch(origin)
    port = int(found["port"] or 0) if found else 0
    if origin == "*":
        why = "`*` would let every page read answers; each origin is listed"
    elif origin == "null":
        why = "`null` is what many pages send (files, sandboxed frames), so it names none of them"
    elif found is None or port > 65535:
        why = "an origin is scheme://host or scheme://host:port in lower case, with nothing behind"
    elif port == _DEFAULT_PORTS.get(found["scheme"]):
        why = "browsers leave the scheme's own port out, so this would never be met"
    else:
        return
    raise ConfigError(
        f"{origin!r} cannot be an origin of pages",
        why=why,
        fix="for instance: --cors-origin https://app.example.org --cors-origin http://localhost:3000",
    )


class Cors:
    """What pages of listed origins get beside the answer.

    Args:
        origins: See :func:`check_origin`.
        routes: All that there are.
    """

    def __init__(self, origins: Iterable[str], routes: Iterable[Route]) -> None:
        self._origins = frozenset(origin.encode("ascii") for origin in origins)
        self._routes = tuple(routes)

    def headers(self, scope: Scope) -> Headers:
        """Return what is added to every response, refusals too."""
        vary, origin = (b"vary", b"Origin"), self._listed(scope)
        if origin is None:
            return [vary]
        allowed = (b"access-control-allow-origin", origin)
        return [vary, allowed, (b"access-control-expose-headers", _EXPOSED)]

    def preflight(self, scope: Scope) -> Headers | None:
        """Return the headers that answer a preflight, or ``None`` where it is none, or not allowed.

        Only for a listed origin, a method that the route has, and headers that clients send.
        """
        if scope["method"] != "OPTIONS" or self._listed(scope) is None:
            return None
        found = [route for route in self._routes if route.path_regex.match(scope["path"])]
        methods = [method for route in found for method in sorted(route.methods or ())]
        if _asked(scope, b"method") not in ([method] for method in methods):
            return None
        names = [name.lower() for name in _asked(scope, b"headers")]
        if not all(_REQUEST_HEADER.fullmatch(name) for name in names):
            return None
        return [
            (b"access-control-allow-methods", ", ".join(methods).encode("ascii")),
            (b"access-control-allow-headers", ", ".join(names).encode("ascii")),
            (b"access-control-max-age", _PREFLIGHT_SECONDS),
        ]

    def _listed(self, scope: Scope) -> bytes | None:
        values = _all(scope, b"origin")
        return values[0] if len(values) == 1 and values[0] in self._origins else None


def _all(scope: Scope, name: bytes) -> list[bytes]:
    return [value for one, value in scope["headers"] if one == name]


def _asked(scope: Scope, what: bytes) -> list[str]:
    values = _all(scope, b"access-control-request-" + what)
    names = [name.strip() for value in values for name in value.decode("latin-1").split(",")]
    return [name for name in names if name]
