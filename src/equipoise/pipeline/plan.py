"""Estimated minutes per stage, from a short probe of this machine, printed before a run starts.

Sampling and training are timed on the policy itself for a moment; what the reward models cost
follows from their size. It is an estimate: answers may end early, and other work may be going on.
"""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from equipoise.config import Recipe, RewardModelConfig, SourceConfig
from equipoise.pipeline.job import Job, read_prompts
from equipoise.recipes.check import rerank_size
from equipoise.store.fingerprint import OPTIONAL
from equipoise.store.publish import json_bytes, publish_bytes, read_json_or_none
from equipoise.types import Branch, GenerationRequest

if TYPE_CHECKING:
    from equipoise.models.load import LoadedPolicy

PLAN = "plan.json"
"""Of a run directory: stage to the minutes that were first planned for it."""
PLANNED = ("fit-reward", "generate", "score", "steer", "regenerate", "tune", "judge", "evaluate")
ROWS_UNKNOWN = 5000
"""Taken for a source without a limit whose rows are not on this disk."""
PROBE_TOKENS = 12
PROBE_LENGTH = 160


@dataclass(frozen=True)
class Speed:
    """What the probe measured."""

    sampled: float
    """Sampled tokens per second."""
    trained: float
    """Tokens per second forward and backward."""
    flops: float
    """Per second, as the training probe reached it."""
    prompt_tokens: float
    """Mean length of a training prompt."""


def print_plan(job: Job) -> dict[str, float]:
    """Print, keep and return the estimated minutes of every stage that is still to be done."""
    asked = {name for name, field in OPTIONAL.items() if getattr(job.recipe, field)}
    todo = [
        name
        for name in PLANNED
        if not job.run.is_done(name) and (name not in OPTIONAL or name in asked)
    ]
    if not todo:
        return {}
    job.settle_threads()
    minutes = estimate(job, probe(job))
    job.progress.say("plan (estimated minutes, from a short probe of this machine):")
    for name in todo:
        job.progress.say(f"  {name:<10} {minutes[name]:6.1f}")
    job.progress.say(f"  {'in all':<10} {sum(minutes[name] for name in todo):6.1f}")
    # What was planned first is what the report compares with: a resumed run plans the rest only.
    plan = {name: minutes[name] for name in todo} | read_plan(job.run.path)
    with job.run.writing():
        publish_bytes(job.run.path / PLAN, json_bytes(plan))
    return {name: minutes[name] for name in todo}


def read_plan(run: Path) -> dict[str, float]:
    """Return stage to planned minutes; empty where no plan was made (single stages make none)."""
    return read_json_or_none(run / PLAN) or {}


def probe(job: Job) -> Speed:
    """Time a few sampled and a few trained tokens of the policy."""
    from equipoise.engine.sample import TransformersEngine
    from equipoise.models.load import load_causal

    policy = load_causal(job.recipe.model, rendering=job.rendering)
    config = job.recipe.generate
    train = [prompt for prompt in read_prompts(job.run) if prompt.split == "train"][:8]
    encoded = [tuple(policy.encoder.prompt_ids(prompt.messages)) for prompt in train]
    k = max(1, min(config.completions_per_prompt, config.batch_size // len(encoded)))
    requests = [
        GenerationRequest(ids, tuple(Branch((), seed) for seed in range(k))) for ids in encoded
    ]
    engine = TransformersEngine.of(policy, batch_size=config.batch_size)
    sampling = config.sampling.model_copy(update={"max_tokens": PROBE_TOKENS})
    seconds = _best_of(lambda: engine.generate(requests, sampling))
    sampled = len(encoded) * k * PROBE_TOKENS / seconds
    trained = training_speed(policy, encoded, min(job.recipe.tune.batch_size, 8))
    size = sum(parameter.numel() for parameter in policy.model.parameters())
    return Speed(
        sampled=sampled,
        trained=trained,
        flops=6.0 * size * trained,
        prompt_tokens=sum(map(len, encoded)) / len(encoded),
    )


def estimate(job: Job, speed: Speed) -> dict[str, float]:
    """Return estimated minutes per stage."""
    recipe = job.recipe
    config, tune = recipe.evaluate, recipe.tune
    counts = dict.fromkeys(("train", "dev", "test"), 0)
    for prompt in read_prompts(job.run):
        counts[prompt.split] += 1
    drawn = recipe.generate.completions_per_prompt + recipe.generate.prompted_per_prompt
    pool, length = counts["train"] * drawn, recipe.generate.sampling.max_tokens
    branches = 1 + (tune.objective == "exmate")
    row = speed.prompt_tokens + branches * length
    judged, rewards = _pass_size(recipe.judges, job), _pass_size(recipe.reward_models, job)
    n_prompts = min(counts[config.split], config.max_prompts or counts[config.split])
    settings = recipe.levels ** len(recipe.attributes)
    auto = 0.0
    if config.auto_sweep and "tuned" in config.responders and len(recipe.attributes) > 1:
        # Only the tuned model is swept with a dial on auto.
        auto = recipe.levels * len(recipe.attributes) / settings
    answers = n_prompts * settings * config.repeats
    samples = [rerank_size(name) or 1 for name in config.responders]
    reranked = float(max([n for n in samples if n > 1], default=0))
    if config.rerank_stock is not None and reranked:
        # The stock is drawn once per prompt, not once per setting.
        reranked = config.rerank_stock / settings
    single = sum(n == 1 for n in samples) + auto
    text = speed.prompt_tokens + config.sampling.max_tokens
    scoring = (
        2 * text * answers * ((single + (reranked > 0)) * (judged + rewards) + reranked * rewards)
    )
    sampling = answers * (single + reranked) * config.sampling.max_tokens
    seconds = {
        **_steering_seconds(job, speed, counts, rewards),
        "fit-reward": _fitting_flops(job) / speed.flops,
        "generate": pool * length / speed.sampled,
        "score": 2 * pool * (speed.prompt_tokens + length) * rewards / speed.flops,
        "tune": _tuning_seconds(recipe, speed, row, rewards),
        "judge": 2 * pool * (speed.prompt_tokens + length) * judged / speed.flops,
        "evaluate": sampling / speed.sampled + scoring / speed.flops,
    }
    return {name: value / 60 for name, value in seconds.items()}


def _tuning_seconds(recipe: Recipe, speed: Speed, row: float, rewards: float) -> float:
    """Seconds of tuning with rows of ``row`` tokens; RLHF also samples, scores and compares."""
    tune = recipe.tune
    if tune.objective != "rlhf":
        start = 0.0
        if tune.steered_start is not None:
            # Behind one prompt under 2^A settings, and once without controls, forward only; up to
            # the directions' layer.
            depth = 0.6 if _natural(recipe) else 0.4
            shown = tune.steered_start.steps * tune.steered_start.batch_size
            prompt, text = speed.prompt_tokens, float(tune.steered_start.tokens)
            length = prompt + 2 ** len(recipe.attributes) * text + (prompt + text) / 3
            start = depth * shown * length / speed.trained
        return start + tune.steps * tune.batch_size * row / speed.trained
    warm = tune.rlhf.warm_start * tune.batch_size * row / speed.trained
    completion = tune.rlhf.sampling.max_tokens
    text = speed.prompt_tokens + completion
    # The reference reads what is trained on, forward only: a third of the work.
    per_row = completion / speed.sampled + 4 / 3 * text / speed.trained
    per_row += 2 * text * rewards / speed.flops
    return warm + tune.steps * tune.online_batch_size * per_row


def _natural(recipe: Recipe) -> bool:
    return recipe.steer is not None and recipe.steer.directions == "natural_gradient"


def _steering_seconds(
    job: Job, speed: Speed, counts: Mapping[str, int], rewards: float
) -> dict[str, float]:
    recipe, length = job.recipe, job.recipe.generate.sampling.max_tokens
    policy, tried, steered = _size_of(recipe.model, job), 0, 0
    if recipe.steer is not None:
        strengths = len(recipe.attributes) * len({0.0, *recipe.steer.strengths})
        tried = strengths * min(counts["dev"], recipe.steer.max_prompts)
    if recipe.regenerate is not None:
        steered = counts["train"] * recipe.regenerate.steered_per_prompt
    # Sampled, scored by the reward models, and read by the policy behind its shared prompt.
    row = length / speed.sampled
    row += 2 * ((speed.prompt_tokens + length) * rewards + length * policy) / speed.flops
    pool = counts["train"] * recipe.generate.completions_per_prompt
    own = 2 * pool * length * policy / speed.flops
    if _natural(recipe):
        own *= 2  # there and back
    return {"steer": own + tried * row, "regenerate": steered * row}


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


def _fitting_flops(job: Job) -> float:
    total = 0.0
    for config in job.recipe.fit_reward.values():
        rows = sum(rows_of(source, job.data) for source in config.sources)
        sides = 2 if config.kind == "pairs" else 1
        per_token = 2 if config.head_only else 6 * config.epochs
        # Most rows are shorter than the limit.
        total += rows * sides * 0.7 * config.max_length * per_token * _size_of(config.backbone, job)
    return total


def rows_of(source: SourceConfig, data: Path | None) -> int:
    """Return how many rows a source will give; a guess where only the hub knows."""
    from equipoise.data.sources import find_file, read_items

    if find_file(source.source, data) is None:
        return source.limit or ROWS_UNKNOWN
    rows = len(read_items(source, lambda row, _: row, data=data))
    return min(rows, source.limit or rows)


def _pass_size(configs: Mapping[str, RewardModelConfig], job: Job) -> float:
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
        return _size_of(job.recipe.fit_reward[fitted].backbone, job)
    return 0.0 if config.oracle is not None else _size_of(config.model, job)


def _size_of(name: str, job: Job) -> float:
    from equipoise.models.hub import resolve_model, snapshot

    place = resolve_model(name, fitted_root=job.fitted_root)
    directory = Path(place) if Path(place).is_dir() else snapshot(place)
    return float(parameters_of(directory))
