"""What a client is told when it gets no answer: OpenAI-shaped, without paths or tracebacks."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

_KINDS = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    429: "rate_limit_error",
}


class RefusedError(Exception):
    """A request that ends with an error.

    Args:
        status: HTTP status.
        message: For the client; says what is allowed, quotes no text of the request.
        code: Machine-readable name, stable across versions.
        param: The field at fault.
        headers: Further response headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(code)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.headers = dict(headers or {})

    def body(self) -> dict[str, Any]:
        """Return the error as OpenAI's clients expect it."""
        kind = _KINDS.get(
            self.status, "server_error" if self.status >= 500 else "invalid_request_error"
        )
        return {
            "error": {
                "message": self.message,
                "type": kind,
                "param": self.param,
                "code": self.code,
            }
        }


def bad_request(
    message: str, *, param: str | None = None, code: str = "invalid_request"
) -> RefusedError:
    """Return the refusal of a request that cannot be used as it is."""
    return RefusedError(400, message, code=code, param=param)


def internal_error() -> RefusedError:
    """Return what a client is told of a fault of ours: nothing."""
    return RefusedError(500, "a fault of the server", code="internal_error")


def not_ready() -> RefusedError:
    """Return the refusal of a server that is stopping, or whose engine has died."""
    return RefusedError(
        503, "no answers are given now", code="not_ready", headers={"retry-after": "5"}
    )


def not_scored() -> RefusedError:
    """Return the refusal where answers must be scored, and there are no scores."""
    return RefusedError(
        503,
        "the answer could not be scored, so it is not given; its content was not the reason",
        code="scorer_unavailable",
    )


def json_bytes(value: Any) -> bytes:
    """Return JSON in ASCII: a lone surrogate in it cannot break the response."""
    return json.dumps(value, ensure_ascii=True, separators=(",", ":"), allow_nan=False).encode()


def quoted(name: object) -> str:
    """Return a name that the client sent, short and printable, for use in a message."""
    text = ascii(str(name))
    return text if len(text) <= 66 else text[:63] + "...'"


def as_name(name: str) -> str:
    """Return the name of a field as it is where it can be one, else :func:`quoted`."""
    return name if name.isidentifier() and len(name) <= 64 else quoted(name)
