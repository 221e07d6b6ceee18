"""The one way from text to token ids, used by every stage.

Contents never pass through Jinja and can never produce a forbidden id: markers are written by the
encoder alone, through a sealed copy of the tokenizer (:mod:`equipoise.encoding.sealing`), and each
result is checked before it leaves.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from equipoise.config import Sampling
from equipoise.encoding import markers, sealing
from equipoise.encoding.skeletons import Skeletons
from equipoise.encoding.template import ChatTemplate, Turn, check_prompt
from equipoise.encoding.thoughts import AnswerDecoder, Follower, find_thought
from equipoise.errors import DataError, EncodingError, ModelError
from equipoise.types import PLAIN, DialSetting, Message, Rendering

if TYPE_CHECKING:
    from tokenizers import Encoding
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
        self.tokenizer = tokenizer
        self.manifest = manifest
        self._backend = markers.fast_backend(tokenizer)
        self.rendering = rendering
        self._template = ChatTemplate(tokenizer, rendering)
        self.has_chat_template = self._template.exists
        controls = markers.control_ids(self._backend, manifest)
        self.thought = find_thought(self._backend, self._template)
        """The marks of the model's thoughts; None for a model without."""
        marks = self.thought.ids if self.thought is not None else frozenset[int]()
        written = markers.marker_ids(tokenizer, self._backend, self._template)
        self.forbidden: frozenset[int] = controls | written | marks
        """Ids that no untrusted text can produce."""
        self._sealed = sealing.seal(self._backend, self.forbidden)
        thought_end = None
        if self.thought is not None:
            thought_end = self._backend.id_to_token(self.thought.close_id)
        self._skeletons = Skeletons(
            self._template, self._backend, self._sealed, self.forbidden, controls, thought_end
        )
        self._others: dict[str, Encoder] = {}
        self._latest: tuple[str, Encoding] | None = None
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
        self._decoder = AnswerDecoder(self._backend, self._sealed, silent, self.thought)

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
        found = self._others.get(rendering.key)
        if found is None:
            found = copy.copy(self)
            found.rendering = rendering
            found._template = ChatTemplate(self.tokenizer, rendering)
            found._skeletons = self._skeletons.of_template(found._template)
            if len(self._others) >= _MAX_RENDERINGS:
                self._others.clear()
            self._others[rendering.key] = found
        return found

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
        text = prepared.skeleton.fill(contents)
        return self._checked(self._sealed.encode(text), prepared.markers)

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
        head, said, tail = prepared.skeleton.around_last([*contents, self._untrusted(answer)])
        # What stands before and behind a marker is segmented apart, so the ids before the last
        # marker of the prompt are the same for every answer to it.
        cut = max(head.rfind(self._sealed.nonce), 0)
        before, first = self._until(head[: cut + len(self._sealed.guard)]) if cut else ([], None)
        encoding = self._sealed.tokenizer.encode(head[cut:] + said + tail, add_special_tokens=False)
        # A normaliser may write a blank before a text, here before the marker.
        skipped = encoding.ids.index(first) if first is not None else 0
        offsets = encoding.offsets[skipped:]
        whole = self._sealed.own_ids([*before, *encoding.ids[skipped:]])
        ids, n_before = self._checked(whole, prepared.markers), len(before)
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
                fix="tune it first: `equipoise tune`",
            )
        return self.manifest.control_ids(setting)

    def completion_ids(self, text: str, *, finished: bool) -> list[int]:
        """Return the ids of a completion, encoded as what follows a marker.

        Args:
            text: The completion; untrusted.
            finished: Whether the end token is appended.
        """
        ids = self._sealed.encode(self._sealed.guard + self._untrusted(text))[1:]
        return self._checked(ids, ()) + ([self.eos_id] if finished else [])

    def pair(self, first: str, second: str) -> PairIds:
        """Return the ids of two texts as two segments, e.g. ``[CLS] a [SEP] b [SEP]``.

        A tokenizer without such a form gets ``a <end> b <end>``.
        """
        own, tokenizer = self._sealed.own_ids, self._sealed.tokenizer
        one = self._once(self._untrusted(first))
        two = tokenizer.encode(self._untrusted(second), add_special_tokens=False)
        if self._pair_form:
            expected = tuple(i for i in self._pair_form if i in self.forbidden)
            both = tokenizer.post_process(one, two, True)
            return PairIds(self._checked(own(both.ids), expected), list(both.type_ids))
        a, b = (self._checked(own(encoding.ids), ()) for encoding in (one, two))
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
        if self.thought is None:
            return False
        prompt = self.prompt_ids([Message("user", "a")])
        return self._last_mark(prompt) != self.thought.close_id

    def _last_mark(self, prompt_ids: Sequence[int]) -> int | None:
        # Of all markers: a system turn may explain to the model what the marks of thoughts are.
        return next((i for i in reversed(prompt_ids) if i in self.forbidden), None)

    def decode(self, ids: Sequence[int], *, within: bool = False) -> str:
        """Return the answer among sampled ids; thoughts, markers and end tokens are left out.

        Args:
            ids: As sampled.
            within: Whether the prompt ends within a thought.
        """
        return self._decoder.decode(ids, within=within)

    def _fitted(self, messages: Sequence[Message]) -> tuple[list[str], tuple[Turn, ...]]:
        check_prompt(messages)
        rules = self._skeletons.contents
        contents = [rules.fit(m.role, self._untrusted(m.content)) for m in messages]
        roles = [message.role for message in messages]
        return contents, tuple(zip(roles, [c == "" for c in contents], strict=True))

    def _until(self, text: str) -> tuple[list[int], int]:
        """Return the sealed ids before the seal that ends a text, and the seal's."""
        seal = self._sealed.tokenizer.token_to_id(text[-len(self._sealed.guard) :])
        assert seal is not None
        ids = self._once(text).ids
        return ids[: len(ids) - 1 - ids[::-1].index(seal)], seal

    def _once(self, text: str) -> Encoding:
        """Encode a prompt, or give what it was encoded to: its completions come in a row."""
        if self._latest is None or self._latest[0] != text:
            encoding = self._sealed.tokenizer.encode(text, add_special_tokens=False)
            self._latest = (text, encoding)
        return self._latest[1]

    def _untrusted(self, text: str) -> str:
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise DataError(
                "a text cannot be encoded as UTF-8",
                why=f"it holds a lone surrogate at character {error.start}",
                fix="repair the source, e.g. text.encode('utf-8', 'replace').decode()",
            ) from error
        if self._sealed.nonce in text:
            raise _forged()
        return text

    def _checked(self, ids: Sequence[int], expected: tuple[int, ...]) -> list[int]:
        if tuple(token_id for token_id in ids if token_id in self.forbidden) != expected:
            raise _forged()
        return list(ids)


def _forged() -> EncodingError:
    return EncodingError(
        "a text would have produced a marker of the model",
        why="only the encoder may write control tokens and chat markers",
        fix="leave this prompt or completion out; please report it, as it should be impossible",
    )
