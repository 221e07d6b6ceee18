"""A sealed copy of a tokenizer: its markers can be written by us and by nobody else.

Emptying the added tokens (the textbook way to keep special strings text) leaves two holes: a
marker may also be a piece of the base vocabulary, and the text around a marker is then split
otherwise than the model knows. Here every forbidden token keeps its id and its flags, and only its
*text* is replaced, by a seal: 128 random bits drawn per encoder. Whoever does not know the seal
can write no marker, and all else is segmented by the model's own rules.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from tokenizers import AddedToken, Encoding, Tokenizer

from equipoise.encoding import copies
from equipoise.errors import DataError, EncodingError, ModelError

_BYTE_PIECE = re.compile(r"<0x[0-9A-Fa-f]{2}>")
_LETTERS = "abcdefghijklmnop"
_PROBES = ("Hello, World", " two  blanks ", "line\nbreak\n", "x")


@dataclass(frozen=True)
class SealedTokenizer:
    """The sealed copy and what is needed to write its markers."""

    tokenizer: Tokenizer
    """Same ids as the original but for :attr:`own`; only the forbidden tokens' texts differ."""
    seals: Mapping[int, str]
    """Forbidden id to its secret text."""
    nonce: str
    """Common to all seals and the guard: text without it holds none of them."""
    guard: str
    guard_id: int
    """One more secret token, after which text is encoded as text that follows a marker."""
    own: Mapping[int, int]
    """Id of a seal to the id of its token, where these differ."""
    markers: tuple[str, ...]
    """All added tokens of the original, and all forbidden ones; longest first."""
    marker_ids: Mapping[str, int]
    """Original text to id, of the forbidden tokens only."""

    def seal_trusted(self, text: str) -> tuple[str, tuple[int, ...]]:
        """Replace the markers in *trusted* text by seals; return it and the ids, in order."""
        found: list[int] = []
        present = [marker for marker in self.markers if marker in text]
        if not present:
            return text, ()

        def swap(match: re.Match[str]) -> str:
            token_id = self.marker_ids.get(match.group())
            if token_id is None:
                return match.group()
            found.append(token_id)
            return self.seals[token_id]

        # Leftmost-longest, as the tokenizer finds them.
        return re.sub("|".join(map(re.escape, present)), swap, text), tuple(found)

    def encode(self, text: str) -> list[int]:
        """Return the ids of text; seals in it become their markers."""
        return self.own_ids(self.encoding(text).ids)

    def encoding(self, text: str) -> Encoding:
        """Return what the sealed copy makes of text, markers as their seals."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def own_ids(self, ids: Sequence[int]) -> list[int]:
        """Return ids of the sealed copy as the original's."""
        return [self.own.get(token_id, token_id) for token_id in ids] if self.own else list(ids)

    def untrusted(self, text: str) -> str:
        """Return a text that shall produce no marker.

        Raises:
            DataError: It holds a lone surrogate.
            EncodingError: It holds what all seals begin with.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                "a text cannot be encoded as UTF-8",
                why=f"it holds a lone surrogate at character {error.start}",
                fix="repair the source, e.g. text.encode('utf-8', 'replace').decode()",
            ) from error
        if self.nonce in text:
            raise _forged()
        return text

    def checked(self, ids: Sequence[int], expected: tuple[int, ...] = ()) -> list[int]:
        """Return ids whose markers are the expected ones, in order.

        Raises:
            EncodingError: They are others.
        """
        if tuple(token_id for token_id in ids if token_id in self.seals) != expected:
            raise _forged()
        return list(ids)


def _forged() -> EncodingError:
    return EncodingError(
        "a text would have produced a marker of the model",
        why="only the encoder may write control tokens and chat markers",
        fix="leave this prompt or completion out; please report it, as it should be impossible",
    )


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
    added: dict[int, AddedToken] = backend.get_added_tokens_decoder()
    # Seals are matched in raw text. A marker that was matched after normalisation left the text
    # around it whole for the normaliser; where that shows in the ids, its seal does so too.
    by_normaliser = backend.normalizer is not None and any(
        added[i].normalized for i in forbidden & added.keys()
    )
    usable: list[SealedTokenizer] = []
    problems: list[str] = []
    for keep_normalized in (False, True) if by_normaliser else (False,):
        try:
            sealed = _sealed(backend, forbidden, keep_normalized=keep_normalized)
        except _NotTheSameError as problem:
            problems.append(str(problem))
            continue
        if not by_normaliser or _agrees(backend, sealed):
            return sealed
        usable.append(sealed)
    if not usable:
        raise ModelError(
            "this tokenizer cannot be sealed against untrusted text",
            why=problems[0],
            fix="use the tokenizer that the model was published with (a tokenizer.json of BPE, "
            "Unigram, WordPiece or WordLevel type)",
        )
    return usable[0]


class _NotTheSameError(Exception):
    """A copy differs from the original in more than the texts of the forbidden tokens."""


def _sealed(
    backend: Tokenizer, forbidden: frozenset[int], *, keep_normalized: bool
) -> SealedTokenizer:
    nonce = random_letters()
    # Fixed length, so that no seal is the beginning of another; a digit at the end, as a letter
    # could melt into a combining accent at the start of the content that follows.
    guard, *tails = (f"{nonce}{number:06d}" for number in range(len(forbidden) + 1))
    seals = dict(zip(sorted(forbidden), tails, strict=True))
    texts = {token_id: backend.id_to_token(token_id) or "" for token_id in seals}
    tokenizer = _copy(backend, texts, seals, keep_normalized=keep_normalized)
    tokenizer.add_special_tokens([AddedToken(guard, special=True, normalized=False)])
    guard_id = tokenizer.token_to_id(guard)
    assert guard_id is not None
    if backend.id_to_token(guard_id) is not None:
        raise _NotTheSameError("its ids have holes")
    found = tokenizer.encode_batch(list(seals.values()), add_special_tokens=False)
    own: dict[int, int] = {}
    for (token_id, text), encoding in zip(seals.items(), found, strict=True):
        if encoding.ids != [tokenizer.token_to_id(text)]:
            raise _NotTheSameError(f"token {token_id} is not reachable by its seal")
        if encoding.ids != [token_id]:
            own[encoding.ids[0]] = token_id
    contents = {token.content for token in backend.get_added_tokens_decoder().values()}
    return SealedTokenizer(
        tokenizer=tokenizer,
        seals=seals,
        nonce=nonce,
        guard=guard,
        guard_id=guard_id,
        own=own,
        markers=tuple(sorted((contents | set(texts.values())) - {""}, key=len, reverse=True)),
        marker_ids={text: token_id for token_id, text in texts.items()},
    )


def _copy(
    backend: Tokenizer, texts: dict[int, str], seals: dict[int, str], *, keep_normalized: bool
) -> Tokenizer:
    if copies.can_share(backend, texts):
        tokenizer = copies.shared(backend, seals, keep_normalized=keep_normalized)
        if tokenizer is not None:
            return tokenizer
    tokenizer = copies.rebuilt(backend, seals, keep_normalized=keep_normalized)
    if copies.vocabulary_moved(backend, tokenizer, seals):
        raise _NotTheSameError("ids of ordinary pieces moved in the sealed copy")
    return tokenizer


def _agrees(backend: Tokenizer, sealed: SealedTokenizer) -> bool:
    """True if text around the markers gets the ids that the model's own tokenizer gives it."""
    pairs = [
        ((text + probe) * 2, (sealed.seals[token_id] + probe) * 2)
        for text, token_id in sealed.marker_ids.items()
        for probe in _PROBES
    ]
    own = backend.encode_batch([plain for plain, _ in pairs], add_special_tokens=False)
    return all(
        sealed.encode(text) == encoding.ids for (_, text), encoding in zip(pairs, own, strict=True)
    )
