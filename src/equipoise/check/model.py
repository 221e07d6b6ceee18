"""``equipoise check``: a model's facts, its weights against its config, and every part tried."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from equipoise.check.trial import Trial, try_model
from equipoise.dials.manifest import read_manifest
from equipoise.dials.tokens import verify_files
from equipoise.encoding.encode import Encoder
from equipoise.encoding.markers import given_ends
from equipoise.errors import EquipoiseError
from equipoise.models.adapter import check_adapter, is_adapter
from equipoise.models.cut import empty_model
from equipoise.models.files import (
    Headers,
    check_shapes,
    clear_errors,
    disagree,
    headers,
    hub_headers,
)
from equipoise.models.hub import folder_of, resolve_model
from equipoise.models.limits import positions
from equipoise.models.load import load_tokenizer
from equipoise.models.read import read_config
from equipoise.tune.rehearsal import trained_numbers
from equipoise.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

WEIGHTS = "weights"
ROWS, TOKENS = 16, 1024
"""Of the rows whose keys and values the memory of sampling and serving counts."""
_LORA_RANK = 16


@dataclass(frozen=True)
class Facts:
    """One line of the table each, in this order; a value is for people to read."""

    architecture: str
    head: str
    context: str
    template: str
    thoughts: str
    ends: str
    lora_targets: str
    memory: str


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

    model, read = empty_model(config), cast(Any, GenerationConfig.from_pretrained)
    # Where there is none, the model has made one of its config.
    with suppress(EquipoiseError), clear_errors(str(folder)):
        model.generation_config = read(folder)
    return model


def _weights(folder: Path, place: str, config: Any) -> tuple[str, EquipoiseError | None]:
    try:
        local = Path(place).is_dir() or any(folder.glob("*.safetensors"))
        stored = headers(folder) if local else hub_headers(place, folder.name)
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


def facts(model: Any, tokenizer: PreTrainedTokenizerBase) -> Facts:
    """Describe a model.

    Args:
        model: See :func:`equipoise.models.architecture.empty_model`.
        tokenizer: The model's tokenizer.

    Raises:
        EquipoiseError: The tokenizer or its template cannot be used.
    """
    encoder = Encoder(tokenizer, eos_ids=given_ends(model, tokenizer))
    config, text = model.config, model.config.get_text_config()
    numbers = sum(weight.numel() for weight in model.parameters())
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    tied |= bool(getattr(text, "tie_word_embeddings", False))
    rows = model.get_input_embeddings().weight.shape[0]
    room, window = positions(config), getattr(text, "sliding_window", None)
    context = "not said by its config" if room is None else f"{room:,} positions"
    ends = [f"{tokenizer.convert_ids_to_tokens(i)} ({i})" for i in sorted(encoder.eos_ids)]
    return Facts(
        architecture=f"{config.model_type}, {text.num_hidden_layers} layers, {_short(numbers)} "
        "numbers",
        head=f"{'tied to' if tied else 'apart from'} the embedding; {rows:,} rows for "
        f"{len(tokenizer):,} tokens",
        context=context + (f"; windows of {window:,}" if window else ""),
        template=_template(encoder),
        thoughts=_thoughts(encoder),
        ends=", ".join(ends) or "none",
        lora_targets=", ".join(_linear(model)) or "none",
        memory=_memory(model, text, numbers),
    )


def _template(encoder: Encoder) -> str:
    taken = []
    for names in ("user", "system, user", "user, assistant, user"):
        turns = [Message(role, "x") for role in names.split(", ")]  # type: ignore[arg-type]
        try:
            encoder.prompt_ids(turns)
            taken.append(names)
        except EquipoiseError:
            if names == "user":
                raise
    return "takes " + "; ".join(taken)


def _thoughts(encoder: Encoder) -> str:
    if encoder.thought is None:
        return "none"
    if encoder.thinks:
        return "every answer begins with one: it can be sampled and served, not tuned"
    return "the model may begin one; off where the template can switch them"


def _linear(model: Any) -> list[str]:
    """Return the names of the layers that LoRA adapts, each once."""
    heads = (model.get_input_embeddings(), model.get_output_embeddings())
    found = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if module not in heads
        and type(module).__name__ in ("Linear", "Conv1D")
        and module.weight.ndim == 2
    }
    return sorted(found)


def _memory(model: Any, text: Any, numbers: int) -> str:
    """Return memory in GiB.

    Sampling: 2 bytes per number (bfloat16) and the keys and values of 16 rows of 1,024 tokens; full
    tuning: 16 per number (float32 weight, gradient, two means); LoRA: 4 per number and 16 per
    trained one. What a forward pass holds for its gradient comes on top.
    """
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    held = 2 * text.num_hidden_layers * heads * width * 2 * ROWS * TOKENS
    lora = 4 * numbers + 16 * trained_numbers(model, _LORA_RANK)
    parts = {
        "sampling and serving": 2 * numbers + held,
        f"LoRA (rank {_LORA_RANK})": lora,
        "full tuning": 16 * numbers,
    }
    return ", ".join(f"{name} {_bytes(size)}" for name, size in parts.items())


def _bytes(size: int) -> str:
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 2**20:,.0f} MiB"


def _short(count: int) -> str:
    if count >= 10**9:
        return f"{count / 10**9:.1f} billion"
    return f"{count / 10**6:.1f} million" if count >= 10**6 else f"{count:,}"
