"""The thought that a reasoning model writes before its answer, and the answer told from it.

The marks are a pair of added tokens, the closing one spelt as the opening one with a slash:
``<think>`` and ``</think>``. Other pairs are spelt so too (``[INST]``, ``<tool_call>``), hence the
rule: the template writes one of the two inside an assistant's turn, or treats what an assistant's
content holds before the closing one as a thought; and the pair does not enclose a user's content.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from equipoise.encoding.sealing import random_letters
from equipoise.errors import ConfigError, DataError

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from equipoise.config import Sampling
    from equipoise.encoding.encode import Encoder
    from equipoise.encoding.sealing import SealedTokenizer
    from equipoise.encoding.template import ChatTemplate
    from equipoise.types import Finish, TemplateValue

_SWITCHES = ("enable_thinking", "thinking")
"""Variables by which templates begin a thought, or an empty one."""


@dataclass(frozen=True)
class Thought:
    """The two marks of a model's thoughts."""

    open_id: int
    close_id: int
    end: str
    """The text of the closing mark."""

    @property
    def ids(self) -> frozenset[int]:
        """Both marks."""
        return frozenset((self.open_id, self.close_id))

    def begun_before(self, ids: Sequence[int]) -> bool:
        """Whether ids begin within a thought: its end comes first."""
        return next((i == self.close_id for i in ids if i in self.ids), False)


@dataclass
class Follower:
    """Follows sampled ids, and tells the answer from the thoughts.

    Attributes:
        thought: The marks; ``None`` for a model without.
        within: Whether the ids so far end in an open thought.
        n_thought: Ids of thoughts so far, their marks included.
        n_answer: All other ids so far.
        behind: Whether the answer begins behind a thought: the line breaks at its beginning are
            then none of it.
    """

    thought: Thought | None
    within: bool = False
    n_thought: int = 0
    n_answer: int = 0
    behind: bool = False

    def finish(self, sampling: Sampling) -> Finish | None:
        """Return how the limits end the completion here, or None if they do not."""
        if self.within and self.n_thought >= sampling.max_thought_tokens:
            return "thought"
        # Marks in turn could go on for ever without a word of the answer.
        most = sampling.max_tokens + sampling.max_thought_tokens
        over = self.n_answer >= sampling.max_tokens or self.n_answer + self.n_thought >= most
        return "length" if over else None

    def take(self, token_id: int) -> bool:
        """Count one sampled id; return whether it belongs to the answer."""
        if self.thought is not None and token_id in self.thought.ids:
            self.within = token_id == self.thought.open_id
            self.behind |= not self.within and not self.n_answer
        elif not self.within:
            self.n_answer += 1
            return True
        self.n_thought += 1
        return False


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
        """Return the answer among sampled ids; thoughts, markers and end tokens are left out.

        ``within`` says that the prompt ends within a thought.
        """
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


def refuse_thoughts(encoder: Encoder) -> None:
    """Refuse to learn from answers that a thought may come before.

    Raises:
        ConfigError: The prompts of this encoder leave room for a thought.
    """
    if encoder.thinks:
        raise ConfigError(
            "a model cannot be tuned while it thinks",
            why="dials are learnt at the head of an answer, and its prompts leave a thought open: "
            "the model would be taught answers without one, behind prompts that ask for one",
            fix="set chat_template_kwargs: {enable_thinking: false} where the chat template knows "
            "it, or tune a copy of the model whose template writes no thought, or an empty one",
        )


def find_thought(backend: Tokenizer, template: ChatTemplate) -> Thought | None:
    """Return the marks of the thoughts that a chat template knows of, or None."""
    if not template.exists:
        return None
    added = {token.content: i for i, token in backend.get_added_tokens_decoder().items()}
    pairs = [(text.replace("/", "", 1), text) for text in added if "/" in text]
    pairs = [(opening, closing) for opening, closing in pairs if opening in added]
    source = template.literals()
    for opening, closing in pairs:
        # The letters within a template's markers are spelt out somewhere in it.
        if (opening in source or closing in source) and _is_thought(opening, closing, template):
            return Thought(added[opening], added[closing], closing)
    return None


def _is_thought(opening: str, closing: str, template: ChatTemplate) -> bool:
    found = False
    for pieces in _rendered(template):
        for before, role, after in pieces:
            if role == "user" and opening in before and closing in after:
                return False
            found |= role == "assistant" and (opening in before or closing in before)
    return found or _drops(closing, template)


def _rendered(template: ChatTemplate) -> Iterator[list[tuple[str, str, str]]]:
    """Yield, per way to render, (text before, role, text behind) of every content.

    The head of a turn to come counts as text before an assistant's content.
    """
    switches: list[Mapping[str, TemplateValue]] = [{}]
    switches += [{n: on} for n in _SWITCHES if n in template.known for on in (True, False)]
    for roles in (["user"], ["user", "assistant"], ["user", "assistant", "user"]):
        asked = roles[-1] == "user"
        for changed in switches:
            for reasoning in (None, random_letters()) if "assistant" in roles else (None,):
                contents = [random_letters() for _ in roles]
                try:
                    text = template.render(
                        [(role, False) for role in roles],
                        contents,
                        generation_prompt=asked,
                        reasoning=reasoning,
                        **changed,
                    )
                except DataError:
                    continue
                pieces = []
                for content in contents:
                    before, _, text = text.partition(content)
                    pieces.append(before)
                pieces.append(text)
                ends = [*roles, "assistant"] if asked else roles
                yield list(zip(pieces, ends, [*pieces[1:], ""], strict=False))


def _drops(closing: str, template: ChatTemplate) -> bool:
    """True if the template leaves out what an earlier answer holds before the closing mark."""
    dropped, kept, *others = (random_letters() for _ in range(4))
    turns = [(role, False) for role in ("user", "assistant", "user")]
    contents = [others[0], dropped + closing + kept, others[1]]
    try:
        text = template.render(turns, contents, generation_prompt=True)
    except DataError:
        return False
    return kept in text and dropped not in text
