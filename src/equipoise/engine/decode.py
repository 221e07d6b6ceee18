"""The one decoder: rows join, draw, advance and leave.

Self-generation, the server and the terminal chat all decode with it. Only one thread may use a
:class:`LiveRows`. Newcomers are computed together, each behind the longest prefix that its salt has
in the prefix cache, and then laid below the others. Attention never crosses rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from equipoise.engine.cache import Batch, KeysValues, PrefixCache, begin, cut
from equipoise.engine.draw import Row, pick
from equipoise.engine.seam import Generation, Token
from equipoise.errors import ModelError, ServingError
from equipoise.models.layers import shifted
from equipoise.models.limits import masked_ids

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from equipoise.encoding.encode import Encoder

_CACHED = {"full_attention", "sliding_attention"}


class LiveRows:
    """Rows in flight on one causal language model.

    Args:
        model: A causal LM in evaluation mode.
        encoder: Its encoder: end ids, masked ids.
        prefixes: Shared prompts; by default none are kept from one call to the next.
        steering: Vectors (A, D) and the index of the layer behind which
            ``Generation.strengths`` of them are added, at every control and sampled position of a
            row, never in its prompt.

    Raises:
        ModelError: The model keeps more than keys and values between two tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        encoder: Encoder,
        prefixes: PrefixCache[KeysValues] | None = None,
        *,
        steering: tuple[torch.Tensor, int] | None = None,
    ) -> None:
        config = model.config.get_text_config()
        unknown = set(getattr(config, "layer_types", None) or ()) - _CACHED
        if unknown:
            raise ModelError(
                "this model cannot be decoded row by row",
                why=f"it has layers of kind {', '.join(sorted(unknown))}, whose memory is not keys "
                "and values",
                fix="serve it with another engine; see docs/serving.md",
            )
        self.model, self.rows = model, list[Row]()
        self.batch: Batch | None = None
        """Of :attr:`rows`, in their order."""
        self.prefixes = prefixes if prefixes is not None else PrefixCache[KeysValues](0)
        self._encoder, self._steering = encoder, steering
        self._masked = masked_ids(encoder, model).to(model.device)
        self._end_ids = frozenset(encoder.eos_ids)

    def join(self, generations: Sequence[Generation]) -> list[Row | Exception]:
        """Compute the prompts of newcomers and add them; a failing one leaves the others alone.

        Returns:
            Per generation its row, or what went wrong with it.
        """
        alike: dict[tuple[int, int], list[int]] = {}
        for i, g in enumerate(generations):
            # All are fed as many ids as the longest of those computed together.
            new = len(g.given_ids) - self.prefixes.shared(g.prefix_salt, g.prompt_ids)
            alike.setdefault((len(g.control_ids), new.bit_length()), []).append(i)
        found: dict[int, Row | Exception] = {}
        for together in alike.values():
            try:
                rows = self._add([generations[i] for i in together])
                found.update(zip(together, rows, strict=True))
            except Exception as error:
                if len(together) == 1:
                    found[together[0]] = error
                    continue
                for i in together:  # one by one, so that only the one at fault fails
                    (found[i],) = self.join([generations[i]])
        return [found[i] for i in range(len(generations))]

    @torch.inference_mode()
    def read(self, prompts: Sequence[tuple[str, tuple[int, ...], tuple[int, ...]]]) -> Batch:
        """Compute prompts in one forward, and keep them for others under their salts.

        All of them are fed the same number of ids, so that none has a gap behind its prefix: one
        with a longer prefix in the cache recomputes the end of it.

        Args:
            prompts: Salt, prompt, and ids that belong behind it for this one row.

        Returns:
            One row per prompt, of which :meth:`branch` makes rows in flight.
        """
        wholes = [(*prompt, *behind) for _, prompt, behind in prompts]
        held = [self.prefixes.match(salt, prompt) for salt, prompt, _ in prompts]
        # The last position has to be computed for its logits, whatever is held.
        fed = max(
            len(whole) - min(shared, len(whole) - 1)
            for whole, (shared, _) in zip(wholes, held, strict=True)
        )
        reused = [max(0, len(whole) - fed) for whole in wholes]
        width = max(reused) + fed
        ids = torch.zeros(len(wholes), fed, dtype=torch.long)  # (R, fed)
        mask = torch.zeros(len(wholes), width, dtype=torch.long)  # (R, T)
        for row, (whole, known) in enumerate(zip(wholes, reused, strict=True)):
            ids[row, fed - len(whole) + known :] = torch.tensor(whole[known:], dtype=torch.long)
            mask[row, width - len(whole) :] = 1
        cache, mask = begin([state for _, state in held], reused), mask.to(self.model.device)
        batch = Batch(cache, mask, None, shift=mask.new_zeros(len(mask), 0))
        self._forward(batch, ids)
        if self.prefixes.max_tokens:
            for row, (salt, prompt, behind) in enumerate(prompts):
                end = width - len(behind)
                self.prefixes.put(salt, prompt, cut(cache, row, end - len(prompt), end))
        return batch

    @torch.inference_mode()
    def branch(
        self, prompts: Batch, source: Sequence[int], generations: Sequence[Generation]
    ) -> list[Row]:
        """Add generations behind prompts that have been read once; they stay for further ones.

        Args:
            prompts: From :meth:`read`.
            source: Per generation, which of the prompts is its own.
            generations: With as many control ids each.
        """
        device = self.model.device
        batch = prompts.select(torch.tensor(source, device=device), self._shift(generations))
        if generations[0].control_ids:
            fed = torch.tensor([g.control_ids for g in generations])  # (R, n)
            batch.mask = pad(batch.mask, (0, fed.shape[1]), value=1)
            self._forward(batch, fed)
        return self._merge(generations, batch)

    @torch.inference_mode()
    def draw(self) -> list[tuple[Row, Token | Exception]]:
        """Sample the next token of every row; finished and failed rows leave."""
        if self.batch is None:
            return []
        assert self.batch.logits is not None, "draw comes after join or advance"
        ids, self.batch.logits = pick(self.batch.logits, self.rows, self._masked), None
        drawn: list[tuple[Row, Token | Exception]] = [
            (row, row.take(i, i in self._end_ids) if i >= 0 else _not_finite())
            for row, i in zip(self.rows, ids, strict=True)
        ]
        self.leave([row for row, t in drawn if isinstance(t, Exception) or t.finish is not None])
        return drawn

    @torch.inference_mode()
    def advance(self) -> None:
        """Feed the tokens just drawn; afterwards the next ones can be drawn."""
        if self.batch is None:
            return
        self.batch.mask = pad(self.batch.mask, (0, 1), value=1)
        self._forward(self.batch, torch.tensor([[row.ids[-1]] for row in self.rows]))  # (R, 1)

    @torch.inference_mode()
    def leave(self, rows: Sequence[Row]) -> None:
        """Drop rows, and the columns that only they needed; unknown rows are ignored."""
        gone = set(rows)
        kept = [i for i, row in enumerate(self.rows) if row not in gone]
        if self.batch is None or len(kept) == len(self.rows):
            return
        if kept:
            self.rows = self.batch.keep(kept, self.rows)
        else:
            self.clear()

    def clear(self) -> None:
        """Drop all rows."""
        self.rows, self.batch = [], None

    def run(self) -> Iterator[tuple[Row, Token | Exception]]:
        """Draw and advance until no row is left; yields what each row draws."""
        while self.rows:
            yield from self.draw()
            self.advance()

    @torch.inference_mode()
    def _add(self, generations: Sequence[Generation]) -> list[Row]:
        """Compute newcomers and lay them below the rows that are there."""
        prompts = list(dict.fromkeys((g.prefix_salt, g.prompt_ids) for g in generations))
        if len(prompts) < len(generations) or any(g.strengths for g in generations):
            source = [prompts.index((g.prefix_salt, g.prompt_ids)) for g in generations]
            return self.branch(self.read([(*one, ()) for one in prompts]), source, generations)
        # Nothing to share: prompts and controls go through the model together.
        batch = self.read([(g.prefix_salt, g.prompt_ids, g.control_ids) for g in generations])
        batch.shift = self._shift(generations)
        return self._merge(generations, batch)

    def _merge(self, generations: Sequence[Generation], batch: Batch) -> list[Row]:
        rows = [Row.begin(g, self._encoder, self.model.device) for g in generations]
        if self.batch is None:
            self.batch = batch
        else:
            self.batch.stack(batch)
        self.rows += rows
        return rows

    def _shift(self, generations: Sequence[Generation]) -> torch.Tensor:
        """Return what is added to each row's residual stream: (R, D), or (R, 0) without."""
        if self._steering is None:
            if any(strength for g in generations for strength in g.strengths):
                raise ValueError("branches have strengths, and the engine has no directions")
            return torch.zeros(len(generations), 0, device=self.model.device)
        vectors, _ = self._steering
        none = (0.0,) * len(vectors)
        strengths = torch.tensor([g.strengths or none for g in generations], dtype=torch.float32)
        return (strengths @ vectors.float()).to(self.model.device)

    def _forward(self, batch: Batch, ids: torch.Tensor) -> None:
        """Feed ids (R, n), which the mask covers already, and put the logits into the batch."""
        steered: AbstractContextManager[None] = nullcontext()
        if self._steering is not None and batch.shift.shape[1]:
            steered = shifted(self.model, self._steering[1], lambda: batch.shift)
        with steered:
            output = self.model(
                input_ids=ids.to(self.model.device),
                attention_mask=batch.mask,
                position_ids=(batch.mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :],
                past_key_values=batch.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        batch.logits = output.logits[:, -1].float()  # (R, V)


def _not_finite() -> ServingError:
    return ServingError(
        "the model's numbers for this completion are not finite",
        why="weights or number type of the model may be broken",
        fix="serve it in float32, and check the model directory",
    )
