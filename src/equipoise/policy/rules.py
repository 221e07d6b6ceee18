"""The operator's rules as data: ranges, scenarios, keys, limits (meaning: ``dial_policy``).

All of it is read from files of the operator, unknown fields refused, numbers strict: ``true`` or
``"0.5"`` is no dial value.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Literal

from pydantic import Field, StringConstraints, model_validator

from equipoise.config import Config
from equipoise.types import Rendering, TemplateValue

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
DialValue = Annotated[float, Field(strict=True, ge=0.0, le=1.0, allow_inf_nan=False)]
Count = Annotated[int, Field(strict=True, ge=1)]
Seconds = Annotated[float, Field(strict=True, gt=0.0, le=3600.0, allow_inf_nan=False)]


class Range(Config):
    """Dial values that are allowed, both ends included."""

    min: DialValue = 0.0
    max: DialValue = 1.0

    @model_validator(mode="after")
    def _in_order(self) -> Range:
        if self.min > self.max:
            raise ValueError(f"min {self.min:g} is above max {self.max:g}")
        return self


Ranges = dict[str, Range]
"""Attribute to range; an attribute that is not named is not narrowed."""


class Level(Config):
    """A level by its number, where a bare number would be a dial value."""

    level: Annotated[int, Field(strict=True, ge=0)]


class Scenario(Config):
    """One place of use: what its users may ask for, and what they get unasked."""

    why: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
    """A sentence that gives the reason for the ranges."""
    ranges: Ranges
    """One per attribute of the model: a forgotten line must not open a dial."""
    default: dict[str, DialValue | Level | Literal["auto"]]
    """One per attribute; ``auto`` only where the range is the whole dial."""
    outside: Literal["clamp", "refuse"] = "clamp"
    """What becomes of a request outside the range."""


class Key(Config):
    """Who asks. Holds the hash of the secret, never the secret."""

    id: Name
    name: Annotated[str, StringConstraints(max_length=128)] = ""
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    scenarios: tuple[Name, ...] = ()
    """Scenarios this key may use, its default first; none = the policy's default scenario only."""
    ranges: Ranges = Field(default_factory=dict)
    """Narrows the scenario's ranges further."""
    requests_per_minute: Count | None = None
    """``None`` = the policy's limit."""
    content_log: bool = True
    """False keeps this key's texts out of a content log that the operator has switched on."""
    revoked: bool = False
    created: str = ""


class Limits(Config):
    """What one request and all of them together may cost."""

    max_tokens: Count = 1024
    """Tokens of one answer; also the default."""
    max_thought_tokens: Count = 512
    """Tokens of the thought before it, where the model writes one."""
    max_prompt_tokens: Count = 4096
    choices: Annotated[int, Field(strict=True, ge=1, le=16)] = 4
    """``n`` of a request."""
    requests_per_minute: Count = 60
    """Of one key that has no limit of its own."""
    waiting: Annotated[int, Field(strict=True, ge=0)] = 64
    """Completions that may wait for a slot; more get 429."""
    waiting_tokens: Count = 262144
    """Prompt and completion tokens that may be under way and waiting in all."""
    per_key: Count = 32
    """Completions of one key that may be under way and waiting."""
    first_token_seconds: Seconds = 60.0
    total_seconds: Seconds = 300.0

    @model_validator(mode="after")
    def _largest_request_fits(self) -> Limits:
        # Else it would be told to come back later, for ever.
        tokens = self.choices * (self.max_prompt_tokens + self.max_tokens)
        if self.choices > self.per_key or tokens > self.waiting_tokens:
            raise ValueError(
                f"a request of {self.choices} choices takes up to {tokens} tokens: "
                "per_key or waiting_tokens is too small for it"
            )
        return self


class DialPolicy(Config):
    """The whole policy file."""

    version: Literal[1]
    server: Ranges = Field(default_factory=dict)
    """Ceiling over all scenarios and keys."""
    round_up: tuple[str, ...] = ("safety",)
    """Attributes whose off-grid values round up; the others go to the nearest level."""
    default_scenario: Name
    scenarios: Annotated[dict[Name, Scenario], Field(min_length=1)]
    limits: Limits = Limits()
    chat_template_kwargs: dict[str, TemplateValue] = Field(default_factory=dict)
    """Variables of the model's chat template, for all scenarios; no request can set one."""

    @model_validator(mode="after")
    def _default_exists(self) -> DialPolicy:
        if self.default_scenario not in self.scenarios:
            raise ValueError(f"default_scenario {self.default_scenario!r} is not among scenarios")
        return self

    @property
    def rendering(self) -> Rendering:
        """What the chat template is given besides the turns."""
        return Rendering(self.chat_template_kwargs)

    @property
    def hash(self) -> str:
        """SHA-256 of the policy's content; layout and comments of the file do not count."""
        plain = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        return hashlib.sha256(plain.encode()).hexdigest()
