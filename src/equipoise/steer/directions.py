"""Directions in the residual stream: what sets a prompt's best completion apart from its worst.

Per attribute the mean over prompts of ``h(best) - h(worst)``, where ``h`` is the output of a middle
layer averaged over the completion's tokens (docs/steer.md). Both completions answer
the same prompt, so what the prompt puts into the stream cancels out. Departs from the textbook's
contrast pairs in one point: nobody writes them, the scored pool holds them.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from equipoise.denoise import is_degenerate
from equipoise.errors import DataError, ModelError
from equipoise.types import Prompt, ScoredCompletion

if TYPE_CHECKING:
    import torch

    from equipoise.models.load import LoadedPolicy

_VECTORS, _FACTS = "directions.safetensors", "directions.json"


@dataclass(frozen=True)
class Directions:
    """One vector per attribute, and how far prompts agree on it."""

    attributes: tuple[str, ...]
    vectors: torch.Tensor
    """(A, D) float32, unscaled: a strength of 1 adds the mean difference of best and worst once."""
    layer: int
    """Index of the decoder layer behind which they were read, and are added."""
    agreement: Mapping[str, float]
    """Attribute to the share of prompts whose own difference points the same way as the mean of
    the other prompts' (1/2 = chance)."""
    n_prompts: Mapping[str, int]
    """Attribute to the number of prompts that have a best and a worst."""

    def save(self, directory: Path) -> None:
        """Write the vectors as safetensors and the facts as JSON."""
        from safetensors.torch import save_file

        directory.mkdir(parents=True, exist_ok=True)
        save_file({"vectors": self.vectors.contiguous()}, directory / _VECTORS)
        facts = {
            "attributes": list(self.attributes),
            "layer": self.layer,
            "agreement": dict(self.agreement),
            "n_prompts": dict(self.n_prompts),
            "length": self.vectors.norm(dim=1).tolist(),
        }
        (directory / _FACTS).write_text(json.dumps(facts, indent=1) + "\n", "utf-8")

    @classmethod
    def load(cls, directory: Path) -> Directions:
        """Read what :meth:`save` wrote.

        Raises:
            ModelError: A file is missing or does not fit the other.
        """
        from safetensors.torch import load_file

        try:
            facts = json.loads((directory / _FACTS).read_text("utf-8"))
            vectors = load_file(directory / _VECTORS)["vectors"]
            found = cls(
                tuple(facts["attributes"]),
                vectors,
                int(facts["layer"]),
                dict(facts["agreement"]),
                dict(facts["n_prompts"]),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _unreadable(directory, f"{type(error).__name__}: {error}") from error
        if vectors.ndim != 2 or len(vectors) != len(found.attributes):
            raise _unreadable(
                directory, f"{len(found.attributes)} names for {len(vectors)} vectors"
            )
        return found


@dataclass(frozen=True)
class PoolReading:
    """The untouched model's own pool as the model itself reads it, aligned with the pool."""

    states: Sequence[torch.Tensor | None]
    """N of (D,): mean hidden state over the completion; ``None`` for an empty one."""
    means: Sequence[float]
    """N mean log-likelihoods per token; NaN for an empty completion."""
    layer: int


def read_pool(
    scored: Sequence[ScoredCompletion],
    prompts: Mapping[str, Prompt],
    policy: LoadedPolicy,
    *,
    layer: int | None = None,
    batch_size: int = 32,
    on_prompt: Callable[[int], None] | None = None,
) -> PoolReading:
    """Let the untouched model read its pool: hidden states of one layer and log-likelihoods.

    A prompt is computed once for all of its completions, and these are batched by length.

    Args:
        scored: N completions, of any prompts in any order.
        prompts: Prompt id to prompt.
        policy: The untouched model.
        layer: Index of the decoder layer; by default two fifths of the way up.
        batch_size: Completions per forward pass.
        on_prompt: Called with 1 after each prompt.
    """
    from equipoise.models.layers import layer_index
    from equipoise.models.likelihood import Answer, read_answers

    chosen = layer_index(policy.model, layer)
    rows = [row.completion for row in scored]
    readings = read_answers(
        policy.model,
        policy.encoder,
        [Answer(row.prompt_id, row.text, row.finish == "stop") for row in rows],
        prompts,
        layer=chosen,
        batch_size=batch_size,
        on_prompt=on_prompt,
    )
    return PoolReading([one.state for one in readings], [one.mean for one in readings], chosen)


def find_directions(
    scored: Sequence[ScoredCompletion], reading: PoolReading, *, attributes: Sequence[str]
) -> Directions:
    """Return per attribute the mean difference between best and worst completions of a prompt.

    Degenerate completions are left out: the way to gibberish is no direction to steer in. So is a
    prompt whose completions all score alike.

    Args:
        scored: N completions, scored for all attributes.
        reading: The same N, read by the model.
        attributes: Attribute names, in the settings' order.

    Raises:
        DataError: For some attribute fewer than two prompts have a best and a worst.
    """
    import torch

    groups: dict[str, list[int]] = defaultdict(list)
    states: dict[int, torch.Tensor] = {}
    for place, (row, state) in enumerate(zip(scored, reading.states, strict=True)):
        if state is not None and not is_degenerate(row.completion.text):
            groups[row.completion.prompt_id].append(place)
            states[place] = state.float()
    vectors, agreement, n_prompts = [], {}, {}
    for attribute in attributes:
        differences = []
        for _, places in sorted(groups.items()):
            worst = min(places, key=lambda place: scored[place].raw[attribute])
            best = max(places, key=lambda place: scored[place].raw[attribute])
            if scored[best].raw[attribute] > scored[worst].raw[attribute]:
                differences.append(states[best] - states[worst])
        if len(differences) < 2:
            raise DataError(
                f"no direction of {attribute} can be found",
                why=f"{len(differences)} prompts have completions of different score; two or more "
                "are needed",
                fix="raise generate.completions_per_prompt, or give more training prompts",
            )
        stack = torch.stack(differences)  # (P, D)
        total = stack.sum(0)
        # Without itself: a prompt always agrees with a mean that it is part of.
        agree = (stack * (total - stack)).sum(1) > 0
        vectors.append(total / len(stack))
        agreement[attribute], n_prompts[attribute] = float(agree.float().mean()), len(stack)
    return Directions(tuple(attributes), torch.stack(vectors), reading.layer, agreement, n_prompts)


def _unreadable(directory: Path, why: str) -> ModelError:
    return ModelError(
        f"no steering directions in {directory}", why=why, fix="make them: `equipoise stage steer`"
    )
