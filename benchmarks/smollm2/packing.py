"""What packing would save: batches of examples of like length beside one packed row.

    python -m benchmarks.smollm2.packing     # after the point `best`; a few minutes on one core

``padding`` is the share of positions that hold nothing, over all batches of a tuning. ``seconds``
are those of one pass there and back over the same examples, in turns: as the tuning lays them out
(one row per example, padded to the longest), and as one row without padding, whose mask keeps the
examples and their branches apart. Attention pays for the whole length of a row, masked or not.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from benchmarks.machine import machine
from benchmarks.smollm2.points import POINTS, REFERENCE, RUNS, make_recipe
from torch import Tensor

from equipoise.config import Recipe
from equipoise.encoding.encode import Encoder
from equipoise.models.load import load_causal
from equipoise.store.stagefiles import StageFiles
from equipoise.tune.batch import Presentation, TuningPlan, collate
from equipoise.tune.objectives import token_log_likelihoods
from equipoise.tune.prefix import branch_log_likelihoods
from equipoise.tune.trainer import with_dials
from equipoise.types import ControlledExample

RESULT = Path(__file__).with_name("packing.json")
TUNINGS = ("exmate", "clm")
TIMED = 8
"""Batches, evenly spread over the tuning."""


def main() -> None:
    """Measure both tunings and write the result."""
    examples = StageFiles(RUNS / REFERENCE / "distil").read_shard(
        "examples.parquet", ControlledExample
    )
    found = {name: measured(name, examples) for name in TUNINGS}
    result = {
        "made_by": "python -m benchmarks.smollm2.packing",
        "machine": machine(),
        "examples": len(examples),
        "tunings": found,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(found, indent=1))


def measured(name: str, examples: Sequence[ControlledExample]) -> dict[str, Any]:
    """Return the padding and both times of one point's tuning."""
    recipe = make_recipe({**POINTS[name], "tune.steps": "250"}, None)
    model, encoder = dialled(recipe)
    plan = TuningPlan(examples, encoder, recipe.tune, levels=recipe.levels, seed=recipe.seed)
    size = recipe.tune.batch_size
    batches = [[plan[i] for i in range(at, at + size)] for at in range(0, len(plan), size)]
    held = [collate(rows).branch_ids >= 0 for rows in batches]
    chosen = list(islice(batches, len(batches) // TIMED // 2, None, len(batches) // TIMED))
    seconds = {"padded": 0.0, "packed": 0.0}
    apart = 0.0
    for number, rows in enumerate([chosen[0], *chosen]):
        readers: dict[str, Callable[[Any, Sequence[Presentation]], Tensor]]
        readers = {"padded": padded, "packed": packed}
        sums = {}
        for kind in sorted(readers, reverse=bool(number % 2)):
            model.zero_grad()
            started = time.perf_counter()
            sums[kind] = readers[kind](model, rows)
            sums[kind].mean().backward()
            if number:  # the first pass pays for set-up
                seconds[kind] += time.perf_counter() - started
        apart = max(apart, float((sums["padded"] - sums["packed"]).detach().abs().max()))
    return {
        "padding": 1 - sum(int(h.sum()) for h in held) / sum(h.numel() for h in held),
        "batches": len(batches),
        "timed": len(chosen),
        "seconds": seconds,
        "packed_over_padded": seconds["packed"] / seconds["padded"],
        "largest_difference_nats": apart,
    }


def dialled(recipe: Recipe) -> tuple[Any, Encoder]:
    """Return the untouched model, ready to be tuned, and its encoder."""
    policy = load_causal(recipe.model)
    model, manifest = with_dials(
        policy,
        attributes=recipe.attributes,
        levels=recipe.levels,
        lora_rank=recipe.tune.lora_rank,
        base_model=recipe.model,
        seed=recipe.seed,
    )
    return model.train(), policy.encoder.with_dials(manifest)


def padded(model: Any, rows: Sequence[Presentation]) -> Tensor:
    """Return the log-likelihood of every branch, example after example, as the tuning reads it."""
    sums, _ = branch_log_likelihoods(model, collate(rows))
    return torch.cat([own[: len(row.branches)] for own, row in zip(sums, rows, strict=True)])


def packed(model: Any, rows: Sequence[Presentation]) -> Tensor:
    """Return the same from one row that holds all examples without padding."""
    ids, positions, example, branch, place, labels, owner = ([] for _ in range(7))  # type: ignore[var-annotated]
    n_branches = 0
    for number, row in enumerate(rows):
        parts = [(0, 0, row.prompt_ids)]
        parts += [(n, len(row.prompt_ids), own) for n, own in enumerate(row.branches, 1)]
        for n, start, own in parts:
            at = len(ids)
            ids += own
            positions += range(start, start + len(own))
            example += [number] * len(own)
            branch += [n] * len(own)
            if n:
                place += range(at + row.n_control - 1, at + len(own) - 1)
                labels += own[row.n_control :]
                owner += [n_branches] * (len(own) - row.n_control)
                n_branches += 1
    examples, branches = torch.tensor(example), torch.tensor(branch)
    same = examples[:, None] == examples
    seen = (branches == 0) | (branches[:, None] == branches)
    mask = same & seen & torch.ones(len(ids), len(ids), dtype=torch.bool).tril()
    output = model(
        input_ids=torch.tensor([ids]),
        position_ids=torch.tensor([positions]),
        attention_mask=mask[None, None],
        use_cache=False,
        logits_to_keep=torch.tensor(place),
    )
    tokens = token_log_likelihoods(output.logits[0], torch.tensor(labels))
    return tokens.new_zeros(n_branches).index_add(0, torch.tensor(owner), tokens)


if __name__ == "__main__":
    main()
