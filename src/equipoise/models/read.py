"""Weights of a model, read whole or not at all.

The libraries below fill what a checkpoint lacks with random numbers and say so in a log. Here such
a model is refused.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from equipoise.errors import ModelError
from equipoise.models.files import check_json_files, check_shapes, clear_errors, headers
from equipoise.models.hub import folder_of
from equipoise.models.layers import decoder_layers

if TYPE_CHECKING:
    import torch

_NAMED = 3
"""Weights that a message names."""
_UNPACKED = ("mxfp4",)
"""Ways to quantise whose weights become plain ones where there is no kernel for them."""


def read_config(place: str, *, revision: str | None = None) -> Any:
    """Read the config of a model without its weights.

    Raises:
        ModelError: It cannot be read, or is of a kind that this transformers does not know.
    """
    from transformers import AutoConfig

    folder = folder_of(place, revision=revision, weights=False)
    check_json_files(str(folder))
    with clear_errors(place):
        if not (folder / "config.json").is_file():
            raise OSError("There is no config.json in it.")
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        _check_plain(config, place)
        # Others are packages to install, or code of the hub; none knows our masks.
        if config._attn_implementation not in (None, "eager", "sdpa"):
            config._attn_implementation = None
        config._experts_implementation = None
    return config


def read_causal(place: str, dtype: torch.dtype, *, revision: str | None = None) -> Any:
    """Read a causal language model of which every weight stands in the checkpoint.

    Args:
        place: A directory or hub id of a whole model (no adapter).
        dtype: Number type in memory.
        revision: Of a hub id.

    Raises:
        ModelError: Unreadable, quantised, or its weights are not those that its config asks for.
    """
    from transformers import AutoModelForCausalLM

    from equipoise.models.architecture import check_architecture

    folder = folder_of(place, revision=revision)
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"Cannot load {place} as a whole model",
            why="It holds an adapter, for which another model would be loaded.",
            fix="Give its base, or merge the adapter into it.",
        )
    config = read_config(str(folder))
    check_headers(str(folder), config, AutoModelForCausalLM)
    check_architecture(config, place)
    model, found = read_weights(str(folder), config, AutoModelForCausalLM, dtype)
    check_weights(place, model, found)
    if getattr(model, "is_quantized", False):
        raise _quantised(place, "")
    # By this name an adapter finds its base again.
    model.name_or_path = model.config._name_or_path = place
    return model


def check_headers(place: str, config: Any, auto: Any, *, fresh: bool = False) -> None:
    """Hold a config against the headers of the weights in a directory.

    Raises:
        ModelError: See :func:`equipoise.models.files.check_shapes`.
    """
    if getattr(config, "quantization_config", None) is None:
        with quiet():
            check_shapes(place, config, headers(place), auto.from_config, fresh=fresh)


def read_weights(
    place: str, config: Any, auto: Any, dtype: torch.dtype
) -> tuple[Any, dict[str, Any]]:
    """Return a model and what its library says about the weights it found in a directory.

    Raises:
        ModelError: They cannot be read.
    """
    with clear_errors(place), quiet():
        # A weight of another shape is named by `check_weights`, and refused there.
        model, found = auto.from_pretrained(
            place,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            trust_remote_code=False,
        )
    return model, found


def _check_plain(config: Any, place: str) -> None:
    """Refuse quantised weights but those that are unpacked as they are read."""
    asked = getattr(config, "quantization_config", None)
    if asked is None:
        return
    plain = asked if isinstance(asked, dict) else vars(asked)
    method = plain.get("quant_method") or ("bitsandbytes" if "load_in_8bit" in plain else "")
    if method not in _UNPACKED:
        raise _quantised(place, f" by {method}" if method else "")


def _quantised(place: str, how: str) -> ModelError:
    return ModelError(
        f"Cannot use {place}",
        why=f"Its weights are quantised{how}; control rows and gradients need plain ones.",
        fix="Give the model that it was quantised from.",
    )


def check_weights(place: str, model: Any, found: dict[str, Any]) -> None:
    """Refuse a model that was filled up with random weights, or of which a part was left out.

    Args:
        place: For messages.
        model: As loaded.
        found: What ``from_pretrained(..., output_loading_info=True)`` gave beside it.

    Raises:
        ModelError: Weights are missing, have another shape, or belong to layers that the config
            does not have.
    """
    problems = {
        "lacks": sorted(map(str, found.get("missing_keys") or ())),
        "holds in another shape": sorted(str(one[0]) for one in found.get("mismatched_keys") or ()),
    }
    try:
        layers = decoder_layers(model)
        name = next(n for n, module in model.named_modules() if module is layers)
    except ModelError:
        name = ""
    beyond = [str(key) for key in found.get("unexpected_keys") or () if name and f"{name}." in key]
    problems["holds beyond the layers that config.json names"] = sorted(beyond)
    for problem, names in problems.items():
        if names:
            more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
            raise ModelError(
                f"The weights of {place} are not whole",
                why=f"What its config.json describes, the checkpoint {problem}: "
                f"{', '.join(names[:_NAMED])}{more}.",
                fix="Fetch the model again, or save it again with `save_pretrained` (of the model "
                "itself, not of a wrapper such as torch.compile's).",
            )


@contextmanager
def quiet(level: int = logging.ERROR) -> Iterator[None]:
    """Keep transformers from saying what is below a level: a lack of weights is refused here."""
    from transformers.utils import logging as loud

    verbosity = loud.get_verbosity()
    loud.set_verbosity(level)
    try:
        yield
    finally:
        loud.set_verbosity(verbosity)
