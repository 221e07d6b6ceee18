"""The shapes in which people write a chat down, and what we make of them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

from equipoise.errors import DataError
from equipoise.overlap import prompt_key
from equipoise.pool.rows import Row
from equipoise.types import Message, Prompt, Role, Split

SHAPES = """prompts: `messages` (list of role, content), `prompt` (text, messages, or a transcript
    "\\n\\nHuman: … \\n\\nAssistant:"), `instruction` with or without `input`
  pairs: the same and `chosen` / `rejected` (text, messages or transcripts)
  labels: the same and `response` with `score`, `label` or `is_safe`"""

_TURN = re.compile(r"(?:\A|\n\n)\s*(Human|Assistant):[ ]?")
_ROLES: dict[str, Role] = {
    **{role: role for role in get_args(Role)},
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
}


def parse_transcript(text: str) -> tuple[Message, ...] | None:
    """Split "\\n\\nHuman: … \\n\\nAssistant: …"; ``None`` if the text is no transcript."""
    parts = _TURN.split(text)
    if len(parts) < 3 or parts[0].strip() or parts[1] != "Human":
        return None
    if not text.startswith("\n\n") and "Assistant" not in parts[3::2]:
        return None  # a plain text that happens to begin with "Human:"
    roles: list[Role] = ["user" if who == "Human" else "assistant" for who in parts[1::2]]
    turns = zip(roles, parts[2::2], strict=True)
    return tuple(Message(role, content.strip()) for role, content in turns)


def parse_turns(value: object, *, where: str) -> tuple[Message, ...]:
    """Read a text, a transcript or a list of turns.

    Args:
        value: What stands in the row.
        where: Source and row number, for the message.

    Raises:
        DataError: A turn without a known role or without text content.
    """
    if isinstance(value, str):
        return parse_transcript(value) or (Message("user", value),)
    if not isinstance(value, Sequence):
        raise DataError(
            f"{where}: a {type(value).__name__} is no chat",
            why="A text or a list of turns is expected.",
            fix=f"Understood are:\n  {SHAPES}",
        )
    turns = []
    for turn in value:
        role = turn.get("role", turn.get("from")) if isinstance(turn, Mapping) else None
        content = turn.get("content", turn.get("value")) if isinstance(turn, Mapping) else None
        if role not in _ROLES or not isinstance(content, str):
            raise DataError(
                f"{where}: a turn cannot be read",
                why="It needs `role` (system, user, assistant) and `content` (text).",
                fix="Correct the row.",
            )
        turns.append(Message(_ROLES[role], content))
    return tuple(turns)


def prompt_turns(row: Row, *, where: str) -> tuple[Message, ...] | None:
    """The turns of a row's own prompt fields; ``None`` if it has none of them."""
    for field in ("messages", "prompt"):
        if row.get(field) is not None:
            return parse_turns(row[field], where=where)
    if row.get("instruction") is not None:
        parts = [str(row["instruction"]).strip(), str(row.get("input") or "").strip()]
        return (Message("user", "\n\n".join(part for part in parts if part)),)
    return None


def unknown_shape(row: Row, *, where: str) -> DataError:
    """The error for a row of no known shape."""
    return DataError(
        f"{where} has an unknown shape",
        why=f"Its fields are: {', '.join(sorted(row)) or 'none'}.",
        fix=f"Rename the fields. Understood are:\n  {SHAPES}",
    )


def make_prompt(
    turns: Sequence[Message], where: str, source: str, split: Split = "train", label: str = ""
) -> Prompt:
    """Cut the turns after the last user turn and name the prompt by its content.

    Raises:
        DataError: No user turn with text.
    """
    users = [i for i, turn in enumerate(turns) if turn.role == "user" and turn.content.strip()]
    if not users:
        raise DataError(
            f"{where} has no user turn",
            why="A prompt ends with what the user says, and here nobody says anything.",
            fix="Remove the row, or give it a user turn with text.",
        )
    messages = tuple(turns[: users[-1] + 1])
    stem = Path(source).name.split(".")[0] or "prompt"
    return Prompt(f"{stem}-{prompt_key(messages)[:16]}", messages, split, source, label)
