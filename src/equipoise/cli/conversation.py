"""A conversation at a terminal: dials, history, one streamed answer at a time, a grid of nine.

The same policy function as the server's decides what a dial request gets, and the same rows decode
it; only the door is missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING

from equipoise.cli.panel import DialPanel
from equipoise.config import Sampling
from equipoise.engine.cache import PrefixCache
from equipoise.engine.decode import LiveRows
from equipoise.engine.draw import Row
from equipoise.engine.seam import Generation, Token
from equipoise.engine.text import AnswerText
from equipoise.errors import DataError, ModelError
from equipoise.models.context import positions
from equipoise.policy.decide import DialPolicy
from equipoise.seeds import derive_seed
from equipoise.types import DialSetting, Message

if TYPE_CHECKING:
    from equipoise.models.load import LoadedPolicy

_PREFIX_TOKENS = 4096


@dataclass(frozen=True)
class Grid:
    """One prompt answered at several settings of two dials."""

    rows: tuple[str, ...]
    """The first attribute's values, lowest first."""
    columns: tuple[str, ...]
    texts: tuple[tuple[str, ...], ...]
    """By row and column."""


class Conversation:
    """The state between two inputs.

    Args:
        loaded: A model with dials.
        policy: The operator's rules; without them every dial is free.
        sampling: How to sample.
        seed: Every answer derives its own seed from it.

    Raises:
        ModelError: The model has no dials, or cannot be decoded row by row.
    """

    def __init__(
        self,
        loaded: LoadedPolicy,
        *,
        policy: DialPolicy | None = None,
        sampling: Sampling,
        seed: int = 0,
    ) -> None:
        if loaded.manifest is None:
            raise ModelError(
                "this model has no dials",
                why="its directory holds no dials.json",
                fix="give the directory that `equipoise tune` wrote: RUN/tune/model",
            )
        manifest = loaded.manifest
        self.panel = DialPanel(manifest.dials, policy)
        """The dials."""
        self.messages: list[Message] = []
        """The conversation so far, ending with an answer."""
        self._encoder, self._sampling, self._seed = loaded.encoder, sampling, seed
        if policy is not None:
            self._encoder = loaded.encoder.with_rendering(policy.rendering)
        self._rows = LiveRows(loaded.model, loaded.encoder, PrefixCache(_PREFIX_TOKENS))
        self._context = positions(loaded.model.config)
        self._n_answers = 0

    def answer(self, text: str) -> Iterator[str]:
        """Stream the answer to a user turn; both turns join the history, also a partial answer.

        Raises:
            DataError: The turn cannot be encoded, or the conversation has grown too long.
            ConfigError: The policy refuses the dials.
        """
        return self._reply(self.messages, text)

    def again(self) -> Iterator[str]:
        """Stream another answer to the last user turn, at the dials of now; it replaces the old."""
        if not self.messages:
            raise _nothing_asked()
        return self._reply(self.messages[:-2], self.messages[-2].content)

    def forget(self) -> None:
        """Empty the history; the dials stay."""
        self.messages = []

    def grid(self, text: str | None = None) -> Grid:
        """Answer one prompt at up to 3 × 3 settings of the first two dials, none of it kept.

        Args:
            text: A user turn behind the history; by default the last one is asked again.
        """
        if text is None:
            asked = self.messages[:-1]
            if not asked:
                raise _nothing_asked()
        else:
            asked = [*self.messages, Message("user", text)]
        panel = self.panel
        dials = panel.attributes[:2]
        axes = [_spread(panel.allowed(attribute)) for attribute in dials]
        seed = derive_seed("grid", self._n_answers)
        generations = [
            self._generation(
                asked,
                panel.setting(
                    {**panel.dials, **{a: {"level": k} for a, k in zip(dials, cell, strict=True)}}
                ),
                seed,
            )
            for cell in product(*axes)
        ]
        texts = self._texts(generations)
        width = len(axes[1]) if len(axes) > 1 else 1
        names = [
            [f"{a} {panel.value(k)}" for k in axis] for a, axis in zip(dials, axes, strict=True)
        ]
        return Grid(
            rows=tuple(names[0]),
            columns=tuple(names[1]) if len(names) > 1 else ("answer",),
            texts=tuple(tuple(texts[i : i + width]) for i in range(0, len(texts), width)),
        )

    def _reply(self, history: Sequence[Message], text: str) -> Iterator[str]:
        asked = [*history, Message("user", text)]
        salt = derive_seed("chat", self._n_answers)
        generation = self._generation(asked, self.panel.setting(), salt)
        self._n_answers += 1
        parts: list[str] = []
        try:
            for delta in self._deltas(generation):
                parts.append(delta)
                yield delta
        finally:
            self.messages = [*asked, Message("assistant", "".join(parts))]

    def _generation(
        self, messages: Sequence[Message], setting: DialSetting, salt: int
    ) -> Generation:
        prompt_ids = tuple(self._encoder.prompt_ids(messages))
        control_ids = self._encoder.control_ids(setting)
        sampling = self._encoder.budgets(self._sampling)
        most = sampling.max_tokens + sampling.max_thought_tokens
        needed = len(prompt_ids) + len(control_ids) + most
        if self._context is not None and needed > self._context:
            raise DataError(
                "the conversation has grown too long for this model",
                why=f"it needs {needed} positions, the model has {self._context}, and nothing is "
                "cut off silently",
                fix="/forget the history, or start with a smaller --max-tokens",
            )
        return Generation(prompt_ids, control_ids, sampling, derive_seed(self._seed, salt), "")

    def _deltas(self, generation: Generation) -> Iterator[str]:
        text = AnswerText(self._encoder)
        for _, token in self._tokens([generation]):
            if delta := text.push(token):
                yield delta
        if rest := text.flush():
            yield rest

    def _texts(self, generations: Sequence[Generation]) -> list[str]:
        texts = [AnswerText(self._encoder) for _ in generations]
        parts = ["" for _ in generations]
        for place, token in self._tokens(generations):
            parts[place] += texts[place].push(token)
        return [part + text.flush() for part, text in zip(parts, texts, strict=True)]

    def _tokens(self, generations: Sequence[Generation]) -> Iterator[tuple[int, Token]]:
        self._rows.clear()  # what an answer that was stopped has left
        place: dict[int, int] = {}
        for index, row in enumerate(self._rows.join(generations)):
            if not isinstance(row, Row):
                raise row
            place[id(row)] = index
        while self._rows.rows:
            for row, item in self._rows.draw():
                if not isinstance(item, Token):
                    raise item
                yield place[id(row)], item
            self._rows.advance()


def _spread(levels: range) -> list[int]:
    """Return the lowest, the middle and the highest level, each once."""
    return sorted({levels[0], levels[len(levels) // 2], levels[-1]})


def _nothing_asked() -> DataError:
    return DataError(
        "there is nothing to answer again", why="the history is empty", fix="ask something first"
    )
