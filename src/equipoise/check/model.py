"""``equipoise check``: a model's facts, its weights against its config, and every part tried."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from equipoise.check.facts import Facts, facts
from equipoise.check.trial import Trial, try_model
from equipoise.dials.manifest import read_manifest
from equipoise.dials.tokens import verify_files
from equipoise.errors import EquipoiseError
from equipoise.models.adapter import check_adapter, is_adapter
from equipoise.models.cut import empty_model
from equipoise.models.files import Headers, check_shapes, clear_errors, disagree, headers
from equipoise.models.hub import folder_of, resolve_model
from equipoise.models.load import load_tokenizer
from equipoise.models.read import read_config

WEIGHTS = "weights"


@dataclass(frozen=True)
class Found:
    """What a check found."""

    name: str
    base: str
    """Of an adapter, which the rest describes; else empty."""
    facts: Facts
    weights: str
    trials: list[Trial]
    """Weights first, then every part."""

    @property
    def works(self) -> bool:
        """Whether all parts work."""
        return all(trial.problem is None for trial in self.trials)

    def lines(self) -> list[tuple[str, str]]:
        """Return the table, a name and a value per line."""
        told = [(name.replace("_", " "), str(value)) for name, value in vars(self.facts).items()]
        tried = [(t.part, "works" if t.problem is None else "FAILS") for t in self.trials[1:]]
        base = [("adapter over", self.base)] if self.base else []
        return [("model", self.name), *base, *told, (WEIGHTS, self.weights), *tried]

    def as_json(self) -> dict[str, Any]:
        """Return the same for scripts; ``problem`` is null where a part works."""
        return {
            "model": self.name,
            "base": self.base,
            "works": self.works,
            "facts": vars(self.facts),
            "weights": self.weights,
            "parts": {t.part: None if t.problem is None else str(t.problem) for t in self.trials},
        }


def check_model(name: str) -> Found:
    """Check a model without reading its weights; of a LoRA directory its files, and its base.

    Args:
        name: See :func:`equipoise.models.hub.resolve_model`.

    Raises:
        EquipoiseError: Config, tokenizer or chat template cannot be read at all.
    """
    place = resolve_model(name)
    folder = folder_of(place, weights=False)
    dials, base = read_manifest(folder), ""
    if dials is not None:
        verify_files(folder, dials)
    if is_adapter(folder):
        base, revision = check_adapter(folder, dials)
        load_tokenizer(str(folder))
        folder, dials = folder_of(base, revision=revision, weights=False), None
    config, tokenizer = read_config(str(folder)), load_tokenizer(str(folder))
    told = facts(_described(folder, config), tokenizer)
    weights, problem = _weights(folder, place, config)
    trials = [Trial(WEIGHTS, problem), *try_model(config, tokenizer, name, dials)]
    return Found(name, base, told, weights, trials)


def _described(folder: Path, config: Any) -> Any:
    """Return the model without numbers, with the generation config that it would be loaded with."""
    from transformers import GenerationConfig

    model = empty_model(config)
    try:
        with clear_errors(str(folder)):
            read: Any = GenerationConfig.from_pretrained
            model.generation_config = read(folder)
    except EquipoiseError:  # there is none: the model has made one of its config
        pass
    return model


def _weights(folder: Path, place: str, config: Any) -> tuple[str, EquipoiseError | None]:
    try:
        there = any(folder.glob("*.safetensors"))
        local = there or Path(place).is_dir()
        stored = headers(folder) if local else _hub_headers(place, folder.name)
        check_shapes(place, config, stored, empty_model)
        if lacking := _lacking(empty_model(config), stored):
            why = f"it asks for {', '.join(lacking[:3])}, which the weights files do not hold"
            raise disagree(place, why)
    except EquipoiseError as error:
        return "FAILS", error
    types = sorted({kind for kind, _ in stored.values()})
    return f"{len(stored)} of {', '.join(types)}, as config.json asks for", None


def _lacking(model: Any, stored: Headers) -> list[str]:
    """Return the weights that no file holds, where files and model use the same names.

    Experts are put together as they are read, and a tied head is not written.
    """
    tied = model.get_output_embeddings() if model.config.tie_word_embeddings else None
    names = [
        name
        for name, weight in model.named_parameters()
        if ".experts." not in name and (tied is None or weight is not tied.weight)
    ]
    lacking = [name for name in names if name not in stored]
    return lacking if 2 * len(lacking) < len(names) else []


def _hub_headers(hub_id: str, revision: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    from huggingface_hub import get_safetensors_metadata

    with clear_errors(hub_id):
        read = get_safetensors_metadata(hub_id, revision=revision)
    return {
        name: (str(tensor.dtype), tuple(tensor.shape))
        for file in read.files_metadata.values()
        for name, tensor in file.tensors.items()
    }
