"""The shapes in which people write a chat down, and what we make of them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import get_args

from equipoise.data.sources import Place, Row
from equipoise.errors import DataError
from equipoise.overlap import prompt_key
from equipoise.types import Message, Prompt, Role, Split

SHAPES = """prompts: `messages` (list of role, content; also as JSON text), `prompt` (text,
    messages, or a transcript "\\n\\nHuman: … \\n\\nAssistant:"), `instruction` with or without
    `input`
  pairs: the same and `chosen` / `rejected` (text, messages or transcripts)
  labels: the same and `response` with `score`, `label` or `is_safe`"""

_TURN = re.compile(r"(?:\A|\n\n)\s*(Human|Assistant):[ ]?")
_LIKE_TURNS = re.compile(
    r"""\s*\[\s*\{\s*['"](role|content|from|value)['"]\s*:.*\]\s*""", re.DOTALL
)
_ROLES: dict[str, Role] = {
    **{role: role for role in get_args(Role)},
    "developer": "system",
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


def parse_turns(value: object, *, where: Place) -> tuple[Message, ...]:
    """Read a text, a transcript, a list of turns, or such a list as JSON text.

    Args:
        value: What stands in the row.
        where: For the message.

    Raises:
        DataError: A turn without a known role or without text content, or a text that is a list of
            turns in a notation that is not JSON.
    """
    if isinstance(value, str):
        # Exports write lists as text. Only what is a list of turns from end to end is one.
        if not _LIKE_TURNS.fullmatch(value):
            return parse_transcript(value) or (Message("user", value),)
        value = _from_json(value, where)
    if not isinstance(value, Sequence):
        raise DataError(
            f"{where}: a {type(value).__name__} is no chat",
            why="A text or a list of turns is expected.",
            fix=f"Understood are:\n  {SHAPES}",
        )
    return tuple(_turn(item, where) for item in value)


def _from_json(text: str, where: Place) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{where}: a list of turns is written as text, and is not JSON",
            why="It would be asked as it stands, quotes and brackets included.",
            fix="Store the turns as a list, or as JSON text.",
        ) from error


def _turn(turn: object, where: Place) -> Message:
    role = turn.get("role", turn.get("from")) if isinstance(turn, Mapping) else None
    content = turn.get("content", turn.get("value")) if isinstance(turn, Mapping) else None
    known = _ROLES.get(role) if isinstance(role, str) else None
    text = _text_of(content)
    if known is None or text is None:
        raise DataError(
            f"{where}: a turn cannot be read",
            why="It needs `role` (system, developer, user, assistant) and `content` (a text, or a "
            "list of parts that are all text).",
            fix="Correct the row.",
        )
    return Message(known, text)


def _text_of(content: object) -> str | None:
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence) or not content:
        return None
    texts = [
        part.get("text") if isinstance(part, Mapping) and part.get("type") == "text" else None
        for part in content
    ]
    return "".join(map(str, texts)) if all(isinstance(text, str) for text in texts) else None


def prompt_turns(row: Row, *, where: Place) -> tuple[Message, ...] | None:
    """The turns of a row's own prompt fields; ``None`` if it has none of them."""
    for field in ("messages", "prompt"):
        value = row.get(field)
        if field == "messages" and isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
            value = _from_json(value, where)
        if value is not None:
            return parse_turns(value, where=where)
    if row.get("instruction") is not None:
        parts = [str(row["instruction"]).strip(), str(row.get("input") or "").strip()]
        return (Message("user", "\n\n".join(part for part in parts if part)),)
    return None


def split_answer(
    value: object, own: Sequence[Message] | None, *, where: Place
) -> tuple[Sequence[Message], str]:
    """Split ``chosen`` or ``rejected`` into prompt turns and answer.

    Args:
        value: A bare answer, or a dialogue that ends with it.
        own: The turns of the row's own prompt fields, see :func:`prompt_turns`.
        where: For the message.

    Raises:
        DataError: No prompt, or a dialogue whose turns before the answer are not the row's prompt.
    """
    turns: Sequence[Message] | None
    if isinstance(value, str) and not _LIKE_TURNS.fullmatch(value):
        turns = parse_transcript(value)
    else:
        turns = parse_turns(value, where=where)
    if turns is None:
        if own is None:
            raise DataError(
                f"{where}: the pair has no prompt",
                why="`chosen` is a bare text, and there is no `prompt` or `messages`.",
                fix="Add the prompt, or give whole transcripts.",
            )
        return own, str(value)
    answered = bool(turns) and turns[-1].role == "assistant"
    before = turns[:-1] if answered else turns
    if own is not None and _asked(before) and _asked(before) != _asked(own):
        raise DataError(
            f"{where}: the answer is a dialogue with another prompt",
            why="What comes before its last answer is not the row's own `prompt` or `messages`.",
            fix="Give the answer alone, or leave the prompt fields out.",
        )
    return (before if own is None else own), turns[-1].content if answered else ""


def _asked(turns: Sequence[Message]) -> str | None:
    """Return the key of the prompt in some turns, as :func:`make_prompt` cuts it."""
    end = max((i for i, turn in enumerate(turns, 1) if turn.role == "user"), default=0)
    return prompt_key(turns[:end]) if end else None


def check_text(text: str, where: Place) -> None:
    """Refuse what no tokenizer and no file can take.

    Raises:
        DataError: A lone surrogate.
    """
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: a text cannot be encoded as UTF-8",
            why=f"It holds a lone surrogate at character {error.start}.",
            fix="Repair the row, e.g. text.encode('utf-8', 'replace').decode()",
        ) from error


def unknown_shape(row: Row, *, where: Place) -> DataError:
    """The error for a row of no known shape."""
    return DataError(
        f"{where} has an unknown shape",
        why=f"Its fields are: {', '.join(sorted(row)) or 'none'}.",
        fix=f"Rename the fields. Understood are:\n  {SHAPES}",
    )


def make_prompt(
    turns: Sequence[Message], where: Place, split: Split = "train", label: str = ""
) -> Prompt:
    """Cut the turns after the last user turn and name the prompt by its content.

    Raises:
        DataError: No user turn with text, or a text that cannot be encoded.
    """
    users = [i for i, turn in enumerate(turns) if turn.role == "user" and turn.content.strip()]
    if not users:
        raise DataError(
            f"{where} has no user turn",
            why="A prompt ends with what the user says, and here nobody says anything.",
            fix="Remove the row, or give it a user turn with text.",
        )
    messages = tuple(turns[: users[-1] + 1])
    for text in (label, *(turn.content for turn in messages)):
        check_text(text, where)
    stem = Path(where.source).name.split(".")[0] or "prompt"
    name = f"{stem}-{prompt_key(messages)[:16]}"
    return Prompt(name, messages, split, where.source, label, where.row)
