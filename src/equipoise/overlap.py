"""One answer to the question whether two prompts are the same prompt."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterable

from equipoise.types import Message


def normalise(text: str) -> str:
    """Fold case, compatibility characters and runs of white space."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def prompt_key(messages: Iterable[Message]) -> str:
    """Hash of the normalised user and assistant turns; system turns do not count.

    Two prompts with the same key are the same prompt for every check of disjointness: splits,
    reward-model rows, judge rows.

    Returns:
        32 hex digits.
    """
    turns = "\x1e".join(
        f"{m.role}\x1f{normalise(m.content)}" for m in messages if m.role != "system"
    )
    return hashlib.sha256(turns.encode("utf-8", "surrogatepass")).hexdigest()[:32]
