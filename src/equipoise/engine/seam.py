"""The seams between what asks and what samples: checked ids in, tokens out.

The stages hand over all requests at once (:class:`Engine`), the server one at a time
(:class:`ServingEngine`). The server has decided and checked everything by the time a
:class:`Generation` exists; an engine knows nothing of keys or policies.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from equipoise.config import Sampling
from equipoise.types import Completion, DialSetting, Finish, GenerationRequest, Judged


@dataclass(frozen=True)
class Generation:
    """One completion to sample, already checked."""

    prompt_ids: tuple[int, ...]
    control_ids: tuple[int, ...]
    """One per attribute; they follow the prompt's ids."""
    sampling: Sampling
    seed: int
    """63-bit; the completion depends on this seed only, never on its neighbours in the batch."""
    prefix_salt: str
    """Derived on the server from the key: prefixes are shared only under one salt."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(id, bias) pairs; ids are in the vocabulary and not forbidden, biases in [-100, 100]."""
    strengths: tuple[float, ...] = ()
    """Steering: one factor per direction of the engine; empty, or all zero, for none."""

    @property
    def given_ids(self) -> tuple[int, ...]:
        """Prompt and controls."""
        return (*self.prompt_ids, *self.control_ids)


@dataclass(frozen=True)
class Token:
    """One sampled token. The end token is not delivered: ``stop`` comes with ``id`` -1."""

    id: int
    finish: Finish | None = None
    """Not ``None`` on the last item only. ``length``: ``id`` is the last token of the limit."""
    thought: bool = False
    """Whether it is one of a thought, its marks included."""


@dataclass(frozen=True)
class Load:
    """How busy an engine is."""

    running: int
    queued: int
    slots: int


@dataclass(frozen=True)
class Sampled(Judged):
    """One sampled continuation."""

    token_ids: tuple[int, ...]
    """Thoughts included, the end token left out."""
    text: str
    """The answer alone."""
    finish: Finish

    @property
    def n_tokens(self) -> int:
        """Tokens sampled, the end token included."""
        return len(self.token_ids) + (self.finish == "stop")

    def as_completion(
        self,
        prompt_id: str,
        sample_index: int,
        *,
        model_hash: str,
        setting: DialSetting | None = None,
        round: int = 0,
    ) -> Completion:
        """Return the record of this continuation as a completion of a prompt."""
        return Completion(
            prompt_id=prompt_id,
            sample_index=sample_index,
            text=self.text,
            finish=self.finish,
            n_tokens=self.n_tokens,
            model_hash=model_hash,
            round=round,
            setting=setting,
        )


class Engine(Protocol):
    """Samples continuations. Shipped: :class:`equipoise.engine.sample.TransformersEngine`.

    An engine in another process fits here if it takes token ids and gives token ids (vLLM over
    HTTP does: a prompt may be a list of ids). It, or what speaks to it, has to

    - sample behind ``prompt_ids`` and ``control_ids`` as they are: no template, no special tokens;
    - let a branch's ids depend on its own seed only, whatever runs beside it. Another engine need
      not draw the ids that this one draws;
    - never draw one of ``Encoder.masked_ids`` (a bias of minus infinity, or a list of allowed ids),
      and end at one of ``Encoder.eos_ids``, which it does not return;
    - hold ``Encoder.budgets(sampling)``: count with ``Encoder.follower`` what belongs to a thought,
      and cut where ``Follower.finish`` says so;
    - give ``Encoder.decode`` of the ids as text, never a text of the other process;
    - refuse with a ``DataError``, before it samples anything, what does not fit into the context;
    - refuse ``Branch.strengths`` other than zero with a ``ValueError`` if it cannot steer.

    Attributes:
        model_hash: Of the weights that the engine holds.
    """

    model_hash: str

    def generate(
        self, requests: Sequence[GenerationRequest], sampling: Sampling
    ) -> list[list[Sampled]]:
        """Return one list per request, in order, with one item per branch, in order."""
        ...


class ServingEngine(Protocol):
    """Samples many generations at once. Shipped: the continuous batcher.

    In another process it has to do what :class:`Engine` lists, and besides take ``logit_bias``
    (which never lifts a masked id), share prefixes under one ``prefix_salt`` only (vLLM:
    ``cache_salt``), mark the tokens of thoughts, and stop a completion there when the iterator is
    closed here.
    """

    @property
    def healthy(self) -> bool:
        """False while the engine cannot sample; ``/readyz`` answers 503 then."""
        ...

    def stream(self, generation: Generation) -> AsyncIterator[Token]:
        """Yield tokens until one has a ``finish``.

        Closing the iterator (``aclose`` or cancellation) frees the slot within one decode step.
        """
        ...

    def load(self) -> Load:
        """Return the counts of this moment."""
        ...

    async def start(self) -> None:
        """Begin to sample."""
        ...

    async def drain(self, seconds: float) -> None:
        """Take no more work, finish what runs for at most ``seconds``, then stop.

        Returns soon after that also where a step hangs.
        """
        ...
