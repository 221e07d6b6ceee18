"""The residual stream of any decoder: its layers, what they put out, and vectors added to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from equipoise.errors import ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel


def decoder_layers(model: PreTrainedModel) -> torch.nn.ModuleList:
    """Return the decoder layers of a causal language model, first to last.

    They are the outermost list of as many modules as the configuration has layers; no name of any
    architecture is needed. (A mixture of experts may hold a list of the same length, but further
    in.)

    Raises:
        ModelError: There is no such list, or more than one at the same depth.
    """
    import torch

    wanted = getattr(model.config.get_text_config(), "num_hidden_layers", None)
    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) == wanted
    }
    depth = min((name.count(".") for name in lists), default=0)
    outermost = {name: module for name, module in lists.items() if name.count(".") == depth}
    if len(outermost) != 1:
        raise ModelError(
            f"the decoder layers of {type(model).__name__} cannot be found",
            why=f"{len(outermost)} of its outermost lists of modules have {wanted} entries",
            fix="steering needs a decoder with one list of layers; leave `steer` and the "
            "responder `steering` out of the recipe",
        )
    return next(iter(outermost.values()))


def layer_index(model: PreTrainedModel, layer: int | None, *, fifths: int = 2) -> int:
    """Return a layer's index in [0, number of layers); by default so many fifths of the way up.

    Two fifths up the difference of means was found on SmolLM2 (layer 12 of 30).

    Raises:
        ModelError: The model has no layer of that index.
    """
    count = len(decoder_layers(model))
    chosen = fifths * count // 5 if layer is None else layer
    if not 0 <= chosen < count:
        raise ModelError(
            f"there is no layer {chosen}",
            why=f"the model has the layers 0 to {count - 1}",
            fix="correct steer.layer, or leave it out",
        )
    return chosen


@contextmanager
def shifted(
    model: PreTrainedModel, layer: int, shift: Callable[[], torch.Tensor]
) -> Iterator[None]:
    """Add ``shift()`` (R, D) to the output (R, T, D) of one layer, at every position it computes.

    A row of zeros leaves its row's numbers as they are, bit for bit.
    """

    def hook(_module: Any, _arguments: Any, output: Any) -> Any:
        hidden = output[0] if isinstance(output, tuple) else output
        moved = hidden + shift()[:, None].to(hidden)
        return (moved, *output[1:]) if isinstance(output, tuple) else moved

    handle = decoder_layers(model)[layer].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


class _Reached(Exception):  # noqa: N818 - it is no error
    """The layer whose output was wanted has been computed."""


def states_behind(
    model: PreTrainedModel, layer: int, input_ids: torch.Tensor, **inputs: torch.Tensor
) -> torch.Tensor:
    """Return the output (R, T, D) of one layer; the layers above it and the head are not computed.

    Rows may be padded on the right: in a causal model no real token looks at what follows it.
    Whatever else the model shall be called with (mask, positions) is ``inputs``.
    """
    seen: list[torch.Tensor] = []

    def hook(_module: Any, _arguments: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)
        raise _Reached

    handle = decoder_layers(model)[layer].register_forward_hook(hook)
    try:
        model(input_ids=input_ids, use_cache=False, **inputs)
    except _Reached:
        pass
    finally:
        handle.remove()
    return seen[0]


@contextmanager
def watched(model: PreTrainedModel, layer: int) -> Iterator[list[torch.Tensor]]:
    """Yield a list to which every forward pass adds the output (R, T, D) of one layer."""
    seen: list[torch.Tensor] = []

    def hook(_module: Any, _arguments: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)

    handle = decoder_layers(model)[layer].register_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()
