"""The control tokens' rows in the embedding and the output head."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, cast

import torch

from equipoise.seeds import derive_seed

if TYPE_CHECKING:
    from transformers import PreTrainedModel

# Share of a row's distance from the mean that tells the attribute, and that tells the level; the
# squares add up to one, so that an extreme level is as far from the mean as a typical row.
_ATTRIBUTE_SHARE, _LEVEL_SHARE = 0.6, 0.8
_HASHED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def embedding(model: PreTrainedModel) -> torch.Tensor:
    """Return the embedding weight, (V, width)."""
    return cast(torch.Tensor, model.get_input_embeddings().weight)


def head(model: PreTrainedModel) -> torch.Tensor | None:
    """Return the output head's weight, (V, width), if the model has one."""
    layer = _output_layer(model)
    return None if layer is None else cast(torch.Tensor, layer.weight)


def _output_layer(model: PreTrainedModel) -> torch.nn.Module | None:
    layer: torch.nn.Module | None = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return layer


def head_bias(model: PreTrainedModel) -> torch.Tensor | None:
    """Return the output head's bias, (V,), if it has one."""
    return getattr(_output_layer(model), "bias", None)


def row_count(model: PreTrainedModel) -> int:
    """Return the number of rows V of the embedding."""
    return int(_stored(model.get_input_embeddings()).shape[0])


def is_tied(model: PreTrainedModel) -> bool:
    """True if the output head shares the embedding's storage (or there is no head)."""
    layer = _output_layer(model)
    return layer is None or (
        _stored(layer).data_ptr() == _stored(model.get_input_embeddings()).data_ptr()
    )


def _stored(layer: torch.nn.Module) -> torch.Tensor:
    # peft's wrapper shows a fresh copy of the weight with its trained rows in it.
    return cast(torch.Tensor, getattr(layer, "original_module", layer).weight)


def row_modules(model: PreTrainedModel) -> list[str]:
    """Return the names of the modules that hold control rows: embedding, and head if untied."""
    wanted = [model.get_input_embeddings()]
    output = _output_layer(model)
    if output is not None and not is_tied(model):
        wanted.append(output)
    names = {id(module): name for name, module in model.named_modules()}
    return [names[id(module)] for module in wanted]


@torch.no_grad()
def add_rows(model: PreTrainedModel, table: Sequence[Sequence[int]]) -> None:
    """Initialise the control rows on an ordinal ramp, growing the model where needed.

    Row of attribute a, level l: ``mean + n (.6 d_a + .8 (2 l / (L - 1) - 1) r_a)`` with n the
    median distance of the present rows from their mean, d_a and r_a fixed random directions; the
    auto row is that of the ramp's centre. Untied heads get the head's mean row, i.e. a logit like
    that of a middling token.

    Args:
        model: Changed in place.
        table: Per attribute the ids of its levels, then of auto.
    """
    ids = [token_id for row in table for token_id in row]
    known = min(row_count(model), min(ids))
    old = row_count(model)
    if old <= max(ids):
        # New rows are overwritten below; the global generator must not notice them.
        devices = [embedding(model).device] if embedding(model).is_cuda else []
        with torch.random.fork_rng(devices):
            model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    weight = embedding(model)  # (V, width)
    present = weight[:known].to("cpu", torch.float64)
    mean = present.mean(0)
    weight[old:] = mean.to(weight)
    directions = _directions(len(table), present.std(0, correction=0))  # (A, 2, width)
    typical = (present - mean).norm(dim=1).median()
    for row_ids, (offset, ramp) in zip(table, directions, strict=True):
        for position, token_id in enumerate(row_ids):
            levels = len(row_ids) - 1
            height = 2 * position / (levels - 1) - 1 if position < levels else 0.0
            step = _ATTRIBUTE_SHARE * offset + _LEVEL_SHARE * height * ramp
            weight[token_id] = (mean + typical * step).to(weight)
    output = head(model)
    if output is not None and not is_tied(model):
        output[old:] = output[:known].to("cpu", torch.float64).mean(0).to(output)
        output[ids] = output[:known].to("cpu", torch.float64).mean(0).to(output)
        bias = head_bias(model)
        if bias is not None:
            bias[old:] = bias[:known].mean()
            bias[ids] = bias[:known].mean()


def _directions(n_attributes: int, spread: torch.Tensor) -> torch.Tensor:
    """Return two unit directions per attribute, (A, 2, width), orthogonal where width allows."""
    width = spread.shape[0]
    generator = torch.Generator().manual_seed(derive_seed("control rows", n_attributes, width))
    drawn = torch.randn(2 * n_attributes, width, generator=generator, dtype=torch.float64)
    # A direction in which the rows hardly vary would make a row unlike any that the model knows.
    drawn = drawn * (spread if bool(spread.any()) else 1.0)
    basis: list[torch.Tensor] = []
    for vector in drawn:
        if len(basis) < width:
            for other in basis:
                vector = vector - (vector @ other) * other
        basis.append(vector / vector.norm())
    return torch.stack(basis).view(n_attributes, 2, width)


def row_hashes(model: PreTrainedModel, ids: Iterable[int]) -> dict[str, str]:
    """Return SHA-256 hashes of the control rows, as they read in each float type.

    A directory saved in one type may be loaded in another, so all are recorded.
    """
    index = list(ids)
    tensors = {"input": embedding(model)}
    output = head(model)
    if output is not None and not is_tied(model):
        tensors["output"] = output
    return {
        f"{name}/{str(dtype).removeprefix('torch.')}": _digest(tensor[index].to(dtype))
        for name, tensor in tensors.items()
        for dtype in _HASHED_DTYPES
    }


def _digest(rows: torch.Tensor) -> str:
    data = rows.detach().to("cpu").contiguous().view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(data).hexdigest()
