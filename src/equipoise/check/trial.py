"""What can be done with a model, tried in seconds and without reading its weights.

Two random layers of the model, narrow, with its own tokenizer, go the whole way: sampled, tuned,
saved, loaded, served, merged. What fails for them would fail for the model, only later.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from equipoise.config import Sampling
from equipoise.dials.dials import Dials
from equipoise.engine.batcher import ContinuousBatcher
from equipoise.engine.sample import TransformersEngine
from equipoise.engine.seam import Generation
from equipoise.errors import EquipoiseError, ModelError
from equipoise.models.adapter import merge
from equipoise.models.architecture import check_architecture
from equipoise.models.load import LoadedPolicy, load_causal
from equipoise.tune.rehearsal import rehearse, small_base
from equipoise.types import Branch, DialSetting, GenerationRequest, Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from equipoise.dials.manifest import DialManifest

ATTRIBUTES, LEVELS = ("helpfulness", "safety"), 5
PARTS = ("sample", "tune", "tune with LoRA", "serve", "merge")
_SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=20, max_tokens=8)
"""Of a whole vocabulary rounding may choose a neighbour, as the server's batches differ."""
_MERGED = 1e-5
"""Largest difference of a merged model's logits, times their spread."""


@dataclass(frozen=True)
class Trial:
    """One part, tried."""

    part: str
    problem: EquipoiseError | None
    """``None``: it works."""


def try_model(
    config: Any, tokenizer: PreTrainedTokenizerBase, name: str, dials: DialManifest | None = None
) -> list[Trial]:
    """Try every part on two random layers of a model.

    Args:
        config: The model's config.
        tokenizer: The model's tokenizer, with a chat template.
        name: For messages.
        dials: Those that the model has already.

    Returns:
        One per part, in the order of :data:`PARTS`. What builds on a part that failed has the same
        problem.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        done: dict[str, Path] = {}

        def tuned(name: str, rank: int) -> Callable[[], Path]:
            return lambda: rehearse(
                done["sample"],
                folder / name,
                lora_rank=rank,
                dials=dials.dials if dials else Dials(ATTRIBUTES, LEVELS),
            )

        steps: dict[str, tuple[str | None, Callable[[], Path]]] = {
            "sample": (None, lambda: _sampled(config, tokenizer, name, folder / "base", dials)),
            "tune": ("sample", tuned("full", 0)),
            "tune with LoRA": ("sample", tuned("lora", 2)),
            "serve": ("tune", lambda: _served(done["tune"])),
            "merge": (
                "tune with LoRA",
                lambda: merge_and_compare(done["tune with LoRA"], folder / "merged"),
            ),
        }
        trials: dict[str, Trial] = {}
        for part, (needs, attempt) in steps.items():
            problem = trials[needs].problem if needs is not None else None
            if problem is None:
                problem = _problem_of(part, attempt, done)
            trials[part] = Trial(part, problem)
        return [trials[part] for part in PARTS]


def _problem_of(
    part: str, attempt: Callable[[], Path], done: dict[str, Path]
) -> EquipoiseError | None:
    try:
        done[part] = attempt()
    except EquipoiseError as error:
        return error
    except Exception as error:  # a fault of ours, or of a library: it counts as one more reason
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        return ModelError(
            f"`{part}` fails on two layers of it",
            why=f"{type(error).__name__}: {reason[:300]}",
            fix="use another model, and report this one",
        )
    return None


def _sampled(
    config: Any,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    folder: Path,
    dials: DialManifest | None,
) -> Path:
    check_architecture(config, name)
    base = small_base(config, tokenizer, folder, dials)
    policy = load_causal(str(base), device="cpu")
    ids = tuple(policy.encoder.prompt_ids((Message("user", "How do I do this?"),)))
    request = GenerationRequest(ids, (Branch((), 1), Branch((), 2)))
    TransformersEngine.of(policy).generate([request], _SAMPLING)
    return base


def _served(directory: Path) -> Path:
    """Serve two dialled requests at once; their tokens are those that the engine samples."""
    policy = load_causal(str(directory), device="cpu")
    ids = tuple(policy.encoder.prompt_ids((Message("user", "How do I do this?"),)))
    branches = tuple(
        Branch(policy.encoder.control_ids(setting), seed=seed)
        for seed, setting in enumerate(_corners(policy))
    )
    request = GenerationRequest(ids, branches)
    expected = TransformersEngine.of(policy).generate([request], _SAMPLING)[0]
    generations = [
        Generation(ids, branch.control_ids, _SAMPLING, branch.seed, prefix_salt="check")
        for branch in branches
    ]
    found = asyncio.run(_answers(policy, generations))
    if found != [list(sampled.token_ids) for sampled in expected]:
        raise ModelError(
            "the server would sample other tokens than the engine",
            why="the same ids and seeds gave other tokens, on two layers of it",
            fix="serve it with another engine; see docs/serving.md",
        )
    return directory


def _corners(policy: LoadedPolicy) -> tuple[DialSetting, DialSetting]:
    """Return the lowest and the highest setting."""
    assert policy.manifest is not None, "it was tuned"
    count, levels = len(policy.manifest.attributes), policy.manifest.levels
    return DialSetting((0,) * count), DialSetting((levels - 1,) * count)


async def _answers(policy: LoadedPolicy, generations: Sequence[Generation]) -> list[list[int]]:
    batcher = ContinuousBatcher(policy.model, policy.encoder, slots=len(generations))

    async def ids(generation: Generation) -> list[int]:
        return [token.id async for token in batcher.stream(generation) if token.id >= 0]

    await batcher.start()
    try:
        return list(await asyncio.gather(*map(ids, generations)))
    finally:
        await batcher.drain(0.0)


def merge_and_compare(directory: Path, out: Path) -> Path:
    """Merge an adapter; transformers alone reads the result, and its logits are the adapter's."""
    from transformers import AutoModelForCausalLM

    policy = load_causal(str(directory), device="cpu")
    read: Any = AutoModelForCausalLM.from_pretrained
    plain = read(merge(directory, out)).eval()
    ids = policy.encoder.prompt_ids((Message("user", "How do I do this?"),))
    row = torch.tensor([[*ids, *policy.encoder.control_ids(_corners(policy)[1])]])
    with torch.inference_mode():
        own, merged = policy.model(row).logits, plain(row).logits
    if not float((own - merged).abs().max() / own.std()) < _MERGED:
        raise ModelError(
            "an adapter of this model does not merge",
            why="the merged model gives other logits, on two layers of it",
            fix="serve the adapter as it is, or tune full weights",
        )
    return out
