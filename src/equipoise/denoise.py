"""What counts as a completion: the denoising rules of docs/distil.md, in one place."""

from __future__ import annotations

import re
from collections.abc import Callable

# Scripts written without blanks count one token per character, or a whole answer would be one.
_UNSPACED = "\\u3040-\\u30ff\\u3400-\\u9fff\\uac00-\\ud7af\\u0e00-\\u0e7f"
_TOKEN = re.compile(f"[{_UNSPACED}]|[^\\W{_UNSPACED}]+|[^\\w\\s]")


def is_degenerate(text: str, *, parses: Callable[[str], bool] | None = None) -> bool:
    """Return whether a completion is no answer at all.

    Degenerate is: under 3 tokens, more than half of its 4-grams repeated (seen before in the same
    text), undecodable (it holds U+FFFD), or, where the world has a parser, unparseable. Tokens are
    words and punctuation marks, so that the verdict does not depend on a model's tokenizer.
    """
    tokens = _TOKEN.findall(text.lower())
    if len(tokens) < 3 or "\N{REPLACEMENT CHARACTER}" in text:
        return True
    grams = list(zip(*(tokens[i:] for i in range(4)), strict=False))
    if grams and len(set(grams)) < len(grams) / 2:
        return True
    return parses is not None and not parses(text)


def finished_sentences(text: str) -> str | None:
    """Return a cut text up to the end of its last finished sentence, or None if it has none."""
    ends = [match.end() for match in re.finditer(r"[.!?。！？](?=[\s\"')\]]|$)", text)]
    # A number at the head of a list item ("2.") ends no sentence.
    ends = [end for end in ends if not re.search(r"(^|\n)\s*\d+\.$", text[:end])]
    return text[: ends[-1]] if ends else None
