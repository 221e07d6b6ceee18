"""A sealed copy of a tokenizer: its markers can be written by us and by nobody else.

Emptying the added tokens (the textbook way to keep special strings text) leaves two holes: a
marker may also be a piece of the base vocabulary, and the text around a marker is then split
otherwise than the model knows. Here every forbidden token keeps its id and its flags, and only its
*text* is replaced, by a seal: 128 random bits drawn per encoder. Whoever does not know the seal
can write no marker, and all else is segmented by the model's own rules.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tokenizers import AddedToken, Tokenizer

from equipoise.errors import ModelError

_BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_LETTERS = "abcdefghijklmnop"
_PROBES = ("Hello, World", " two  blanks ", "line\nbreak\n", "x")


@dataclass(frozen=True)
class SealedTokenizer:
    """The sealed copy and what is needed to write its markers."""

    tokenizer: Tokenizer
    """Same ids as the original; only the forbidden tokens' texts differ."""
    seals: Mapping[int, str]
    """Forbidden id to its secret text."""
    nonce: str
    """Common to all seals and the guard: text without it holds none of them."""
    guard: str
    guard_id: int
    """One more secret token, after which text is encoded as text that follows a marker."""
    markers: re.Pattern[str]
    """Leftmost-longest over all added tokens of the original."""
    marker_ids: Mapping[str, int]
    """Original text to id, of the forbidden tokens only."""

    def seal_trusted(self, text: str) -> tuple[str, tuple[int, ...]]:
        """Replace the markers in *trusted* text by seals; return it and the ids, in order."""
        found: list[int] = []

        def swap(match: re.Match[str]) -> str:
            token_id = self.marker_ids.get(match.group())
            if token_id is None:
                return match.group()
            found.append(token_id)
            return self.seals[token_id]

        return self.markers.sub(swap, text), tuple(found)

    def encode(self, text: str) -> list[int]:
        """Return the ids of text; seals in it become their markers."""
        ids: list[int] = self.tokenizer.encode(text, add_special_tokens=False).ids
        return ids


def random_letters() -> str:
    """Return 128 random bits as lower-case letters, which no text normaliser changes."""
    return "".join(_LETTERS[int(digit, 16)] for digit in secrets.token_hex(16))


def is_byte_piece(text: str) -> bool:
    """True for the pieces of SentencePiece byte fallback, which spell text and mark nothing."""
    return _BYTE_PIECE.fullmatch(text) is not None


def seal(backend: Tokenizer, forbidden: frozenset[int]) -> SealedTokenizer:
    """Build the sealed copy of a fast tokenizer.

    Args:
        backend: The model's own tokenizer; it is not changed.
        forbidden: The ids that untrusted text must not produce.

    Raises:
        ModelError: If the copy does not keep every id.
    """
    spec: dict[str, Any] = json.loads(backend.to_str())
    added: dict[int, AddedToken] = backend.get_added_tokens_decoder()
    # Seals are matched in raw text. A marker that was matched after normalisation left the text
    # around it whole for the normaliser; where that shows in the ids, its seal does so too.
    variants = [_build(backend, spec, forbidden, keep_normalized=False)]
    if spec["normalizer"] is not None and any(
        added[i].normalized for i in forbidden & added.keys()
    ):
        variants.append(_build(backend, spec, forbidden, keep_normalized=True))
    problems = [_difference(backend, sealed) for sealed in variants]
    usable = [s for s, problem in zip(variants, problems, strict=True) if problem is None]
    if not usable:
        raise ModelError(
            "this tokenizer cannot be sealed against untrusted text",
            why=str(problems[0]),
            fix="use the tokenizer that the model was published with (a tokenizer.json of BPE, "
            "Unigram, WordPiece or WordLevel type)",
        )
    return next((sealed for sealed in usable if _agrees(backend, sealed)), usable[0])


def _build(
    backend: Tokenizer, spec: Mapping[str, Any], forbidden: frozenset[int], *, keep_normalized: bool
) -> SealedTokenizer:
    nonce = random_letters()
    # Fixed length, so that no seal is the beginning of another; a digit at the end, as a letter
    # could melt into a combining accent at the start of the content that follows.
    guard, *tails = (f"{nonce}{number:06d}" for number in range(len(forbidden) + 1))
    seals = dict(zip(sorted(forbidden), tails, strict=True))
    added: dict[int, AddedToken] = backend.get_added_tokens_decoder()
    texts = {token_id: backend.id_to_token(token_id) or "" for token_id in seals}
    listed = {entry["id"] for entry in spec["added_tokens"]}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    unlisted = [
        {"id": token_id, "content": seals[token_id], "special": True} | flags
        for token_id in seals
        if token_id not in listed
    ]
    entries = [
        entry
        if entry["id"] not in seals
        else entry
        | {
            "content": seals[entry["id"]],
            "special": True,
            "single_word": False,
            "normalized": keep_normalized and entry["normalized"],
        }
        for entry in spec["added_tokens"]
    ]
    changed = {
        **spec,
        "truncation": None,
        "padding": None,
        "model": _sealed_model(spec["model"], {texts[i]: seals[i] for i in seals}),
        "added_tokens": sorted(unlisted + entries, key=lambda entry: entry["id"]),
    }
    try:
        tokenizer = Tokenizer.from_str(json.dumps(changed))
    except Exception as error:  # the Rust side raises plain Exception
        raise ModelError(
            "this tokenizer cannot be sealed against untrusted text",
            why=f"its edited copy does not load: {error}",
            fix="use the tokenizer that the model was published with",
        ) from error
    tokenizer.add_special_tokens([AddedToken(guard, special=True, normalized=False)])
    contents = {token.content for token in added.values()} | set(texts.values())
    longest_first = sorted(contents, key=len, reverse=True)
    return SealedTokenizer(
        tokenizer=tokenizer,
        seals=seals,
        nonce=nonce,
        guard=guard,
        guard_id=tokenizer.encode(guard, add_special_tokens=False).ids[0],
        markers=re.compile("|".join(map(re.escape, longest_first)) or r"(?!)"),
        marker_ids={text: token_id for token_id, text in texts.items()},
    )


def _sealed_model(model: Mapping[str, Any], renamed: Mapping[str, str]) -> dict[str, Any]:
    """Rename pieces of the base vocabulary and drop the merges that would yield them."""
    result = dict(model)
    if model["type"] == "Unigram":
        result["vocab"] = [[renamed.get(piece, piece), score] for piece, score in model["vocab"]]
        return result
    result["vocab"] = {renamed.get(piece, piece): i for piece, i in model["vocab"].items()}
    if model.get("unk_token") in renamed:
        result["unk_token"] = renamed[model["unk_token"]]
    if model["type"] == "BPE":
        skip = len(model.get("continuing_subword_prefix") or "")
        result["dropout"] = None
        pairs = (m.split(" ") if isinstance(m, str) else m for m in model["merges"])
        result["merges"] = [
            [left, right]
            for left, right in pairs
            if not {left, right, left + right[skip:]} & renamed.keys()
        ]
    return result


def _difference(backend: Tokenizer, sealed: SealedTokenizer) -> str | None:
    """Return what differs from the original beyond the forbidden tokens' texts, or None."""
    for token_id, text in sealed.seals.items():
        if sealed.encode(text) != [token_id]:
            return f"token {token_id} is not reachable by its seal"
    names = {text: sealed.seals[token_id] for text, token_id in sealed.marker_ids.items()}
    expected = {names.get(text, text): i for text, i in backend.get_vocab().items()}
    actual = sealed.tokenizer.get_vocab()
    if actual.pop(sealed.guard, None) in expected.values():
        return "its ids have holes"
    return None if actual == expected else "ids of ordinary pieces moved in the sealed copy"


def _agrees(backend: Tokenizer, sealed: SealedTokenizer) -> bool:
    """True if text around the markers gets the ids that the model's own tokenizer gives it."""
    for marker in sealed.marker_ids:
        for probe in _PROBES:
            text = marker + probe + marker + probe
            own = backend.encode(text, add_special_tokens=False).ids
            if sealed.encode(sealed.seal_trusted(text)[0]) != own:
                return False
    return True
