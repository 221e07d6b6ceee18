"""LoRA directories: an adapter, the control rows beside it, and the base that they belong to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from equipoise.errors import ModelError
from equipoise.models.files import clear_errors, file_headers
from equipoise.models.hub import folder_of, is_snapshot, model_hash
from equipoise.models.read import read_causal

if TYPE_CHECKING:
    import torch

    from equipoise.dials.manifest import DialManifest
    from equipoise.models.load import Dtype

ADAPTER_CONFIG = "adapter_config.json"
_WEIGHTS = "adapter_model.safetensors"


def is_adapter(place: str | Path) -> bool:
    """True for a directory that holds an adapter in place of a whole model."""
    return (Path(place) / ADAPTER_CONFIG).is_file()


def refuse_adapter(start: Any) -> None:
    """Refuse an adapter as the model to start from.

    Args:
        start: A directory, a hub id, or a loaded model.

    Raises:
        ModelError: It is one.
    """
    loaded = hasattr(start, "peft_config")
    if loaded or (isinstance(start, str) and is_adapter(start)):
        place = "this model" if loaded else start
        raise ModelError(
            f"{place} cannot be the start model",
            why="It holds an adapter, and adapters are not stacked.",
            fix='Merge it into its base once: equipoise.merge("FOLDER", "NEW_FOLDER").',
        )


def merge(directory: str | Path, out: str | Path, *, dtype: Dtype = "float32") -> Path:
    """Merge a LoRA directory into its base, as a plain model directory that any library loads.

    Args:
        directory: With an adapter, with or without dials.
        out: A new folder; dials and their manifest go along.
        dtype: Number type of the merged weights.

    Returns:
        The folder.

    Raises:
        ModelError: It holds no adapter, or cannot be loaded; or ``out`` exists.
    """
    from equipoise.dials.tokens import save_dial_model
    from equipoise.models.load import load_causal

    target = Path(out)
    why = "" if is_adapter(directory) else f"There is no {ADAPTER_CONFIG} in {directory}."
    if target.exists() or not target.parent.is_dir():
        why = f"{out} exists." if target.exists() else f"There is no folder {target.parent}."
    if why:
        raise ModelError(
            f"Cannot merge {directory} into {out}",
            why=why,
            fix="Give a folder that tuning with LoRA wrote, and a new one where there is a parent.",
        )
    policy = load_causal(str(directory), dtype=dtype, device="cpu")
    peft_model: Any = policy.model
    merged = peft_model.merge_and_unload()
    if policy.manifest is not None:
        save_dial_model(merged, policy.tokenizer, policy.manifest, target)
    else:
        merged.save_pretrained(target)
        policy.tokenizer.save_pretrained(target)
    return target


def base_of(directory: Path, manifest: DialManifest | None) -> tuple[str, str | None]:
    """Return where the base of a LoRA directory lies: (directory, None) or (hub id, revision).

    What was a folder is never looked for on the hub, where a stranger may own its name, and an
    adapter of the hub names no folder here.

    Raises:
        ModelError: ``adapter_config.json`` cannot be read, or the base is not where it says.
    """
    from equipoise.models.hub import resolve_model

    with clear_errors(str(directory)):
        config = json.loads((directory / ADAPTER_CONFIG).read_text())
        name, revision = config["base_model_name_or_path"], config.get("revision")
        if not isinstance(name, str) or not isinstance(revision, str | None):
            raise ValueError(f"{ADAPTER_CONFIG} names no base model")
    recipe_name = manifest.base_model if manifest is not None else ""
    foreign = is_snapshot(directory)
    for place in () if foreign else (Path(name), directory / name):
        if place.is_dir():
            return str(place.absolute()), None
    if not foreign and "://" in recipe_name and not recipe_name.startswith("made://"):
        return resolve_model(recipe_name), None
    # Ours records the revision of whatever came from the hub.
    if Path(name).is_absolute() or (manifest is not None and revision is None):
        raise ModelError(
            f"The base model of {directory} is not there",
            why=f"It was tuned on the folder {name}, and there is none; the hub is not asked.",
            fix="Put the base there; a link will do.",
        )
    return name, revision


def read_adapter(directory: Path, manifest: DialManifest | None, dtype: torch.dtype) -> Any:
    """Read base and adapter; the control rows of embedding and head are those that were tuned.

    Args:
        directory: What :func:`equipoise.dials.tokens.save_dial_model` wrote, or any LoRA directory.
        manifest: Its dials, if it has any.
        dtype: Number type of the base in memory.

    Returns:
        The peft model.

    Raises:
        ModelError: Missing or unreadable files, another base, or an adapter that is not whole.
    """
    from peft import PeftModel
    from safetensors import safe_open

    base, revision = check_adapter(directory, manifest)
    model = read_causal(base, dtype, revision=revision)
    _grow(model, directory, manifest)
    with clear_errors(str(directory)):
        try:
            wrapped = PeftModel.from_pretrained(model, str(directory))
        except KeyError as error:  # peft's word for control rows that are not there
            raise _not_whole(directory, str(error.args[0])) from error
        with safe_open(directory / _WEIGHTS, "pt") as file:
            stored = set(file.keys())
    _check_whole(directory, wrapped, stored)
    return wrapped


def check_adapter(directory: Path, manifest: DialManifest | None) -> tuple[str, str | None]:
    """Check an adapter's own files and its base, no weights read; return :func:`base_of`.

    Raises:
        ModelError: Missing weights, another kind of adapter, or another base.
    """
    if not (directory / _WEIGHTS).is_file():  # peft would fall back to a pickle
        raise ModelError(
            f"Cannot load {directory}",
            why=f"{_WEIGHTS} is missing.",
            fix="Copy the whole directory that tuning wrote; pickles are not read.",
        )
    with clear_errors(str(directory)):
        _check_room(directory)
    base, revision = base_of(directory, manifest)
    refuse_adapter(str(folder_of(base, revision=revision, weights=False)))
    found = model_hash(base, revision=revision)
    wanted = manifest.base_model_hash if manifest is not None else ""
    if wanted and found != wanted:
        raise ModelError(
            f"{directory} was tuned on another base",
            why=f"The model at {base} has hash {found[:12]}, the base had {wanted[:12]}.",
            fix="Put the base back as it was when the adapter was tuned.",
        )
    return base, revision


def _grow(model: Any, directory: Path, manifest: DialManifest | None) -> None:
    """Make room for the tokens that the tokenizer has and the base has not."""
    from equipoise.dials import tokens

    if manifest is not None:
        tokens.make_room(model, manifest)
        return
    with clear_errors(str(directory)):
        path = directory / "tokenizer.json"
        spec = json.loads(path.read_text()) if path.is_file() else {}
        last = max((entry["id"] for entry in spec.get("added_tokens", ())), default=-1)
        if last >= model.get_input_embeddings().weight.shape[0]:
            model.resize_token_embeddings(last + 1, mean_resizing=False)


def _check_room(directory: Path) -> None:
    """Refuse an adapter of another kind, or one that asks for more than its weights hold."""
    config = json.loads((directory / ADAPTER_CONFIG).read_text("utf-8"))
    sizes = [n for _, shape in file_headers(directory / _WEIGHTS).values() for n in shape]
    ranks = [config.get("r"), *(config.get("rank_pattern") or {}).values()]
    if config.get("peft_type") != "LORA":
        raise ValueError("it is no LoRA adapter")
    for name in ("layer_replication", "alora_invocation_tokens"):
        if config.get(name) is not None:
            raise ValueError(f"LoRA with {name} is not supported")
    if not all(isinstance(rank, int) and 0 < rank <= max(sizes, default=0) for rank in ranks):
        raise ValueError(f"{ADAPTER_CONFIG} asks for ranks that its weights do not have: {ranks}")


def _check_whole(directory: Path, wrapped: Any, stored: set[str]) -> None:
    from peft import get_peft_model_state_dict

    wanted = set(get_peft_model_state_dict(wrapped, save_embedding_layers=False))
    if wanted - stored:
        raise _not_whole(directory, ", ".join(sorted(wanted - stored)[:3]))
    # A table of the base that was saved along is no weight of the adapter, and is taken.
    surplus = stored - wanted - set(wrapped.state_dict())
    if surplus:
        raise ModelError(
            f"{ADAPTER_CONFIG} and weights of {directory} disagree",
            why=f"It leaves out {', '.join(sorted(surplus)[:3])}.",
            fix="Take adapter_config.json and weights from one place.",
        )


def _not_whole(directory: Path, lacking: str) -> ModelError:
    return ModelError(
        f"The adapter of {directory} is not whole",
        why=f"It lacks {lacking}.",
        fix="Copy the directory that tuning wrote once more.",
    )
