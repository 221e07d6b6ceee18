"""What the files of a model directory hold, before any weight is read.

Names, number types and shapes of weights are read off the headers of their files alone. A config
asks for layers and shapes, and the libraries make room for whatever it asks before they look at a
file. So these are compared first, and nothing is allocated for a config that the weights cannot
fill.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from equipoise.errors import EquipoiseError, ModelError

Headers = Mapping[str, tuple[str, tuple[int, ...]]]
"""Name of a weight to (number type as safetensors spells it, shape)."""

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_JSON = ("config.json", "generation_config.json", "tokenizer_config.json",
         "special_tokens_map.json", "added_tokens.json")  # fmt: skip
_COUNTED = re.compile(r"(layers?|labels|experts)$")
_DEPTH = "num_hidden_layers"
_MOST = 100_000
"""Layers, labels or experts of any model; lists of this length are made when a config is read."""
_NAMED = 3
_BUFFERS = 64 << 20


@contextmanager
def clear_errors(place: str, what: str = "") -> Iterator[None]:
    """Turn whatever the libraries raise on a damaged model into one ModelError.

    Args:
        place: The model's name.
        what: What it was to be used as, for the message.

    Raises:
        ModelError: In place of any other exception.
    """
    try:
        yield
    except EquipoiseError:
        raise
    except BaseException as error:  # what a damaged file raises depends on where it is damaged
        # A library in Rust ends with a panic, which is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise _cannot_load(place, error, what) from error


def _cannot_load(place: str, error: BaseException, what: str = "") -> ModelError:
    text = str(error).strip() or type(error).__name__
    lines = text.splitlines()
    # Some libraries say what is wrong in the lines behind the first.
    why, fix = " ".join(lines[:2]) if lines[0].rstrip().endswith(":") else lines[0], ""
    if type(error).__name__ == "SafetensorError":
        why = f"A weights file is damaged: {why}. It may be a Git LFS pointer or a cut download."
        fix = "Fetch the weights again (`git lfs pull` in a clone), and compare their sizes."
    elif isinstance(error, ImportError):
        why = f"It needs a package that is not installed: {why}"
        fix = "Install it, or use a model that does without."
    elif isinstance(error, RuntimeError):
        why = f"Its config and its weights disagree: {why}"
        fix = "Take config.json and weights from one place."
    elif not isinstance(error, OSError | ValueError):
        why = f"Its files hold something unexpected ({type(error).__name__}: {why})."
        fix = "Check config.json and the tokenizer files against those of the model's publisher."
    elif "tokenizer" in what:
        fix = "Take tokenizer.json and tokenizer_config.json from the model's publisher; a Git LFS "
        fix += "pointer is no file."
    return ModelError(
        f"Cannot load {place}{what}",
        why=why,
        fix=fix
        or "Check the name (a run's model is RUN/tune/model), the network if it is a hub id, and "
        "that the weights are safetensors.",
    )


def headers(directory: str | Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return name, number type and shape of every weight of a model directory; no weight is read.

    Args:
        directory: With ``model.safetensors``, or an index and its shards.

    Raises:
        ModelError: A file is missing or damaged, or the index names a file outside the directory.
    """
    with clear_errors(str(directory)):
        files = _weights_files(Path(directory))
        return {name: held for file in files for name, held in file_headers(file).items()}


def hub_headers(hub_id: str, revision: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return the same of a model of the hub, of which no weight is brought here.

    Raises:
        ModelError: The hub does not give them.
    """
    from huggingface_hub import get_safetensors_metadata

    with clear_errors(hub_id):
        read = get_safetensors_metadata(hub_id, revision=revision)
    return {
        name: (str(tensor.dtype), tuple(tensor.shape))
        for file in read.files_metadata.values()
        for name, tensor in file.tensors.items()
    }


def file_headers(file: Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return name, number type and shape of every weight of one safetensors file.

    Raises:
        OSError, safetensors.SafetensorError: It cannot be read.
    """
    from safetensors import safe_open

    with safe_open(file, "numpy") as opened:
        parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        return {
            name: (str(part.get_dtype()), tuple(part.get_shape())) for name, part in parts.items()
        }


def _weights_files(directory: Path) -> list[Path]:
    if (directory / WEIGHTS).is_file():
        return [directory / WEIGHTS]
    if (directory / INDEX).is_file():
        names = set(json.loads((directory / INDEX).read_text("utf-8"))["weight_map"].values())
        if any(Path(name).name != name or not name.endswith(".safetensors") for name in names):
            raise ValueError(f"{INDEX} names a file that is no safetensors file beside it")
        return [directory / name for name in sorted(names)]
    files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise OSError(f"There is no {WEIGHTS} in it; weights are read from safetensors only")
    return files


def check_json_files(place: str) -> None:
    """Refuse damaged JSON, and counts that no model has: a config makes lists of that length.

    Some of these files are left out in silence where they cannot be read, and a model without its
    ``generation_config.json`` knows fewer ends.

    Args:
        place: A directory; nothing is said of a hub id.

    Raises:
        ModelError: A file is no JSON object, or a number of layers, labels or experts is beyond
            100,000.
    """
    for name in _JSON:
        file = Path(place) / name
        if not file.is_file():
            continue
        with clear_errors(place):
            try:
                content = json.loads(file.read_text("utf-8"))
            except ValueError as error:
                raise ValueError(f"{name} is no JSON: {error}") from error
            if not isinstance(content, dict):
                raise ValueError(f"{name} holds no JSON object")
        if name == "config.json":
            _check_counts(content, place)


def _check_counts(config: dict[str, Any], place: str) -> None:
    for name, value in config.items():
        if isinstance(value, dict):
            _check_counts(value, place)
        elif isinstance(value, int | float) and (
            (value > _MOST and _COUNTED.search(name)) or (value < 0 and name == _DEPTH)
        ):
            raise disagree(place, f"{name} is {value}, and no model has that many")


def check_shapes(
    place: str, config: Any, stored: Headers, build: Callable[[Any], Any], *, fresh: bool = False
) -> None:
    """Refuse a config that asks for more than the weights hold, or for other shapes.

    Names may differ: old checkpoints are renamed, and their experts put together, as they are read.
    So only weights of the same name are compared one by one, and all of them by their number.

    Args:
        place: For messages.
        config: Of the model.
        stored: What the files hold.
        build: Makes the model from a config; called on a device without memory.
        fresh: The model gets a new head in any case.

    Raises:
        ModelError: It names the weights, or what is too large.
    """
    import torch

    parts = [config, *(getattr(config, name, None) for name in getattr(config, "sub_configs", {}))]
    for part in parts:
        layers = getattr(part, _DEPTH, None)
        if isinstance(layers, int) and layers > len(stored):
            raise disagree(place, f"{layers} layers cannot be in {len(stored)} weights")
    with clear_errors(place), torch.device("meta"):
        model = build(config)
    prefix = f"{model.base_model_prefix}."
    other = []
    for name, tensor in model.state_dict().items():
        held = stored.get(name) or stored.get(name.removeprefix(prefix))
        if held is None or (fresh and not name.startswith(prefix)):
            continue
        if math.prod(held[1]) != tensor.numel():
            other.append(f"{name} {tuple(tensor.shape)}, where there is {held[1]}")
    if other:
        more = f" and {len(other) - _NAMED} more" if len(other) > _NAMED else ""
        raise disagree(place, f"it asks for {'; '.join(other[:_NAMED])}{more}")
    body = getattr(model, model.base_model_prefix, model)
    asked = sum(tensor.numel() for tensor in body.parameters())
    there = sum(math.prod(shape) for _, shape in stored.values())
    if asked > there:
        raise disagree(place, f"it asks for {asked:,} numbers, and there are {there:,}")
    room = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    if room > max(_BUFFERS, 4 * there):
        raise disagree(place, f"it asks for tables of {room >> 20:,} MiB beside its weights")


def disagree(place: str, why: str) -> ModelError:
    """Return the error for a config that does not describe the weights beside it."""
    return ModelError(
        f"config.json and weights of {place} disagree",
        why=f"By config.json {why}." if why.startswith("it ") else f"In config.json {why}.",
        fix="Take config.json and weights from one place.",
    )
