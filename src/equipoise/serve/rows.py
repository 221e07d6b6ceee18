"""The rows that are decoded together: they join and leave between two tokens.

Only one thread may use a :class:`LiveRows`. The keys and values of all rows stand left-padded in
one cache; a newcomer is computed alone, behind the longest prefix that its salt has in the prefix
cache, and then put beside the others. So nothing that a row computes mixes with its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn.functional import pad

from equipoise.errors import ModelError, ServingError
from equipoise.models.drawing import draw, uniform_stream
from equipoise.serve import keyvalues
from equipoise.serve.engine import Generation, Token
from equipoise.serve.keyvalues import KeysValues
from equipoise.serve.prefix import PrefixCache

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

    from equipoise.dials.encode import Encoder

_CACHED = {"full_attention", "sliding_attention"}


@dataclass(eq=False)
class Row:
    """One generation while it is being sampled."""

    generation: Generation
    uniforms: np.ndarray[Any, np.dtype[np.float64]]  # (max_tokens,)
    position: int
    """Tokens of this row in the cache."""
    n_sampled: int = 0
    last_id: int = -1
    """The token drawn last, to be fed next."""


class LiveRows:
    """Rows in flight on one causal language model.

    Args:
        model: A causal LM in evaluation mode.
        encoder: Its encoder: end ids, masked ids.
        prefixes: Shared prompts.

    Raises:
        ModelError: The model keeps more than keys and values between two tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        encoder: Encoder,
        prefixes: PrefixCache[KeysValues] | None = None,
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
        self.prefixes = prefixes if prefixes is not None else PrefixCache[KeysValues](0)
        self._masked = torch.tensor(sorted(encoder.masked_ids), device=model.device)
        self._end_ids = frozenset(encoder.eos_ids)
        self._cache: DynamicCache | None = None
        self._mask = torch.zeros(0, 0, dtype=torch.long, device=model.device)  # (R, T)
        self._logits = torch.zeros(0, 0, device=model.device)  # (R, V), float32

    @torch.inference_mode()
    def join(self, generations: Sequence[Generation]) -> list[Row | Exception]:
        """Compute the prompts of newcomers and add them; a failing one leaves the others alone.

        Returns:
            Per generation its row, or what went wrong with it.
        """
        results: list[Row | Exception] = []
        joined: list[tuple[Row, DynamicCache, torch.Tensor]] = []
        for generation in generations:
            try:
                cache, logits = self._prefill(generation)
            except Exception as error:
                results.append(error)
                continue
            n = len(generation.prompt_ids) + len(generation.control_ids)
            row = Row(
                generation, uniform_stream(generation.seed, generation.sampling.max_tokens), n
            )
            joined.append((row, cache, logits))
            results.append(row)
        if joined:
            self._merge(joined)
        return results

    @torch.inference_mode()
    def draw(self) -> list[tuple[Row, Token | Exception]]:
        """Sample the next token of every row; finished and failed rows leave."""
        ids = self._drawn() if self.rows else []
        drawn: list[tuple[Row, Token | Exception]] = []
        for row, token_id in zip(self.rows, ids, strict=True):
            row.n_sampled, row.last_id = row.n_sampled + 1, token_id
            if token_id < 0:
                drawn.append((row, _not_finite()))
            elif token_id in self._end_ids:
                drawn.append((row, Token(-1, "stop")))
            elif row.n_sampled == row.generation.sampling.max_tokens:
                drawn.append((row, Token(token_id, "length")))
            else:
                drawn.append((row, Token(token_id)))
        self.leave([row for row, t in drawn if not isinstance(t, Token) or t.finish is not None])
        return drawn

    @torch.inference_mode()
    def advance(self) -> None:
        """Feed the tokens just drawn; afterwards the next ones can be drawn."""
        if not self.rows:
            return
        self._mask = pad(self._mask, (0, 1), value=1)
        device = self.model.device
        fed = torch.tensor([row.last_id for row in self.rows], device=device)
        positions = torch.tensor([row.position for row in self.rows], device=device)
        output = self.model(
            input_ids=fed[:, None],
            attention_mask=self._mask,
            position_ids=positions[:, None],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._logits = output.logits[:, -1].float()
        for row in self.rows:
            row.position += 1

    @torch.inference_mode()
    def leave(self, rows: Sequence[Row]) -> None:
        """Drop rows, and the columns that only they needed; unknown rows are ignored."""
        gone = set(map(id, rows))
        kept = [i for i, row in enumerate(self.rows) if id(row) not in gone]
        if len(kept) == len(self.rows):
            return
        self.rows = [self.rows[i] for i in kept]
        if not self.rows:
            self.clear()
            return
        at = torch.tensor(kept, device=self._mask.device)
        lead = self._mask.shape[1] - max(row.position for row in self.rows)
        self._mask = self._mask[at, lead:]
        self._logits = self._logits[at]
        keyvalues.keep(self._cache, at, lead)

    def clear(self) -> None:
        """Drop all rows."""
        self.rows, self._cache = [], None
        self._mask, self._logits = self._mask[:0, :0], self._logits[:0, :0]

    def _drawn(self) -> list[int]:
        """Return one id per row; -1 where the model's numbers are not finite."""
        scores = self._logits
        sound = torch.isfinite(scores).all(dim=1)
        scores = torch.where(sound[:, None], scores, 0.0)
        for i, row in enumerate(self.rows):
            for token_id, bias in row.generation.logit_bias:
                scores[i, token_id] += bias
        if len(self._masked):
            scores[:, self._masked] = -torch.inf  # after the biases, which cannot lift it
        ids = torch.full((len(self.rows),), -1, dtype=torch.long, device=scores.device)
        # The whole batch is drawn together unless its rows differ in the number of candidates.
        for top_k in {_top_k(row) for row in self.rows}:
            at = [i for i, row in enumerate(self.rows) if _top_k(row) == top_k]
            rows = [self.rows[i] for i in at]
            sampling = [row.generation.sampling for row in rows]
            heat = [s.temperature if s.temperature > 0 else 1.0 for s in sampling]
            ids[at] = draw(
                scores[at],
                scores.new_tensor([row.uniforms[row.n_sampled] for row in rows]),
                temperature=scores.new_tensor(heat)[:, None],
                top_p=scores.new_tensor([s.top_p for s in sampling])[:, None],
                top_k=top_k,
            )
        ids[~sound] = -1
        found: list[int] = ids.tolist()
        return found

    def _prefill(self, generation: Generation) -> tuple[DynamicCache, torch.Tensor]:
        """Compute prompt and control ids of one newcomer: (cache of one row, logits (1, V))."""
        prompt, device = generation.prompt_ids, self.model.device
        ids = (*prompt, *generation.control_ids)
        shared, held = self.prefixes.match(generation.prefix_salt, prompt)
        shared = min(shared, len(ids) - 1)  # the last position has to be computed for its logits
        cache = keyvalues.begin(held, shared)
        output = self.model(
            input_ids=torch.tensor([ids[shared:]], device=device),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long, device=device),
            position_ids=torch.arange(shared, len(ids), device=device)[None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self.prefixes.put(generation.prefix_salt, prompt, keyvalues.head(cache, len(prompt)))
        return cache, output.logits[:, -1].float()

    def _merge(self, joined: Sequence[tuple[Row, DynamicCache, torch.Tensor]]) -> None:
        """Lay newcomers below the rows that are there, all padded on the left to one width."""
        caches = [cache for _, cache, _ in joined]
        masks = [self._mask.new_ones(1, row.position) for row, _, _ in joined]
        logits = [given for _, _, given in joined]
        if self._cache is not None:
            caches.insert(0, self._cache)
            masks.insert(0, self._mask)
            logits.insert(0, self._logits)
        width = max(mask.shape[1] for mask in masks)
        lead = [width - mask.shape[1] for mask in masks]
        self._mask = torch.cat([pad(m, (n, 0)) for m, n in zip(masks, lead, strict=True)])
        self._logits = torch.cat(logits)
        self._cache = keyvalues.stack(caches, lead)
        self.rows += [row for row, _, _ in joined]


def _top_k(row: Row) -> int:
    sampling = row.generation.sampling
    return sampling.top_k if sampling.temperature > 0 else 1


def _not_finite() -> ServingError:
    return ServingError(
        "the model's numbers for this completion are not finite",
        why="weights or number type of the model may be broken",
        fix="serve it in float32, and check the model directory",
    )
