"""Ids to text while they arrive: exact deltas, and stop strings that never leak.

The text of a completion is *defined* as the concatenation of these deltas, streamed or not, and
equals ``Encoder.decode`` of all ids. Two things make that more than calling ``decode`` on each id:
a character may be spread over several ids (byte-level BPE), and a decoder may look at a whole run
of ids before it knows their text (SentencePiece byte pieces: one bad byte turns the run into
U+FFFD). Such text is held back until it cannot change any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from equipoise.encoding import sealing

if TYPE_CHECKING:
    from equipoise.encoding.encode import Encoder
    from equipoise.engine.seam import Token

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


class Detokenizer:
    """Turns ids into text deltas.

    Args:
        encoder: Of the model; its ``decode`` is the reference.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._encoder = encoder
        # Decoders treat the first id of a text unlike the others, so new ids are decoded behind
        # some whose text is out already. The window starts with these.
        self._window: list[int] = []
        self._settled = 0
        """Ids of the window whose text is out."""
        self._shown = 0
        """Characters of the window that are out."""

    def push(self, ids: Sequence[int]) -> str:
        """Return the text that the new ids make certain; may be empty."""
        self._window += ids
        if not ids or self._may_change():
            return ""
        text = self._encoder.decode(self._window)
        if text.endswith(_REPLACEMENT):  # a character of which more ids may come
            return ""
        delta = text[self._shown :]
        latest = self._window[self._settled :]
        alone = self._encoder.decode(latest)
        if alone:
            self._window, self._shown = latest, len(alone)
            self._settled = len(latest)
        else:
            self._shown = len(text)
        return delta

    def flush(self) -> str:
        """Return what was held back; call once, after the last id."""
        return self._encoder.decode(self._window)[self._shown :]

    def _may_change(self) -> bool:
        piece = self._encoder.tokenizer.convert_ids_to_tokens(self._window[-1])
        return piece is not None and sealing.is_byte_piece(str(piece))


class AnswerText:
    """The text of an answer while its tokens arrive: what is thought is left out.

    The line breaks between a thought and the answer belong to neither.
    """

    def __init__(self, encoder: Encoder) -> None:
        self._text = Detokenizer(encoder)
        self._begun = self._behind = False

    def push(self, token: Token) -> str:
        """Return the text that one more token makes certain; may be empty."""
        if token.thought:
            self._behind |= not self._begun
            return ""
        if token.id < 0:
            return ""
        self._begun = True
        return self._stripped(self._text.push([token.id]))

    def flush(self) -> str:
        """Return what was held back; call once, after the last token."""
        return self._stripped(self._text.flush())

    def _stripped(self, text: str) -> str:
        if self._behind:
            text = text.lstrip("\n")
            self._behind = not text
        return text


class StopStrings:
    """Cuts a text at the first stop string, which is never shown, not even a part of it.

    The first is the one that is complete first, and the longest of those: the result does not
    depend on how the text is cut into deltas.

    Args:
        stops: Stop strings, none of them empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False
        """Whether a stop string was met; no more text comes then."""

    def push(self, text: str) -> str:
        """Return the text that may be shown now."""
        if self.stopped:
            return ""
        self._held += text
        found = [(at + len(stop), at) for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            shown, self._held = self._held[: min(found)[1]], ""
            return shown
        keep = max((_overlap(self._held, stop) for stop in self._stops), default=0)
        cut = len(self._held) - keep
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown

    def flush(self) -> str:
        """Return what was held back, as no stop string came of it."""
        shown, self._held = self._held, ""
        return shown


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of the text that a stop string begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
