"""The one way from text to token ids, used by every stage.

Contents never pass through Jinja and can never produce a forbidden id: markers are written by the
encoder alone, through a sealed copy of the tokenizer (:mod:`equipoise.encoding.sealing`), and each
result is checked before it leaves.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

from equipoise.config import Sampling
from equipoise.encoding import markers, sealing
from equipoise.encoding.skeletons import Skeletons
from equipoise.encoding.template import ChatTemplate, Turn, check_prompt
from equipoise.encoding.thoughts import AnswerDecoder, Follower, find_thought
from equipoise.errors import ModelError
from equipoise.types import PLAIN, DialSetting, Message, Rendering

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from equipoise.dials.manifest import DialManifest

_MAX_RENDERINGS = 8


class AnsweredIds(NamedTuple):
    """The ids of a conversation that ends with an answer."""

    ids: list[int]
    start: int
    """Where the answer begins."""
    stop: int
    """Where what stands behind it begins."""


class PairIds(NamedTuple):
    """The ids of two texts."""

    ids: list[int]
    types: list[int]
    """Segment (0 or 1) of each id."""


class Encoder:
    """Turns prompts, control settings and completions into ids, and ids into text.

    Args:
        tokenizer: A fast Hugging Face tokenizer; it is not changed.
        manifest: The dials installed on it, if any.
        eos_ids: Further ids that end a completion: :func:`equipoise.encoding.markers.given_ends`.
        rendering: What the chat template is given besides the turns.

    Raises:
        ConfigError: A variable that the chat template does not know, or that is not to be set.
        ModelError: If the tokenizer is not a fast one, cannot be sealed, or lacks the
            manifest's control tokens.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        manifest: DialManifest | None = None,
        *,
        eos_ids: Iterable[int] | None = None,
        rendering: Rendering = PLAIN,
    ) -> None:
        self.tokenizer, self.manifest, self.rendering = tokenizer, manifest, rendering
        self._backend = markers.fast_backend(tokenizer)
        self._template = ChatTemplate(tokenizer, rendering)
        self.has_chat_template = self._template.exists
        controls = markers.control_ids(self._backend, manifest)
        self.thought = find_thought(self._backend, self._template)
        """The marks of the model's thoughts; None for a model without."""
        marks = self.thought.ids if self.thought is not None else frozenset[int]()
        self.forbidden: frozenset[int] = controls | marks
        self.forbidden |= markers.marker_ids(tokenizer, self._backend, self._template)
        """Ids that no untrusted text can produce."""
        self._sealed = sealing.seal(self._backend, self.forbidden)
        end = None if self.thought is None else self.thought.end
        self._skeletons = Skeletons(self._template, self._backend, self._sealed, controls, end)
        self._others: dict[str, Encoder] = {}
        # Of the latest text: the completions of a prompt come in a row.
        self._once = lru_cache(maxsize=1)(self._sealed.encoding)
        self._pair_form = self._sealed.own_ids(self._sealed.tokenizer.encode("", "").ids)
        self._given_ends = tuple(eos_ids or ())
        own = [self._skeletons.turn_end(), tokenizer.eos_token_id]
        ends = [i for i in (*own, *self._given_ends) if i is not None and i not in controls]
        self._eos_id: int | None = next(iter(ends), None)
        self.eos_ids: frozenset[int] = frozenset(ends)
        """Every id that ends a completion."""
        flagged = self.forbidden | set(tokenizer.all_special_ids)
        self.masked_ids: tuple[int, ...] = tuple(sorted(flagged - self.eos_ids - marks))
        """Ids that must never be sampled: control tokens, all markers but ends and thoughts."""
        silent = flagged | self.eos_ids
        self.decode = AnswerDecoder(self._backend, self._sealed, silent, self.thought).decode

    def with_dials(self, manifest: DialManifest) -> Encoder:
        """Return the encoder of the same model with these dials, which its tokenizer holds by now.

        Raises:
            ModelError: If the tokenizer lacks the manifest's control tokens.
        """
        return Encoder(self.tokenizer, manifest, eos_ids=self._given_ends, rendering=self.rendering)

    def with_rendering(self, rendering: Rendering) -> Encoder:
        """Return the encoder of the same model, seals and all, for another rendering.

        Raises:
            ConfigError: A variable that the template does not know, or that is not to be set.
        """
        if rendering.key == self.rendering.key:
            return self
        if rendering.key not in self._others:
            found = copy.copy(self)
            found.rendering = rendering
            found._template = ChatTemplate(self.tokenizer, rendering)
            found._skeletons = self._skeletons.of_template(found._template)
            if len(self._others) >= _MAX_RENDERINGS:
                self._others.clear()
            self._others[rendering.key] = found
        return self._others[rendering.key]

    @property
    def eos_id(self) -> int:
        """The id that ends the assistant's turn: the template's, else the tokenizer's own."""
        if self._eos_id is None:
            raise ModelError(
                "the tokenizer has no end token",
                why="neither its chat template nor its eos_token nor generation_config names one",
                fix="set tokenizer.eos_token to the token that ends an answer",
            )
        return self._eos_id

    def prompt_ids(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids of a prompt: the chat template with its generation prompt.

        Raises:
            DataError: If the messages are no prompt (no user turn, last turn not the user's,
                blank, unknown role, not encodable), or the template refuses their order, or
                acts upon what they say.
            ModelError: If there is no chat template, or one that rewrites contents.
            EncodingError: If the result holds a marker that the template did not write.
        """
        contents, turns = self._fitted(messages)
        prepared = self._skeletons.of(turns)
        ids = self._sealed.encode(prepared.skeleton.fill(contents))
        return self._sealed.checked(ids, prepared.markers)

    def answered_ids(self, messages: Sequence[Message], answer: str) -> AnsweredIds:
        """Return the ids of a prompt and its answer, all as the chat template writes it.

        What stands behind the answer belongs to it: the end of the turn and, say, a line break.

        Raises:
            DataError, ModelError, EncodingError: See :meth:`prompt_ids`.
        """
        contents, turns = self._fitted(messages)
        prepared = self._skeletons.of((*turns, ("assistant", False)))
        if prepared.skeleton.slots[-1].message != len(messages):
            raise ModelError(
                "the chat template does not end with the answer",
                why="a reward model reads its score at the end of the answer's turn",
                fix="set format: pair, or use another chat template",
            )
        contents.append(self._sealed.untrusted(answer))
        head, said, tail = prepared.skeleton.around_last(contents)
        # What stands before and behind a marker is segmented apart, so the ids before the last
        # marker of the prompt are the same for every answer to it.
        cut, n_seal = max(head.rfind(self._sealed.nonce), 0), len(self._sealed.guard)
        encoding = self._sealed.encoding(head[cut:] + said + tail)
        before, skipped = list[int](), 0
        if cut:
            (seal,) = self._sealed.encoding(head[cut : cut + n_seal]).ids
            shared = self._once(head[: cut + n_seal]).ids
            before = shared[: len(shared) - 1 - shared[::-1].index(seal)]
            # A normaliser may write a blank before a text, here before the marker.
            skipped = encoding.ids.index(seal)
        offsets = encoding.offsets[skipped:]
        whole = self._sealed.own_ids([*before, *encoding.ids[skipped:]])
        ids, n_before = self._sealed.checked(whole, prepared.markers), len(before)
        # A token that reaches over the border belongs to the answer.
        start = sum(end <= len(head) - cut for _, end in offsets)
        stop = sum(begin < len(head) - cut + len(said) for begin, _ in offsets)
        return AnsweredIds(ids, n_before + start, n_before + max(start, stop))

    def control_ids(self, setting: DialSetting) -> tuple[int, ...]:
        """Return one control id per attribute; they follow the prompt's ids."""
        if self.manifest is None:
            raise ModelError(
                "this model has no dials",
                why="its directory holds no dials.json",
                fix="tune it first: `equipoise stage tune`",
            )
        return self.manifest.control_ids(setting)

    def completion_ids(self, text: str, *, finished: bool) -> list[int]:
        """Return the ids of a completion as what follows a marker, with its end if finished."""
        ids = self._sealed.encode(self._sealed.guard + self._sealed.untrusted(text))[1:]
        return self._sealed.checked(ids) + ([self.eos_id] if finished else [])

    def pair(self, first: str, second: str) -> PairIds:
        """Return the ids of two texts as two segments, e.g. ``[CLS] a [SEP] b [SEP]``.

        A tokenizer without such a form gets ``a <end> b <end>``.
        """
        own = self._sealed.own_ids
        one = self._once(self._sealed.untrusted(first))
        two = self._sealed.encoding(self._sealed.untrusted(second))
        if self._pair_form:
            expected = tuple(i for i in self._pair_form if i in self.forbidden)
            both = self._sealed.tokenizer.post_process(one, two, True)
            return PairIds(self._sealed.checked(own(both.ids), expected), list(both.type_ids))
        a, b = (self._sealed.checked(own(encoding.ids)) for encoding in (one, two))
        ids = [*a, self.eos_id, *b, self.eos_id]
        return PairIds(ids, [0] * (len(a) + 1) + [1] * (len(b) + 1))

    def most_tokens(self, sampling: Sampling) -> int:
        """Return the most tokens of one completion, its thoughts included, in any rendering."""
        return sampling.max_tokens + (sampling.max_thought_tokens if self.thought else 0)

    def budgets(self, sampling: Sampling) -> Sampling:
        """Return the sampling with no budget for thoughts where the prompts leave none open."""
        return sampling if self.thinks else sampling.model_copy(update={"max_thought_tokens": 0})

    def follower(self, prompt_ids: Sequence[int]) -> Follower:
        """Return what tells the answer from the thoughts among the ids sampled behind a prompt."""
        marks = self.thought
        return Follower(marks, marks is not None and self._last_mark(prompt_ids) == marks.open_id)

    @property
    def thinks(self) -> bool:
        """Whether a thought may come before an answer: prompts do not end behind one."""
        marks = self.thought
        asked = [Message("user", "a")]
        return marks is not None and self._last_mark(self.prompt_ids(asked)) != marks.close_id

    def _last_mark(self, prompt_ids: Sequence[int]) -> int | None:
        # Of all markers: a system turn may explain to the model what the marks of thoughts are.
        return next((i for i in reversed(prompt_ids) if i in self.forbidden), None)

    def _fitted(self, messages: Sequence[Message]) -> tuple[list[str], tuple[Turn, ...]]:
        check_prompt(messages)
        fit, clean = self._skeletons.contents.fit, self._sealed.untrusted
        contents = [fit(m.role, clean(m.content)) for m in messages]
        return contents, tuple((m.role, c == "") for m, c in zip(messages, contents, strict=True))
