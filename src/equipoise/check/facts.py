"""What a model is, read off its config and tokenizer: the first half of ``equipoise check``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from equipoise.encoding.encode import Encoder
from equipoise.encoding.markers import given_ends
from equipoise.encoding.thoughts import refuse_thoughts
from equipoise.errors import EquipoiseError
from equipoise.models.limits import positions
from equipoise.types import Message

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

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
    window = getattr(text, "sliding_window", None)
    return Facts(
        architecture=f"{config.model_type}, {text.num_hidden_layers} layers, {_short(numbers)} "
        "numbers",
        head=f"{'tied to' if tied else 'apart from'} the embedding; {rows:,} rows for "
        f"{len(tokenizer):,} tokens",
        context=_context(positions(config), window),
        template=_template(encoder),
        thoughts=_thoughts(encoder),
        ends=", ".join(
            f"{tokenizer.convert_ids_to_tokens(i)} ({i})" for i in sorted(encoder.eos_ids)
        )
        or "none",
        lora_targets=", ".join(_linear(model)) or "none",
        memory=_memory(model, text, numbers),
    )


def _context(positions: int | None, window: int | None) -> str:
    said = "not said by its config" if positions is None else f"{positions:,} positions"
    return said + (f"; windows of {window:,}" if window else "")


def _template(encoder: Encoder) -> str:
    taken = []
    for name, roles in (
        ("user", ["user"]),
        ("system, user", ["system", "user"]),
        ("user, assistant, user", ["user", "assistant", "user"]),
    ):
        try:
            encoder.prompt_ids([Message(role, "x") for role in roles])  # type: ignore[arg-type]
            taken.append(name)
        except EquipoiseError:
            if name == "user":
                raise
    return "takes " + "; ".join(taken)


def _thoughts(encoder: Encoder) -> str:
    if encoder.thought is None:
        return "none"
    try:
        refuse_thoughts(encoder)
    except EquipoiseError:
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
    from equipoise.tune.rehearsal import trained_numbers

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
    for size, unit in ((10**9, "billion"), (10**6, "million")):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count:,}"
