"""Model names to directories, directories to loaded models, and their hashes.

Weights are read from safetensors only and code that comes with a model is never run.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from equipoise.dials.manifest import read_manifest
from equipoise.errors import ModelError
from equipoise.models.files import clear_errors
from equipoise.models.hub import folder_of, model_hash, resolve_model
from equipoise.types import PLAIN, Rendering

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from equipoise.dials.manifest import DialManifest
    from equipoise.encoding.encode import Encoder

Dtype = Literal["float32", "bfloat16", "probe"]

_TOKENIZER = " (its tokenizer)"


@dataclass(frozen=True)
class LoadedPolicy:
    """A causal language model ready to be asked, with everything that belongs to it."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    encoder: Encoder
    manifest: DialManifest | None
    """``None`` for a model without dials."""
    hash: str
    """See :func:`policy_hash`."""
    revision: str | None = None
    """The commit of a model that came from the hub."""


@lru_cache(maxsize=1)
def probe_dtype() -> torch.dtype:
    """The faster number type for matrix products on this machine, measured once per process.

    Returns:
        ``torch.bfloat16`` if it is more than 1.3 times as fast as ``torch.float32``, as on CPUs
        with AMX and on GPUs; on CPUs without it bfloat16 is several times slower.
    """
    import torch

    device = default_device()

    def seconds(dtype: torch.dtype) -> float:
        left = torch.ones(512, 512, dtype=dtype, device=device)
        best = float("inf")
        for _ in range(6):  # the first run pays for set-up, so the best of several counts
            start = time.perf_counter()
            _ = (left @ left).sum().item()
            best = min(best, time.perf_counter() - start)
        return best

    gain = seconds(torch.float32) / max(seconds(torch.bfloat16), 1e-9)
    return torch.bfloat16 if gain > 1.3 else torch.float32


def default_device() -> str:
    """Return ``cuda`` where torch sees a GPU, else ``cpu``."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def torch_dtype(dtype: Dtype) -> torch.dtype:
    """Resolve ``probe`` and names to a torch number type."""
    import torch

    if dtype == "probe":
        return probe_dtype()
    return torch.bfloat16 if dtype == "bfloat16" else torch.float32


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """Load a tokenizer from a directory or hub id, with a padding token where there is an end.

    Raises:
        ModelError: It cannot be read, or leaves open which chat template is meant.
    """
    from transformers import AutoTokenizer

    from equipoise.models.files import check_json_files

    folder = str(folder_of(name, weights=False))
    check_json_files(folder)
    with clear_errors(name, _TOKENIZER):
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False
        )
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
    templates = tokenizer.chat_template
    if isinstance(templates, dict) and "default" not in templates:
        raise ModelError(
            f"The tokenizer of {name} has several chat templates, and none is the default",
            why=f"They are called {', '.join(sorted(templates))}; nothing says which to take.",
            fix="Save the tokenizer again with one of them as its `chat_template`.",
        )
    return tokenizer


def load_causal(
    name: str,
    *,
    fitted_root: Path | None = None,
    dtype: Dtype = "float32",
    device: str | None = None,
    rendering: Rendering = PLAIN,
) -> LoadedPolicy:
    """Load a policy: a plain model, one with dials, or a LoRA adapter directory.

    Args:
        name: See :func:`resolve_model`.
        fitted_root: See :func:`resolve_model`.
        dtype: Number type of the weights in memory.
        device: A torch device; by default the GPU if there is one, else the CPU.
        rendering: What the chat template is given besides the turns.

    Returns:
        The model in evaluation mode with tokenizer, encoder and (where there are dials) manifest.

    Raises:
        ModelError: Missing or unreadable files, no chat template, or a manifest that does not fit.
        ConfigError: A variable that the chat template does not know.
    """
    from equipoise.dials import tokens
    from equipoise.encoding import markers
    from equipoise.encoding.encode import Encoder
    from equipoise.models.adapter import is_adapter, read_adapter
    from equipoise.models.limits import check_vocabulary
    from equipoise.models.read import read_causal

    place = resolve_model(name, fitted_root=fitted_root)
    local, folder = Path(place).is_dir(), folder_of(place).absolute()
    revision = None if local else folder.name
    place = str(folder) if local else place  # an adapter will remember where its base lies
    manifest = read_manifest(folder)
    if manifest is not None:  # before any other file of it is read
        tokens.verify_files(folder, manifest)
    tokenizer = load_tokenizer(str(folder))
    if not tokenizer.chat_template:
        raise ModelError(
            f"The tokenizer of {name} has no chat template",
            why="Prompts are chats, and only the template says how this model was taught them.",
            fix="Use an instruction-tuned model, or add chat_template.jinja to the directory.",
        )
    if manifest is None:
        tokens.refuse_lost_manifest(name, tokenizer)
    if is_adapter(folder):
        model = read_adapter(folder, manifest, torch_dtype(dtype))
    else:
        model = read_causal(place, torch_dtype(dtype), revision=revision)
    if manifest is not None:
        tokens.verify(model, tokenizer, manifest)
    with clear_errors(name, _TOKENIZER):
        encoder = Encoder(
            tokenizer, manifest, eos_ids=markers.given_ends(model, tokenizer), rendering=rendering
        )
        check_vocabulary(name, model, encoder)
    return LoadedPolicy(
        model=model.to(device or default_device()).eval(),
        tokenizer=tokenizer,
        encoder=encoder,
        manifest=manifest,
        hash=policy_hash(folder, manifest),
        revision=revision,
    )


def policy_hash(folder: Path, manifest: DialManifest | None) -> str:
    """Return the model's hash; of a LoRA directory that of adapter and base together.

    Args:
        folder: Directory, or snapshot of a hub model.
        manifest: Of the directory.
    """
    from equipoise.models.adapter import base_of, is_adapter

    own = model_hash(str(folder))
    if not is_adapter(folder):
        return own
    base, of_base = base_of(folder, manifest)
    return hashlib.sha256(f"{own}\n{model_hash(base, revision=of_base)}".encode()).hexdigest()
