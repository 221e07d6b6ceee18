"""What the weights files of a directory hold, read off their headers alone.

A config asks for layers and shapes, and the libraries make room for whatever it asks before they
look at a file. So names, shapes and counts are compared first, and nothing is allocated for a
config that the weights cannot fill.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from equipoise.errors import ModelError

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


def headers(directory: str | Path) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Return name, number type and shape of every weight of a model directory; no weight is read.

    Args:
        directory: With ``model.safetensors``, or an index and its shards.

    Raises:
        ModelError: A file is missing or damaged, or the index names a file outside the directory.
    """
    from equipoise.models.read import clear_errors

    with clear_errors(str(directory)):
        found: dict[str, tuple[str, tuple[int, ...]]] = {}
        for file in _weights_files(Path(directory)):
            found |= file_headers(file)
    return found


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
    from equipoise.models.read import clear_errors

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

    from equipoise.models.read import clear_errors

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
    asked, there = _numel(body.parameters()), sum(math.prod(s) for _, s in stored.values())
    if asked > there:
        raise disagree(place, f"it asks for {asked:,} numbers, and there are {there:,}")
    room = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    if room > max(_BUFFERS, 4 * there):
        raise disagree(place, f"it asks for tables of {room >> 20:,} MiB beside its weights")


def _numel(tensors: Iterable[Any]) -> int:
    return sum(int(tensor.numel()) for tensor in tensors)


def disagree(place: str, why: str) -> ModelError:
    """Return the error for a config that does not describe the weights beside it."""
    return ModelError(
        f"config.json and weights of {place} disagree",
        why=f"By config.json {why}." if why.startswith("it ") else f"In config.json {why}.",
        fix="Take config.json and weights from one place.",
    )
