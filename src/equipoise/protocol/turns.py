"""The turns of a chat request, and what of them reaches the encoder."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from equipoise.protocol.compat import ANSWER_FIELDS, Label, Only, Wire
from equipoise.types import Message

MAX_MESSAGES = 256
"""Turns of a request, and parts of a turn."""


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
