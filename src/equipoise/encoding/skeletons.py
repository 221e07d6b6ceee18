"""What the chat template writes around turns, with its markers as seals, per order of roles."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from equipoise.encoding.contents import ContentRules, Skeleton, content_rules, skeleton
from equipoise.errors import DataError, ModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from equipoise.encoding.sealing import SealedTokenizer
    from equipoise.encoding.template import ChatTemplate, Turn

_USUAL_END = "</think>"
_MAX_CACHED_SKELETONS = 1024
_MAX_CACHED_TURNS = 16_384
"""Of all cached skeletons together; some 6 MiB, whatever orders of roles a client thinks up."""


@dataclass(frozen=True)
class Prepared:
    """A skeleton whose markers are written as seals."""

    skeleton: Skeleton
    markers: tuple[int, ...]


class Skeletons:
    """The prepared skeletons of one chat template.

    Args:
        template: Of the model.
        backend: Its fast tokenizer.
        sealed: Its sealed copy.
        controls: The ids that not even the template may write.
        thought_end: The closing mark of the model's thoughts, if it has any.
    """

    def __init__(
        self,
        template: ChatTemplate,
        backend: Tokenizer,
        sealed: SealedTokenizer,
        controls: frozenset[int],
        thought_end: str | None = None,
    ) -> None:
        self._template, self._backend = template, backend
        self._sealed, self._controls = sealed, controls
        self._thought_end = thought_end or _USUAL_END
        self._cache: dict[tuple[Turn, ...], Prepared] = {}
        self._cached_turns = 0
        self._clock: Mapping[str, str] | None = None

    def __iter__(self) -> Iterator[tuple[Turn, ...]]:
        """Iterate over the sequences of turns that are cached."""
        return iter(self._cache)

    def of_template(self, template: ChatTemplate) -> Skeletons:
        """Return those of the same template, rendered otherwise."""
        return Skeletons(template, self._backend, self._sealed, self._controls, self._thought_end)

    @cached_property
    def contents(self) -> ContentRules:
        """What the template makes of contents, found at the first prompt."""
        return content_rules(self._template.now(), self._thought_end)

    def of(self, turns: tuple[Turn, ...]) -> Prepared:
        """Return the skeleton of a prompt, or of a conversation that ends with an answer.

        Raises:
            DataError: If the template refuses this sequence of roles.
            ModelError: If there is no template, or one that cannot be used.
        """
        template = self._template.now()
        if template.clock is None or template.clock != self._clock:
            # Another day; the old one does not come back.
            self._cache.clear()
            self._cached_turns, self._clock = 0, template.clock
        prepared = self._cache.get(turns)
        if prepared is None:
            if not template.exists:
                raise ModelError(
                    "the tokenizer has no chat template",
                    why="a prompt is a list of chat turns, and nothing says how the model reads it",
                    fix="use an instruction-tuned model, or set tokenizer.chat_template",
                )
            prepared = self._trusted(template, turns)
            self._cached_turns += len(turns)
            if len(self._cache) >= _MAX_CACHED_SKELETONS or self._cached_turns > _MAX_CACHED_TURNS:
                self._cache.clear()
                self._cached_turns = len(turns)
            self._cache[turns] = prepared
        return prepared

    def turn_end(self) -> int | None:
        """Return the marker that the template writes after the assistant's content, if any."""
        if not self._template.exists:
            return None
        try:
            turns = (("user", False), ("assistant", False))
            rendered = skeleton(self._template.now(), turns, generation_prompt=False)
        except (DataError, ModelError):
            return None
        if rendered.slots[-1].message != 1:
            return None
        return next(iter(self._sealed.seal_trusted(rendered.pieces[-1])[1]), None)

    def _trusted(self, template: ChatTemplate, turns: tuple[Turn, ...]) -> Prepared:
        asked = turns[-1][0] != "assistant"
        rendered = skeleton(template, turns, generation_prompt=asked)
        pieces: list[str] = []
        written: list[int] = []
        for piece in rendered.pieces:
            text, found = self._sealed.seal_trusted(piece)
            pieces.append(text)
            written += found
        if not self._controls.isdisjoint(written):
            raise ModelError(
                "the chat template writes a control token",
                why="it, or a value in chat_template_kwargs, spells one: that would turn a dial",
                fix="take the control token out of both; dials are set by id only",
            )
        # The model's own tokenizer must see the same markers, or the template writes one in a
        # form (other case, say) that only its normaliser knows.
        own = self._backend.encode("x".join(rendered.pieces), add_special_tokens=False).ids
        if [token_id for token_id in own if token_id in self._sealed.seals] != written:
            raise ModelError(
                "the chat template writes a marker that cannot be told from text",
                why="the model's own tokenizer finds other markers in it than are spelt out",
                fix="spell the markers in the chat template as they are in the tokenizer",
            )
        return Prepared(Skeleton(tuple(pieces), rendered.slots), tuple(written))
