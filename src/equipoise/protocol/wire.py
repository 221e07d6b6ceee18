"""The chat request, field by field, out of JSON that two readers would read alike.

Only what is listed here exists, beside what does nothing (:mod:`equipoise.protocol.compat`).
Token-id prompts, embeddings, templates and their arguments, adapters and the like are unknown
fields and refused by name. Two keys of one name are where a check and its use part ways: one sees
the first, one the last. Numbers beyond floats are kept as infinities, so that the field they stand
in can name its range.
"""

from __future__ import annotations

import json
import re
from typing import Annotated, Any, Literal

from pydantic import (
    ConfigDict,
    Field,
    JsonValue,
    StringConstraints,
    ValidationError,
    model_validator,
)

from equipoise.policy.file import validation_fault
from equipoise.protocol.compat import (
    ANSWER_FIELDS,
    NOT_HERE,
    Label,
    NeutralFields,
    NullIsDefault,
    Only,
    Wire,
    Zero,
)
from equipoise.protocol.replies import RefusedError, as_name, bad_request, quoted
from equipoise.types import Message

MAX_MESSAGES = 256
"""Turns of a request, and parts of a turn."""
MAX_STOPS = 4
MAX_STOP_CHARACTERS = 64
MAX_BIASES = 300
MAX_DEPTH = 32
MAX_KEYS = 512
"""Of one object. Each key of too many would be a fault of its own, at a kilobyte and more."""
_MAX_DIGITS = 4000
"""Python refuses to parse longer integers."""
_MAX_FAULTS = 5
_FORM = re.compile(r"str|constrained-str|list\[.*\]|\[key\]")

Stop = Annotated[str, StringConstraints(min_length=1, max_length=MAX_STOP_CHARACTERS)]
Bias = Annotated[float, Field(ge=-100.0, le=100.0, allow_inf_nan=False)]
BiasKey = Annotated[str, StringConstraints(pattern=r"^(0|[1-9][0-9]{0,9})$")]


class TextPart(Wire):
    """A piece of a message; pieces are joined as they are."""

    type: Literal["text"]
    text: str
    prompt_cache_breakpoint: Annotated[None, Only()] = None


def _declare_unsaid(schema: dict[str, Any]) -> None:
    schema["properties"] |= {name: only.schema() for name, only in ANSWER_FIELDS.items()}


class ChatMessage(Wire):
    """One turn. All of it is untrusted, the assistant's turns too."""

    model_config = ConfigDict(json_schema_extra=_declare_unsaid)

    role: Literal["system", "developer", "user", "assistant"]
    """``developer`` is another word for ``system``."""
    content: (
        str
        | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    )
    name: Label = None
    type: Literal["text"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _without_the_unsaid(cls, turn: Any) -> Any:
        # An answer can be appended to the messages as it came; what says something stays unknown.
        if not isinstance(turn, dict):
            return turn
        unsaid = ANSWER_FIELDS if turn.get("role") == "assistant" else {}
        return {
            name: value
            for name, value in turn.items()
            if not (name in unsaid and unsaid[name].takes(value))
            and not (name == "content" and value is None)
        }

    def plain(self) -> Message:
        """Return the turn as the encoder takes it."""
        role = "system" if self.role == "developer" else self.role
        if isinstance(self.content, str):
            return Message(role, self.content)
        return Message(role, "".join(part.text for part in self.content))


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


def parse_chat(body: bytes) -> ChatRequest:
    """Return the request in a body.

    Raises:
        RefusedError: 400; names the fields at fault, at most five, and quotes no values.
    """
    plain = _json_value(body)
    if not isinstance(plain, dict):
        raise bad_request("the body must be a JSON object")
    try:
        return ChatRequest.model_validate(plain)
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


def _json_value(body: bytes) -> Any:
    """Return what a body holds; refuse what is no JSON, too deep, or names a key twice."""
    try:
        value = json.loads(body.decode("utf-8"), object_pairs_hook=_object, parse_int=_integer)
        if _depth(value) <= MAX_DEPTH:
            return value
    except RecursionError:
        pass
    except UnicodeDecodeError:
        raise bad_request("the body is not UTF-8", code="invalid_json") from None
    except json.JSONDecodeError as error:
        why = f"{error.msg} at character {error.pos}"
        raise bad_request(f"the body is not JSON: {why}", code="invalid_json") from None
    raise bad_request(f"the body nests deeper than {MAX_DEPTH}", code="too_deep")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(pairs) > MAX_KEYS:
        raise bad_request(f"an object holds more than {MAX_KEYS} keys", code="too_many_keys")
    result: dict[str, Any] = {}
    for key, value in pairs:
        if key in result:
            message = f"the key {quoted(key)} stands twice in one object"
            raise bad_request(message, code="duplicate_key")
        result[key] = value
    return result


def _integer(digits: str) -> int | float:
    if len(digits) > _MAX_DIGITS:
        return float("-inf") if digits.startswith("-") else float("inf")
    # JSON's -0 has a sign, and a dial value has none: keep it, so that it can be refused.
    return -0.0 if digits == "-0" else int(digits)


def _depth(value: Any) -> int:
    if not isinstance(value, dict | list):
        return 1
    inner = value.values() if isinstance(value, dict) else value
    return 1 + max((_depth(one) for one in inner), default=0)
