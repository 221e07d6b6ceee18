"""Estimated minutes per stage, from a short probe of this machine, printed before a run starts.

Sampling and training are timed on the policy itself for a moment; what the reward models cost
follows from their size. Each stage's module says what it costs at that speed. It is an estimate:
answers may end early, and other work may be going on.
"""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from equipoise.config import RewardModelConfig, SourceConfig
from equipoise.pipeline.job import Job
from equipoise.pipeline.readers import read_prompts
from equipoise.pipeline.spec import StageSpec
from equipoise.pipeline.table import STAGES, is_asked_for
from equipoise.store.publish import read_json_or_none
from equipoise.types import Branch, GenerationRequest

if TYPE_CHECKING:
    from equipoise.models.load import LoadedPolicy

PLAN = "plan.json"
"""Of a run directory: stage to the minutes that were first planned for it."""
ROWS_UNKNOWN = 5000
"""Taken for a source without a limit whose rows are not on this disk."""
PROBE_TOKENS, PROBE_LENGTH, PROBE_LOGITS = 12, 160, 1 << 24
"""Tokens sampled, length of a row trained on, and its logits in all (several copies are held)."""


@dataclass(frozen=True)
class Speed:
    """What the probe measured, and how much there is to do."""

    sampled: float
    """Sampled tokens per second."""
    trained: float
    """Tokens per second forward and backward."""
    flops: float
    """Per second, as the training probe reached it."""
    prompt_tokens: float
    """Mean length of a training prompt."""
    counts: Mapping[str, int]
    """Split to number of prompts."""

    def pool(self, job: Job) -> int:
        """Completions of the pool."""
        config = job.recipe.generate
        drawn = config.completions_per_prompt + config.prompted_per_prompt
        return self.counts["train"] * drawn

    def reading_pool(self, job: Job) -> float:
        """Flops per parameter of a model that reads the pool."""
        length = self.prompt_tokens + job.recipe.generate.sampling.max_tokens
        return 2 * self.pool(job) * length

    def steered_row(self, job: Job) -> float:
        """Seconds to sample a steered completion, and to read it.

        The reward models read it, and the policy does behind its shared prompt.
        """
        recipe, length = job.recipe, job.recipe.generate.sampling.max_tokens
        rewards, policy = pass_size(recipe.reward_models, job), size_of(recipe.model, job)
        flops = 2 * ((self.prompt_tokens + length) * rewards + length * policy)
        return length / self.sampled + flops / self.flops


def print_plan(job: Job) -> dict[str, float]:
    """Print, keep and return the estimated minutes of every stage that is still to be done."""
    todo = [
        row
        for row in STAGES.values()
        if row.planned and not job.run.is_done(row.name) and is_asked_for(row, job.recipe)
    ]
    if not todo:
        return {}
    job.settle_threads()
    speed = probe(job)
    minutes = {row.name: _cost(row, job, speed) / 60 for row in todo}
    job.progress.say("plan (estimated minutes, from a short probe of this machine):")
    for name, planned in minutes.items():
        job.progress.say(f"  {name:<10} {planned:6.1f}")
    job.progress.say(f"  {'in all':<10} {sum(minutes.values()):6.1f}")
    # What was planned first is what the report compares with: a resumed run plans the rest only.
    job.run.write_json(PLAN, minutes | read_plan(job.run.path))
    return minutes


def _cost(row: StageSpec, job: Job, speed: Speed) -> float:
    cost: Callable[[Job, Speed], float] = import_module(row.where.partition(":")[0]).cost
    return cost(job, speed)


def read_plan(run: Path) -> dict[str, float]:
    """Return stage to planned minutes; empty where no plan was made (single stages make none)."""
    return read_json_or_none(run / PLAN) or {}


def probe(job: Job) -> Speed:
    """Time a few sampled and a few trained tokens of the policy."""
    from equipoise.engine.sample import TransformersEngine

    policy = job.policy()
    config = job.recipe.generate
    prompts = read_prompts(job.run)
    train = [prompt for prompt in prompts if prompt.split == "train"][:8]
    encoded = [tuple(policy.encoder.prompt_ids(prompt.messages)) for prompt in train]
    k = max(1, min(config.completions_per_prompt, config.batch_size // len(encoded)))
    requests = [
        GenerationRequest(ids, tuple(Branch((), seed) for seed in range(k))) for ids in encoded
    ]
    engine = TransformersEngine.of(policy, batch_size=config.batch_size)
    sampling = config.sampling.model_copy(update={"max_tokens": PROBE_TOKENS})
    seconds = _best_of(lambda: engine.generate(requests, sampling))
    sampled = len(encoded) * k * PROBE_TOKENS / seconds
    rows = PROBE_LOGITS // (PROBE_LENGTH * policy.model.config.get_text_config().vocab_size)
    trained = training_speed(policy, encoded, min(job.recipe.tune.batch_size, 8, max(rows, 1)))
    size = sum(parameter.numel() for parameter in policy.model.parameters())
    return Speed(
        sampled=sampled,
        trained=trained,
        flops=6.0 * size * trained,
        prompt_tokens=sum(map(len, encoded)) / len(encoded),
        counts={name: sum(p.split == name for p in prompts) for name in ("train", "dev", "test")},
    )


def parameters_of(directory: Path) -> int:
    """Count the parameters that a token passes, from the headers of the safetensors files.

    A table of embeddings is looked up, not multiplied; it is half of a small reward model.
    """
    count = 0
    for file in directory.glob("*.safetensors"):
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        for name, tensor in header.items():
            if name != "__metadata__" and "embed" not in name:
                elements = 1
                for extent in tensor["shape"]:
                    elements *= extent
                count += elements
    return count


def training_speed(policy: LoadedPolicy, encoded: Sequence[Sequence[int]], rows: int) -> float:
    """Return tokens per second forward and backward, of rows of :data:`PROBE_LENGTH` tokens.

    Args:
        policy: Where it is.
        encoded: Ids of at least one prompt.
        rows: Per batch.
    """
    import torch

    flat = [token for ids in encoded for token in ids]
    flat = (flat * (PROBE_LENGTH // len(flat) + 1))[:PROBE_LENGTH]
    batch = torch.tensor([flat] * rows, device=policy.model.device)  # (B, T)

    def step() -> None:
        policy.model(input_ids=batch, labels=batch).loss.backward()

    seconds = _best_of(step)
    policy.model.zero_grad(set_to_none=True)
    return batch.numel() / seconds


def _best_of(step: Callable[[], object], *, tries: int = 4, budget: float = 8.0) -> float:
    """Return the seconds of the fastest try: the first pays for set-up, others wait for others."""
    begun, best = time.perf_counter(), float("inf")
    for _ in range(tries):
        start = time.perf_counter()
        step()
        best = min(best, time.perf_counter() - start)
        if time.perf_counter() - begun > budget:
            break
    return best


def rows_of(source: SourceConfig, data: Path | None) -> int:
    """Return how many rows a source will give; a guess where only the hub knows."""
    from equipoise.data.sources import find_file, read_items

    if find_file(source.source, data) is None:
        return source.limit or ROWS_UNKNOWN
    rows = len(read_items(source, lambda row, _: row, data=data))
    return min(rows, source.limit or rows)


def pass_size(configs: Mapping[str, RewardModelConfig], job: Job) -> float:
    """Parameters that one row passes: heads on one frozen backbone and length share a pass."""
    passes: dict[object, float] = {}
    for attribute, config in configs.items():
        fit = job.recipe.fit_reward.get(config.model.removeprefix("fitted://"))
        shared = fit is not None and fit.head_only
        source = (fit.backbone, config.max_length) if fit and shared else attribute
        passes[source] = _size(config, job)
    return sum(passes.values())


def _size(config: RewardModelConfig, job: Job) -> float:
    fitted = config.model.removeprefix("fitted://")
    if fitted != config.model:
        return size_of(job.recipe.fit_reward[fitted].backbone, job)
    return 0.0 if config.oracle is not None else size_of(config.model, job)


def size_of(name: str, job: Job) -> float:
    """Parameters of a policy or reward model that a token passes."""
    from equipoise.models.hub import resolve_model, snapshot

    place = resolve_model(job.place(name), fitted_root=job.fitted_root)
    directory = Path(place) if Path(place).is_dir() else snapshot(place)
    return float(parameters_of(directory))
