"""What is sent back: the bodies of answers and of refusals, OpenAI-shaped.

A refusal holds no path, no traceback and no text of the request.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from equipoise.dials.dials import Dials
from equipoise.types import DialSetting, Finish, Judged

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
        other = "server_error" if self.status >= 500 else "invalid_request_error"
        kind = _KINDS.get(self.status, other)
        named = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": named}


def bad_request(
    message: str, *, param: str | None = None, code: str = "invalid_request"
) -> RefusedError:
    """Return the refusal of a request that cannot be used as it is."""
    return RefusedError(400, message, code=code, param=param)


def no_such_model() -> RefusedError:
    """Return one refusal for all: a key learns of no scenario that it may not use."""
    return RefusedError(
        404,
        "this key has no such model; GET /v1/models lists what it has",
        code="model_not_found",
        param="model",
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


def in_words(setting: DialSetting, dials: Dials) -> dict[str, Any]:
    """Return a setting as answers spell it: ``auto``, or level and dial value."""
    top = dials.levels - 1
    return {
        attribute: "auto" if k is None else {"level": k, "value": round(k / top, 6)}
        for attribute, k in zip(dials.attributes, setting.levels, strict=True)
    }


@dataclass
class Choice(Judged):
    """One completion, while it is sampled and when it is finished."""

    text: str = ""
    finish: Finish = "length"
    n_tokens: int = 0
    n_thought: int = 0
    """Of the tokens, those of thoughts."""
    measured: Mapping[str, float] | None = None
    """Attribute to measured unit score; ``None`` where the server does not score."""

    def scores(self) -> dict[str, Any]:
        """Return the field of the body that holds the scores, if there are any."""
        return {} if self.measured is None else {"measured": dict(self.measured)}


@dataclass(frozen=True)
class Envelope:
    """What all bodies of one answer have in common: what was asked for, what applied, and why."""

    id: str
    created: int
    """Unix seconds."""
    model: str
    requested: Mapping[str, Any]
    """Dials as the request names them."""
    effective: Mapping[str, Any]
    """Attribute to ``{"level": k, "value": v}`` or ``"auto"``."""
    scenario: str
    policy_hash: str
    model_hash: str
    prompt_tokens: int

    def applied(self) -> dict[str, Any]:
        """Return the fields of a body that say which dials were applied, and by which rules."""
        return {
            "dials": {
                "requested": dict(self.requested),
                "effective": dict(self.effective),
                "scenario": self.scenario,
            },
            "policy_hash": self.policy_hash,
            "model_hash": self.model_hash,
        }

    def headers(self) -> dict[bytes, bytes]:
        """Return the headers of an answer that say what was asked for and what was applied."""

        def compact(value: Mapping[str, Any]) -> bytes:
            return json.dumps(dict(value), separators=(",", ":"), sort_keys=True).encode("ascii")

        return {
            b"x-dial-requested": compact(self.requested),
            b"x-dial-effective": compact(self.effective),
            b"x-dial-scenario": self.scenario.encode("ascii"),
        }

    def logged(self) -> dict[str, Any]:
        """Return the fields of the line of the log; none holds a text."""
        return {
            "requested": dict(self.requested),
            "effective": dict(self.effective),
            "scenario": self.scenario,
            "policy": self.policy_hash[:12],
            "model": self.model_hash[:12],
            "prompt_tokens": self.prompt_tokens,
        }

    def completion(self, given: Sequence[Choice], sampled: Sequence[Choice]) -> dict[str, Any]:
        """Return the body of an answer that is not streamed; all that were sampled are counted."""
        return {
            **self._head("chat.completion"),
            "choices": [
                {
                    "index": index,
                    "message": {"role": "assistant", "content": choice.text, "refusal": None},
                    "finish_reason": choice.finish,
                    "logprobs": None,
                    **choice.scores(),
                }
                for index, choice in enumerate(given)
            ],
            "usage": self._usage(sampled),
            **self.applied(),
        }

    def chunk(
        self, index: int, delta: Mapping[str, str], done: Choice | None = None
    ) -> dict[str, Any]:
        """Return one event of a stream; the first and the last of a choice carry the dials."""
        choice: dict[str, Any] = {
            "index": index,
            "delta": dict(delta),
            "finish_reason": done and done.finish,
            "logprobs": None,
            **(done.scores() if done else {}),
        }
        body = {**self._head("chat.completion.chunk"), "choices": [choice]}
        carries = "role" in delta or done is not None
        return {**body, **self.applied()} if carries else body

    def usage_chunk(self, sampled: Sequence[Choice]) -> dict[str, Any]:
        """Return the event of a stream that holds its costs."""
        head = self._head("chat.completion.chunk")
        return {**head, "choices": [], "usage": self._usage(sampled)}

    def _usage(self, sampled: Sequence[Choice]) -> dict[str, Any]:
        n_tokens = sum(choice.n_tokens for choice in sampled)
        n_thought = sum(choice.n_thought for choice in sampled)
        details = {"completion_tokens_details": {"reasoning_tokens": n_thought}}
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": n_tokens,
            "total_tokens": self.prompt_tokens + n_tokens,
            **(details if n_thought else {}),
        }

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": f"eq-{self.model_hash[:12]}",
        }
