"""The rows that are decoded together: they join and leave between two tokens.

Only one thread may use a :class:`LiveRows`. The keys and values of all rows stand left-padded in
one cache; newcomers are computed together, each behind the longest prefix that its salt has in the
prefix cache, and then laid below the others. Attention never crosses rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from equipoise.engine import cache as keyvalues
from equipoise.engine.cache import KeysValues, Move, PrefixCache
from equipoise.engine.draw import Row, bias_of, pick, uniform_stream
from equipoise.engine.seam import Generation, Token
from equipoise.errors import ModelError, ServingError
from equipoise.models.vocabulary import masked_ids

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

    from equipoise.encoding.encode import Encoder

_CACHED = {"full_attention", "sliding_attention"}


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
        self._encoder = encoder
        self.prefixes = prefixes if prefixes is not None else PrefixCache[KeysValues](0)
        self._masked = masked_ids(encoder, model).to(model.device)
        self._end_ids = frozenset(encoder.eos_ids)
        self._cache: DynamicCache | None = None
        self._mask = torch.zeros(0, 0, dtype=torch.long, device=model.device)  # (R, T)
        self._logits: torch.Tensor | None = None  # (R, V), float32; None from draw to advance

    @torch.inference_mode()
    def join(self, generations: Sequence[Generation]) -> list[Row | Exception]:
        """Compute the prompts of newcomers and add them; a failing one leaves the others alone.

        Returns:
            Per generation its row, or what went wrong with it.
        """
        found: dict[int, Row | Exception] = {}
        for batch in self._waves(generations):
            given = [generations[i] for i in batch]
            try:
                found.update(zip(batch, self._add(given), strict=True))
            except Exception as error:
                if len(batch) == 1:
                    found[batch[0]] = error
                    continue
                for i in batch:  # one by one, so that only the one at fault fails
                    try:
                        found[i] = self._add([generations[i]])[0]
                    except Exception as own:
                        found[i] = own
        return [found[i] for i in range(len(generations))]

    @torch.inference_mode()
    def draw(self) -> list[tuple[Row, Token | Exception]]:
        """Sample the next token of every row; finished and failed rows leave."""
        if not self.rows:
            return []
        assert self._logits is not None, "draw comes after join or advance"
        ids, self._logits = pick(self._logits, self.rows, self._masked), None
        drawn: list[tuple[Row, Token | Exception]] = []
        for row, token_id in zip(self.rows, ids, strict=True):
            row.n_sampled, row.last_id = row.n_sampled + 1, token_id
            if token_id < 0:
                drawn.append((row, _not_finite()))
            elif token_id in self._end_ids:
                drawn.append((row, Token(-1, "thought" if row.follower.within else "stop")))
            else:
                thought = not row.follower.take(token_id)
                finish = row.follower.finish(row.generation.sampling)
                drawn.append((row, Token(token_id, finish, thought)))
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
        if not kept:
            self.clear()
            return
        move = Move.keeping(kept)
        self.rows = move.of_list(self.rows)
        lead = self._mask.shape[1] - max(row.position for row in self.rows)
        self._mask = move.of(self._mask)[:, lead:]
        if self._logits is not None:
            self._logits = move.of(self._logits)
        keyvalues.keep(self._cache, move, lead)

    def clear(self) -> None:
        """Drop all rows."""
        self.rows, self._cache, self._logits = [], None, None
        self._mask = self._mask[:0, :0]

    def _waves(self, generations: Sequence[Generation]) -> Iterator[list[int]]:
        """Yield the indices of newcomers that are computed together."""
        first: dict[tuple[str, tuple[int, ...]], int] = {}
        if self.prefixes.max_tokens:
            for i, generation in enumerate(generations):
                first.setdefault((generation.prefix_salt, generation.prompt_ids), i)
        leaders = set(first.values())
        # Those whose prompt another newcomer brings along come later and take it from the cache.
        later = [i for i in range(len(generations)) if first and i not in leaders]
        for wave in ([i for i in range(len(generations)) if i not in set(later)], later):
            sizes: dict[int, list[int]] = {}
            for i in wave:
                g = generations[i]
                new = _n_ids(g) - self.prefixes.shared(g.prefix_salt, g.prompt_ids)
                sizes.setdefault(new.bit_length(), []).append(i)
            yield from sizes.values()

    def _add(self, generations: Sequence[Generation]) -> list[Row]:
        """Compute newcomers in one forward and lay them below the rows that are there.

        All of them are fed the same number of ids, so that none has a gap behind its prefix: one
        with a longer prefix in the cache recomputes the end of it.
        """
        device = self.model.device
        held = [self.prefixes.match(g.prefix_salt, g.prompt_ids) for g in generations]
        # The last position has to be computed for its logits, whatever is held.
        fed = max(
            _n_ids(g) - min(shared, _n_ids(g) - 1)
            for g, (shared, _) in zip(generations, held, strict=True)
        )
        reused = [max(0, _n_ids(g) - fed) for g in generations]
        cache = keyvalues.begin([state for _, state in held], reused)
        ids = torch.zeros(len(generations), fed, dtype=torch.long)
        mask = torch.zeros(len(generations), max(reused) + fed, dtype=torch.long)
        for i, (g, known) in enumerate(zip(generations, reused, strict=True)):
            new = (*g.prompt_ids, *g.control_ids)[known:]
            ids[i, fed - len(new) :] = torch.tensor(new, dtype=torch.long)
            mask[i, mask.shape[1] - _n_ids(g) :] = 1
        mask = mask.to(device)
        output = self.model(
            input_ids=ids.to(device),
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0)[:, -fed:],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        for i, g in enumerate(generations):
            start = mask.shape[1] - _n_ids(g)
            state = keyvalues.cut(cache, i, start, start + len(g.prompt_ids))
            self.prefixes.put(g.prefix_salt, g.prompt_ids, state)
        rows = [
            Row(
                g,
                self._encoder.follower(g.prompt_ids),
                uniform_stream(g.seed, self._encoder.most_tokens(g.sampling)),
                _n_ids(g),
                bias_of(g, device),
            )
            for g in generations
        ]
        self._merge(rows, cache, mask, output.logits[:, -1].float())
        return rows

    def _merge(
        self, rows: list[Row], cache: DynamicCache, mask: torch.Tensor, logits: torch.Tensor
    ) -> None:
        """Lay newcomers below the rows that are there, all padded on the left to one width."""
        if self._cache is None:
            self._cache, self._mask, self._logits = cache, mask, logits
        else:
            assert self._logits is not None, "rows join between advance and draw"
            width = max(self._mask.shape[1], mask.shape[1])
            lead = [width - self._mask.shape[1], width - mask.shape[1]]
            self._mask = torch.cat([pad(self._mask, (lead[0], 0)), pad(mask, (lead[1], 0))])
            self._logits = torch.cat([self._logits, logits])
            self._cache = keyvalues.stack((self._cache, cache), lead)
        self.rows += rows


def _not_finite() -> ServingError:
    return ServingError(
        "the model's numbers for this completion are not finite",
        why="weights or number type of the model may be broken",
        fix="serve it in float32, and check the model directory",
    )


def _n_ids(generation: Generation) -> int:
    return len(generation.prompt_ids) + len(generation.control_ids)
