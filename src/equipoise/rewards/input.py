"""(Prompt, completion) -> ids of a reward model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from equipoise.errors import ModelError
from equipoise.types import Message

if TYPE_CHECKING:
    from equipoise.encoding.encode import Encoder

Format = Literal["auto", "chat", "pair"]
_PROMPT_SHARE = 4
"""A prompt keeps at least this fraction (1/n) of the length before the completion is cut."""


@dataclass(frozen=True)
class RewardInput:
    """One encoded row."""

    ids: tuple[int, ...]
    type_ids: tuple[int, ...]
    """Segment of each id, all 0 for causal models."""
    answer: tuple[int, int]
    """Span of the completion's ids, end token included."""
    truncated: bool


@dataclass(frozen=True)
class EncodedRow:
    """A labelled answer (one side), or a pair (chosen, rejected)."""

    sides: tuple[RewardInput, ...]
    score: float
    """In [0, 1]; 1 for a pair."""


@dataclass(frozen=True)
class InputEncoder:
    """Encodes rows for one reward model, through :class:`~equipoise.encoding.encode.Encoder`."""

    encoder: Encoder
    format: Literal["chat", "pair"]
    max_length: int

    @classmethod
    def of(cls, encoder: Encoder, *, format: Format, max_length: int) -> InputEncoder:
        """Settle ``auto`` and check that the format is possible.

        Raises:
            ModelError: ``chat`` without a chat template, or a length that leaves no room.
        """
        natural: Literal["chat", "pair"] = "chat" if encoder.has_chat_template else "pair"
        chosen = natural if format == "auto" else format
        if chosen == "chat" and not encoder.has_chat_template:
            raise ModelError(
                "The reward model has no chat template",
                why="format: chat was asked for, and the tokenizer brings no template.",
                fix="Set format: pair, or add chat_template.jinja to the model.",
            )
        if max_length < 16:
            raise ModelError(
                f"max_length {max_length} is too short for a reward model",
                why="A prompt and a completion must both be seen in part.",
                fix="Set max_length to 16 or more.",
            )
        return cls(encoder, chosen, max_length)

    def __call__(self, messages: Sequence[Message], completion: str) -> RewardInput:
        """Encode one row; a long prompt loses its beginning, a long completion its end."""
        if self.format == "chat":
            return self._chat(messages, completion)
        return self._pair(flatten(messages), completion)

    def _chat(self, messages: Sequence[Message], completion: str) -> RewardInput:
        whole, start, stop = self.encoder.answered_ids(messages, completion)
        prompt, answer, tail = whole[:start], whole[start:stop], whole[stop:]
        # The end of the turn always stands last, cut or not: it is where a causal head reads.
        room = self.max_length - len(tail)
        keep_prompt, keep_answer = self._shares(len(prompt), len(answer), room)
        ids = (*prompt[len(prompt) - keep_prompt :], *answer[:keep_answer], *tail)
        ends = [i for i, token_id in enumerate(tail) if token_id in self.encoder.eos_ids]
        end = keep_prompt + keep_answer + (ends[0] + 1 if ends else 0)
        truncated = keep_prompt + keep_answer < len(prompt) + len(answer)
        return RewardInput(ids, (0,) * len(ids), (keep_prompt, end), truncated)

    def _pair(self, prompt: str, completion: str) -> RewardInput:
        ids, types = self.encoder.pair(prompt, completion)
        first, second = self._segments(ids)
        room = self.max_length - (len(ids) - len(first) - len(second))
        keep_first, keep_second = self._shares(len(first), len(second), room)
        dropped = {*first[: len(first) - keep_first], *second[keep_second:]}
        kept = [i for i in range(len(ids)) if i not in dropped]
        start = len(kept) if not keep_second else kept.index(second[0])
        return RewardInput(
            tuple(ids[i] for i in kept),
            tuple(types[i] for i in kept),
            (start, len(kept)),
            truncated=bool(dropped),
        )

    def _segments(self, ids: Sequence[int]) -> tuple[list[int], list[int]]:
        """Positions of the two texts: what stands between the markers, which no text can write."""
        runs: list[list[int]] = []
        fresh = True
        for position, token_id in enumerate(ids):
            if token_id in self.encoder.forbidden:
                fresh = True
                continue
            if fresh:
                runs.append([])
            runs[-1].append(position)
            fresh = False
        first = runs[0] if len(runs) > 1 else []
        return first, runs[-1] if runs else []

    def _shares(self, n_prompt: int, n_answer: int, room: int) -> tuple[int, int]:
        keep_answer = min(n_answer, room - min(n_prompt, room // _PROMPT_SHARE))
        return min(n_prompt, room - keep_answer), keep_answer


def flatten(messages: Sequence[Message]) -> str:
    """One text for models without chat turns: the bare user text, or the turns with speakers."""
    turns = [m for m in messages if m.role != "system"]
    if len(turns) == 1:
        return turns[0].content
    names = {"user": "Human", "assistant": "Assistant"}
    return "\n\n".join(f"{names[m.role]}: {m.content}" for m in turns)


def length_batches(lengths: Sequence[int], batch_size: int) -> Iterator[list[int]]:
    """Indices in batches of similar length, longest first (memory shows at once)."""
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]
