"""Sampled ids to the text of the answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from equipoise.encoding.thoughts import Follower, Thought

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from equipoise.encoding.sealing import SealedTokenizer


class AnswerDecoder:
    """Decodes what a model sampled, as text that follows a marker.

    Args:
        backend: The model's own tokenizer.
        sealed: Its sealed copy.
        silent: Ids that are no text: markers and ends.
        thought: The marks of the model's thoughts, if it has any.
    """

    def __init__(
        self,
        backend: Tokenizer,
        sealed: SealedTokenizer,
        silent: frozenset[int],
        thought: Thought | None,
    ) -> None:
        self._backend, self._sealed = backend, sealed
        self._silent, self._thought = silent, thought
        self._after_guard = self._loses_leading_blank()

    def decode(self, ids: Sequence[int], *, within: bool = False) -> str:
        """Return the answer; see :meth:`equipoise.encoding.encode.Encoder.decode`."""
        begun = self._thought is not None and self._thought.begun_before(ids)
        follower = Follower(self._thought, within or begun)
        answer = [token_id for token_id in ids if follower.take(token_id)]
        kept = [token_id for token_id in answer if token_id not in self._silent]
        if self._after_guard:
            text = self._behind_guard(kept)
        else:
            text = str(self._backend.decode(kept, skip_special_tokens=False))
        return text.lstrip("\n") if follower.behind else text

    def _behind_guard(self, ids: Sequence[int]) -> str:
        sealed = self._sealed
        text: str = sealed.tokenizer.decode([sealed.guard_id, *ids], skip_special_tokens=False)
        return text[text.index(sealed.guard) + len(sealed.guard) :]

    def _loses_leading_blank(self) -> bool:
        # SentencePiece decoders drop the blank before the first word of a text. A completion
        # follows a marker, where that blank is the model's own, so decode it there.
        def ids(text: str) -> list[int]:
            return self._sealed.encode(self._sealed.guard + text)[1:]

        plain, blank = ids("a"), ids(" a")
        if self._backend.decode(blank, skip_special_tokens=False) == " a":
            return False
        return [self._behind_guard(sample) for sample in (plain, blank)] == ["a", " a"]
