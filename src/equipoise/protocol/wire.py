"""What travels: the chat request, field by field, and the bodies that answer it.

Only what is listed here exists, beside what does nothing (:mod:`equipoise.protocol.compat`).
Token-id prompts, embeddings, templates and their arguments, adapters and the like are unknown
fields and refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, NamedTuple

from pydantic import Field, JsonValue, StringConstraints, ValidationError

from equipoise.dials.dials import Dials
from equipoise.policy.file import validation_fault
from equipoise.protocol.compat import NOT_HERE, NeutralFields, NullIsDefault, Only, Wire, Zero
from equipoise.protocol.failures import RefusedError, as_name, bad_request
from equipoise.protocol.turns import MAX_MESSAGES, ChatMessage
from equipoise.types import DialSetting, Finish, Judged

MAX_STOPS = 4
MAX_STOP_CHARACTERS = 64
MAX_BIASES = 300
_MAX_FAULTS = 5
_FORM = re.compile(r"str|constrained-str|list\[.*\]|\[key\]")

Stop = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Bias = Annotated[float, Field(ge=-100.0, le=100.0, allow_inf_nan=False)]
BiasKey = Annotated[str, StringConstraints(pattern=r"^(0|[1-9][0-9]{0,9})$")]


class StreamOptions(Wire):
    """Options of a stream."""

    include_usage: Annotated[bool, NullIsDefault()] = False
    include_obfuscation: Annotated[None, Only(False)] = None


class ChatRequest(NeutralFields):
    """The body of ``POST /v1/chat/completions``."""

    model: Annotated[str, StringConstraints(min_length=1, max_length=256)]
    """The model's name, or ``name@scenario``."""
    messages: Annotated[
        list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)
    ]
    dials: Annotated[dict[str, JsonValue], Field(max_length=64)] = Field(default_factory=dict)
    """Dial to a number in [0, 1], ``{"level": k}`` or ``"auto"``."""
    temperature: Annotated[float, Field(ge=0.0, le=2.0, allow_inf_nan=False), NullIsDefault()] = 1.0
    """0 takes the likeliest token."""
    top_p: Annotated[float, Field(ge=1e-6, le=1.0, allow_inf_nan=False), NullIsDefault()] = 1.0
    max_tokens: Annotated[int, Field(ge=1, le=10**9)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=10**9)] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS, fail_fast=True)] | None = None
    n: Annotated[int, Field(ge=1, le=16), NullIsDefault()] = 1
    best_of: Annotated[int, Field(ge=1, le=16)] | None = None
    """Sample so many and keep the ``n`` nearest the setting; for servers that score."""
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stream: Annotated[bool, NullIsDefault()] = False
    stream_options: StreamOptions | None = None
    logit_bias: Annotated[dict[BiasKey, Bias], Field(max_length=MAX_BIASES)] | None = None
    presence_penalty: Zero = None
    frequency_penalty: Zero = None

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings as a tuple."""
        given = self.stop or ()
        return (given,) if isinstance(given, str) else tuple(given)


def parse_chat(body: Any) -> ChatRequest:
    """Return the request in a parsed body.

    Raises:
        RefusedError: 400; names the fields at fault, at most five, and quotes no values.
    """
    if not isinstance(body, dict):
        raise bad_request("the body must be a JSON object")
    try:
        return ChatRequest.model_validate(body)
    except ValidationError as error:
        raise _faults(error) from None


def _faults(error: ValidationError) -> RefusedError:
    items = error.errors(include_url=False, include_context=False, include_input=False)
    unknown = [item for item in items if item["type"] in ("extra_forbidden", NOT_HERE)]
    code = "unknown_field" if unknown else "invalid_value"
    # A field of two forms reports each form's fault; names that the client chose may be anything.
    texts = dict.fromkeys(
        validation_fault({**item, "loc": _place(item["loc"])}) for item in (unknown or items)
    )
    place = (unknown or items)[0]["loc"]
    param = as_name(str(place[0])) if place else None
    return bad_request("; ".join(list(texts)[:_MAX_FAULTS]), param=param, code=code)


def _place(parts: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """Return a place in the body, without the names that pydantic gives to the forms of a field."""
    kept = (p for p in parts if isinstance(p, int) or not _FORM.fullmatch(p))
    return tuple(part if isinstance(part, int) else as_name(part) for part in kept)


def in_words(setting: DialSetting, dials: Dials) -> dict[str, Any]:
    """Return a setting as answers spell it: ``auto``, or level and dial value."""
    return {
        attribute: "auto" if k is None else {"level": k, "value": round(k / (dials.levels - 1), 6)}
        for attribute, k in zip(dials.attributes, setting.levels, strict=True)
    }


@dataclass(frozen=True)
class Applied:
    """What was asked for, what was applied, and by which rules; part of every answer."""

    requested: Mapping[str, Any]
    effective: Mapping[str, Any]
    """Attribute to ``{"level": k, "value": v}`` or ``"auto"``."""
    scenario: str
    policy_hash: str
    model_hash: str

    def fields(self) -> dict[str, Any]:
        """Return the fields of the body."""
        return {
            "dials": {
                "requested": dict(self.requested),
                "effective": dict(self.effective),
                "scenario": self.scenario,
            },
            "policy_hash": self.policy_hash,
            "model_hash": self.model_hash,
        }


@dataclass(frozen=True)
class Choice(Judged):
    """One finished completion."""

    text: str
    finish: Finish
    n_tokens: int
    measured: Mapping[str, float] | None = None
    """Attribute to measured unit score; ``None`` where the server does not score."""
    n_thought: int = 0
    """Of the tokens, those of thoughts."""

    def scores(self) -> dict[str, Any]:
        """Return the field of the body that holds the scores, if there are any."""
        return {} if self.measured is None else {"measured": dict(self.measured)}


class Spent(NamedTuple):
    """Tokens sampled in all, also for choices that are not given."""

    tokens: int
    thought: int
    """Of these, those of thoughts."""


@dataclass(frozen=True)
class Envelope:
    """What all bodies of one answer have in common."""

    id: str
    created: int
    model: str
    applied: Applied
    prompt_tokens: int

    def completion(self, choices: Sequence[Choice], spent: Spent) -> dict[str, Any]:
        """Return the body of an answer that is not streamed; ``choices`` are those given."""
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
                for index, choice in enumerate(choices)
            ],
            "usage": self.usage(spent),
            **self.applied.fields(),
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
        return {**body, **self.applied.fields()} if carries else body

    def usage_chunk(self, spent: Spent) -> dict[str, Any]:
        """Return the event of a stream that holds its costs."""
        return {
            **self._head("chat.completion.chunk"),
            "choices": [],
            "usage": self.usage(spent),
        }

    def usage(self, spent: Spent) -> dict[str, Any]:
        """Return the token counts."""
        details = {"completion_tokens_details": {"reasoning_tokens": spent.thought}}
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": spent.tokens,
            "total_tokens": self.prompt_tokens + spent.tokens,
            **(details if spent.thought else {}),
        }

    def _head(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": f"eq-{self.applied.model_hash[:12]}",
        }
