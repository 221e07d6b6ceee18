"""The sampling engine: one prefill per prompt, many branches, rows that leave when done.

Differs from ``transformers.generate`` in four ways that matter on a pool of K samples per prompt:
the prompt is computed once for all of its branches (K samples, or L x L dial settings); batches are
sorted by length; finished rows leave the batch; and no step sorts the whole vocabulary. Every row
draws from its own random stream, so its text does not depend on its neighbours. A row may be
steered with strengths of its own: vectors added to the residual stream behind the shared prefill.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from equipoise.config import Sampling
from equipoise.engine.draw import draw, uniform_stream
from equipoise.engine.seam import Sampled
from equipoise.errors import ModelError
from equipoise.models.context import check_requests, positions
from equipoise.models.layers import shifted
from equipoise.models.vocabulary import masked_ids
from equipoise.types import Finish, GenerationRequest

if TYPE_CHECKING:
    from transformers import DynamicCache, PreTrainedModel

    from equipoise.encoding.encode import Encoder
    from equipoise.encoding.thoughts import Follower
    from equipoise.models.load import LoadedPolicy

_LEAVE_SHARE = 0.1
"""Rows leave once this share of the live batch is done: each leaving copies the cache."""


@dataclass
class _Row:
    """One branch while it is being sampled."""

    request: int
    branch: int
    control_ids: tuple[int, ...]
    uniforms: np.ndarray  # one per token at most
    follower: Follower
    token_ids: list[int]
    strengths: tuple[float, ...] = ()
    finish: Finish = "length"
    done: bool = False

    def take(self, token_id: int, ends: bool, sampling: Sampling) -> None:
        """Add one sampled token, and end the row where it or a limit does."""
        if ends:
            self.finish, self.done = ("thought" if self.follower.within else "stop"), True
            return
        self.token_ids.append(token_id)
        self.follower.take(token_id)
        finish = self.follower.finish(sampling)
        if finish is not None:
            self.finish, self.done = finish, True


class TransformersEngine:
    """Samples from any Hugging Face causal language model (:class:`equipoise.engine.seam.Engine`).

    Args:
        model: A causal LM in evaluation mode.
        encoder: The encoder of the model's tokenizer: end ids, masked ids, decoding.
        model_hash: Recorded with every completion.
        batch_size: Rows (branches) decoded together.
        steering: Vectors (A, D) and the index of the layer behind which ``Branch.strengths`` of
            them are added, at every control and sampled position of a branch, never in the shared
            prompt.

    Attributes:
        prompt_positions: Prompt tokens computed so far, each once per prompt.
        branch_positions: Control and sampled tokens computed so far.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        encoder: Encoder,
        *,
        model_hash: str,
        batch_size: int = 128,
        steering: tuple[torch.Tensor, int] | None = None,
    ) -> None:
        self._steering = steering
        self._shift = torch.empty(0)  # (R, D) of the rows in the batch
        self.model, self.encoder, self.model_hash = model, encoder, model_hash
        self.batch_size = batch_size
        self.prompt_positions = 0
        self.branch_positions = 0
        self._masked = masked_ids(encoder, model)
        self._end_ids = frozenset(encoder.eos_ids)

    @classmethod
    def of(
        cls,
        policy: LoadedPolicy,
        *,
        batch_size: int = 128,
        steering: tuple[torch.Tensor, int] | None = None,
    ) -> TransformersEngine:
        """Return the engine of a loaded policy: its model, its encoder and its hash."""
        return cls(
            policy.model,
            policy.encoder,
            model_hash=policy.hash,
            batch_size=batch_size,
            steering=steering,
        )

    @torch.inference_mode()
    def generate(
        self, requests: Sequence[GenerationRequest], sampling: Sampling
    ) -> list[list[Sampled]]:
        """Sample every branch of every request; see :class:`equipoise.engine.seam.Engine`.

        Raises:
            DataError: One does not fit into the model's context; nothing is sampled.
        """
        sampling = self.encoder.budgets(sampling)
        most = sampling.max_tokens + sampling.max_thought_tokens
        check_requests(requests, most, positions(self.model.config))
        results: list[list[Sampled | None]] = [[None] * len(r.branches) for r in requests]
        for group in _groups(requests, self.batch_size):
            cache, mask, logits = self._prefill([requests[i].prompt_ids for i in group])
            rows = [
                _Row(
                    i,
                    j,
                    branch.control_ids,
                    uniform_stream(branch.seed, most),
                    self.encoder.follower(requests[i].prompt_ids),
                    [],
                    branch.strengths,
                )
                for i in group
                for j, branch in enumerate(requests[i].branches)
            ]
            place = {index: position for position, index in enumerate(group)}
            chunks = [rows[i : i + self.batch_size] for i in range(0, len(rows), self.batch_size)]
            for number, chunk in enumerate(chunks):
                own = cache if number == len(chunks) - 1 else copy.deepcopy(cache)
                source = torch.tensor([place[row.request] for row in chunk], device=mask.device)
                own.batch_select_indices(source)
                with self._steered(chunk):
                    self._decode(chunk, own, mask[source], logits[source], sampling)
            for row in rows:
                opened = self.encoder.follower(requests[row.request].prompt_ids).within
                text = self.encoder.decode(row.token_ids, within=opened)
                results[row.request][row.branch] = Sampled(tuple(row.token_ids), text, row.finish)
        return [[s for s in branches if s is not None] for branches in results]

    def _prefill(
        self, prompts: Sequence[Sequence[int]]
    ) -> tuple[DynamicCache, torch.Tensor, torch.Tensor]:
        """Compute left-padded prompts once: (cache, mask (R, T), last logits (R, V))."""
        from transformers import DynamicCache

        width = max(len(ids) for ids in prompts)
        device = self.model.device
        ids = torch.zeros(len(prompts), width, dtype=torch.long)
        mask = torch.zeros(len(prompts), width, dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = torch.tensor(prompt, dtype=torch.long)
            mask[row, width - len(prompt) :] = 1
        self.prompt_positions += int(mask.sum())
        mask = mask.to(device)
        cache = DynamicCache(config=self.model.config)
        output = self.model(
            input_ids=ids.to(device),
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return cache, mask, output.logits[:, -1]

    def _steered(self, rows: Sequence[_Row]) -> AbstractContextManager[None]:
        """Prepare the rows' own shifts; rows that leave the batch take theirs along."""
        if not any(strength for row in rows for strength in row.strengths):
            self._shift = torch.empty(len(rows), 0)
            return nullcontext()
        if self._steering is None:
            raise ValueError("branches have strengths, and the engine has no directions")
        vectors, layer = self._steering
        none = (0.0,) * len(vectors)
        wanted = [row.strengths or none for row in rows]
        strengths = torch.tensor(wanted, dtype=torch.float32)  # (R, A)
        self._shift = (strengths @ vectors.float()).to(self.model.device)
        return shifted(self.model, layer, lambda: self._shift)

    def _decode(
        self,
        rows: list[_Row],
        cache: DynamicCache,
        mask: torch.Tensor,
        logits: torch.Tensor,
        sampling: Sampling,
    ) -> None:
        """Sample all rows to their end; fills ``token_ids`` and ``finish`` of each row."""
        if rows[0].control_ids:
            fed = torch.tensor([row.control_ids for row in rows], device=mask.device)
            logits, mask = self._step(fed, cache, mask)
        live = list(rows)
        most = sampling.max_tokens + sampling.max_thought_tokens
        for step in range(most):
            uniforms = np.array([row.uniforms[step] for row in live])
            token_ids = self._draw(logits, uniforms, sampling)
            for row, token_id in zip(live, token_ids.tolist(), strict=True):
                if row.done:
                    continue
                row.take(token_id, token_id in self._end_ids, sampling)
            n_done = sum(row.done for row in live)
            if n_done == len(live) or step == most - 1:
                return
            if n_done >= max(1.0, _LEAVE_SHARE * len(live)):
                kept = torch.tensor([i for i, row in enumerate(live) if not row.done])
                live = [row for row in live if not row.done]
                kept = kept.to(mask.device)
                cache.batch_select_indices(kept)
                mask, token_ids = mask[kept], token_ids[kept]
                self._shift = self._shift[kept.to(self._shift.device)]
            logits, mask = self._step(token_ids[:, None], cache, mask)

    def _step(
        self, ids: torch.Tensor, cache: DynamicCache, mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Feed ids (R, n) behind the cache; return (logits (R, V), grown mask)."""
        n = ids.shape[1]
        mask = torch.cat([mask, mask.new_ones(len(mask), n)], dim=1)
        self.branch_positions += ids.numel()
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1)[:, -n:],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        return output.logits[:, -1], mask

    def _draw(self, logits: torch.Tensor, uniforms: np.ndarray, sampling: Sampling) -> torch.Tensor:
        """Draw one token per row; see :func:`draw`."""
        scores = logits.float()
        if not bool(torch.isfinite(scores.sum(dim=1)).all()):
            raise ModelError(
                "The model's logits are not finite",
                why="Its weights are damaged, or its number type is too small for it.",
                fix="Check the model directory, or load it with another dtype.",
            )
        if len(self._masked):
            scores[:, self._masked] = -torch.inf
        return draw(
            scores,
            torch.from_numpy(uniforms).to(scores),
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
        )


def _groups(requests: Sequence[GenerationRequest], batch_size: int) -> Iterator[list[int]]:
    """Yield indices of requests, by prompt length, whose branches fill about one batch."""
    order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt_ids))
    group: list[int] = []
    n_rows = 0
    for index in order:
        n = len(requests[index].branches)
        if n == 0:
            continue
        fits = n_rows + n <= batch_size
        alike = not group or _n_controls(requests[index]) == _n_controls(requests[group[0]])
        if group and not (fits and alike):
            yield group
            group, n_rows = [], 0
        group.append(index)
        n_rows += n
    if group:
        yield group


def _n_controls(request: GenerationRequest) -> int:
    counts = {len(branch.control_ids) for branch in request.branches}
    if len(counts) != 1:
        raise ValueError("all branches of a request must have the same number of control ids")
    return counts.pop()
