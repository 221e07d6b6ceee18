"""Self-generation: many branches of each prompt, which is computed once.

Differs from ``transformers.generate`` in four ways that matter on a pool of K samples per prompt:
the prompt is computed once for all of its branches (K samples, or L x L dial settings); batches are
sorted by length; finished rows leave the batch; and no step sorts the whole vocabulary. Every row
draws from its own random stream, so its text does not depend on its neighbours.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from equipoise.config import Sampling
from equipoise.engine.decode import LiveRows
from equipoise.engine.seam import Generation, Sampled
from equipoise.errors import ModelError
from equipoise.models.limits import check_requests, positions
from equipoise.types import GenerationRequest

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel

    from equipoise.encoding.encode import Encoder
    from equipoise.models.load import LoadedPolicy


class TransformersEngine:
    """Samples from any Hugging Face causal language model (:class:`equipoise.engine.seam.Engine`).

    Args:
        model: A causal LM in evaluation mode.
        encoder: The encoder of the model's tokenizer: end ids, masked ids, decoding.
        model_hash: Recorded with every completion.
        batch_size: Rows (branches) decoded together.
        steering: See :class:`equipoise.engine.decode.LiveRows`.

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
        self.model, self.encoder, self.model_hash = model, encoder, model_hash
        self.batch_size = batch_size
        self.prompt_positions = 0
        self.branch_positions = 0
        self._steering = steering

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
        rows = LiveRows(self.model, self.encoder, steering=self._steering)
        found: dict[tuple[int, int], Sampled] = {}
        for group in _groups(requests, self.batch_size):
            prompts = rows.read([("", requests[i].prompt_ids, ()) for i in group])
            self.prompt_positions += sum(len(requests[i].prompt_ids) for i in group)
            branches = [
                (place, i, j)
                for place, i in enumerate(group)
                for j in range(len(requests[i].branches))
            ]
            for start in range(0, len(branches), self.batch_size):
                chunk = branches[start : start + self.batch_size]
                generations = [_generation(requests[i], j, sampling) for _, i, j in chunk]
                joined = rows.branch(prompts, [place for place, _, _ in chunk], generations)
                places = {row: (i, j) for row, (_, i, j) in zip(joined, chunk, strict=True)}
                for row, token in rows.run():
                    if isinstance(token, Exception):
                        raise ModelError(
                            "The model's logits are not finite",
                            why="Its weights are damaged, or its number type is too small for it.",
                            fix="Check the model directory, or load it with another dtype.",
                        )
                    if token.finish is None:
                        continue
                    # The token that a limit ends with is not fed any more.
                    n_fed = len(row.ids) - (token.id >= 0)
                    self.branch_positions += len(row.generation.control_ids) + n_fed
                    opened = self.encoder.follower(row.generation.prompt_ids).within
                    text = self.encoder.decode(row.ids, within=opened)
                    found[places[row]] = Sampled(tuple(row.ids), text, token.finish)
        return [[found[i, j] for j in range(len(r.branches))] for i, r in enumerate(requests)]


def _generation(request: GenerationRequest, branch: int, sampling: Sampling) -> Generation:
    own = request.branches[branch]
    return Generation(
        request.prompt_ids, own.control_ids, sampling, own.seed, "", strengths=own.strengths
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
