"""Whether an architecture can be sampled and tuned here, tried on two random layers of it.

Two things are held against plain forwards of one row: decoding with a cache behind prompts padded
on the left, and reading several branches of a prompt at once. Nothing is taken on trust from names:
what gives other numbers is refused before its weights are read.
"""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch

from equipoise.errors import EquipoiseError, ModelError
from equipoise.models.branches import branch_inputs, layer_windows

CUT_LAYERS = 2
_VOCABULARY, _WINDOW, _WIDE, _EXPERTS = 64, 6, 64, 4
_HEADS, _HEAD = 4, 16
_LARGEST = 10**9
_TOLERANCE = 5e-3
"""Largest difference of a logit, in standard deviations of the logits: rounding gives 1e-6 (1e-4
where a model cannot be narrowed), a window that is one position too wide 1."""
_AMPLIFIED = 3.0
"""Times the initial weights: as it is born, a model hardly looks at other positions."""
_WIDTHS = ("intermediate_size", "moe_intermediate_size", "shared_expert_intermediate_size",
           "ffn_dim", "n_inner", "ffn_hidden_size")  # fmt: skip
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
_COUNTS = {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
_TRIED_BEFORE: dict[str, None] = {}


def check_architecture(config: Any, place: str) -> None:
    """Refuse a model that could not be sampled or tuned exactly; one try per process and config.

    Args:
        config: The model's config.
        place: Its name, for messages.

    Raises:
        ModelError: With the reason.
    """
    try:
        layer_windows(config)
        _refuse_distances(config)
        small = cut_config(config)
        key = type(config).__name__ + json.dumps(small.to_dict(), sort_keys=True, default=str)
        if key not in _TRIED_BEFORE:
            try_architecture(small)
            _TRIED_BEFORE[key] = None
    except EquipoiseError as error:
        raise ModelError(f"{place}: {error.what}", why=error.why, fix=error.fix) from error


def _refuse_distances(config: Any) -> None:
    """Refuse ALiBi: its bias counts places in the row, which are not those behind the prompt."""
    text = config.get_text_config()
    options = [vars(text), vars(getattr(text, "attn_config", text))]
    if text.model_type == "bloom" or any(option.get("alibi") for option in options):
        raise _refused(
            text.model_type,
            "its attention is biased by the distance in the row (ALiBi), which is wrong for the "
            "second branch of a prompt",
        )


def cut_config(config: Any, *, vocabulary: int | None = _VOCABULARY) -> Any:
    """Return a copy of a config with two layers, one of each kind if there are several.

    Hidden size and heads stay: which of them fit together is for the architecture to know.

    Args:
        config: Of a causal language model.
        vocabulary: Rows of the embedding; None leaves them as they are, and windows and special
            tokens too.
    """
    small = copy.deepcopy(config)
    parts = [small, *(getattr(small, name) for name in getattr(small, "sub_configs", {}))]
    for part in parts:
        if part is not None and not isinstance(part, dict):
            _cut_layers(part)
            for name in _WIDTHS:
                _at_most(part, name, _WIDE)
            for name in _EXPERT_COUNTS:
                _at_most(part, name, _EXPERTS)
            for name, most in _COUNTS.items():
                _at_most(part, name, most)
    text = small.get_text_config()
    if vocabulary is not None:
        text.vocab_size = vocabulary
        for part in (small, text):
            for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
                if getattr(part, name, None) is not None:
                    setattr(part, name, None)
        if getattr(text, "sliding_window", None):
            text.sliding_window = _WINDOW
        positions = getattr(text, "max_position_embeddings", None)
        if isinstance(positions, int) and positions < _VOCABULARY:
            text.max_position_embeddings = _VOCABULARY
    return small


def _cut_layers(part: Any) -> None:
    layers = getattr(part, "num_hidden_layers", None)
    if not isinstance(layers, int) or layers <= CUT_LAYERS:
        return
    kinds = getattr(part, "layer_types", None) or []
    kept = sorted({kind: i for i, kind in reversed(list(enumerate(kinds)))}.values())
    kept = sorted({*kept, *range(CUT_LAYERS)} if len(kept) < CUT_LAYERS else kept)
    kept = kept[: max(CUT_LAYERS, len(set(kinds)))]
    lists = {
        name: value
        for name, value in vars(part).items()
        if isinstance(value, list) and len(value) == layers
    }
    part.num_hidden_layers = len(kept)
    for name, value in lists.items():
        setattr(part, name, [value[i] for i in kept])


def _at_most(part: Any, name: str, limit: int) -> None:
    value = getattr(part, name, None)
    if isinstance(value, int) and not isinstance(value, bool) and value > limit:
        setattr(part, name, limit)


def narrow(config: Any) -> Any:
    """Return a copy of a config with four narrow heads, where its text part has the usual names."""
    small = copy.deepcopy(config)
    text = small.get_text_config()
    heads = getattr(text, "num_attention_heads", None)
    if isinstance(heads, int) and heads >= _HEADS:
        shared = getattr(text, "num_key_value_heads", None) or heads
        text.num_attention_heads = _HEADS
        text.hidden_size = _HEADS * _HEAD
        if getattr(text, "num_key_value_heads", None):
            text.num_key_value_heads = max(1, _HEADS * shared // heads)
        if vars(text).get("head_dim") and not hasattr(text, "qk_rope_head_dim"):
            text.head_dim = _HEAD
    return small


def try_architecture(config: Any) -> None:
    """Build a random model of a (small) config, and hold what we do with it against plain forwards.

    Raises:
        ModelError: It cannot be built, cached decoding or branches go wrong, or differ.
    """
    layer_windows(config)
    compare(narrowest_model(config))


def narrowest_model(config: Any) -> Any:
    """Build a random model of a (small) config, with narrow heads where that can be built.

    Raises:
        ModelError: It cannot be built.
    """
    try:
        model = random_model(narrow(config))
        with torch.inference_mode():
            _plain(model, _texts()[0])
    except Exception as error:  # its numbers do not fit together; it has to be as wide as it is
        size = sum(weight.numel() for weight in empty_model(config).parameters())
        if size > _LARGEST:
            why = f"two layers of it, with {size:,} numbers, are too large to be tried"
            raise _refused(config.model_type, why) from error
        return random_model(config)
    return model


def compare(model: Any) -> None:
    """Hold cached decoding and branches against plain forwards.

    Raises:
        ModelError: One of them goes wrong, or gives other numbers.
    """
    kind = model.config.model_type
    for what, difference in (
        ("decoding with a cache", _cache_difference),
        ("reading branches of a prompt apart", _branch_difference),
    ):
        try:
            with torch.inference_mode():
                found = difference(model)
        except Exception as error:  # whatever a model of another build raises
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise _refused(kind, f"{what} fails on two layers of it ({reason[:200]})") from error
        if not found < _TOLERANCE:
            why = f"{what} gives other numbers than plain forwards: on two random layers of it the "
            raise _refused(kind, f"{why}logits differ by {found:.2g} times their spread")


def random_model(config: Any) -> Any:
    """Build a model of a config with random weights, always the same, in evaluation mode.

    Raises:
        ModelError: Its class cannot be found or built.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = _built(config, torch.float32)
        with torch.no_grad():
            for weight in model.parameters():
                if weight.ndim >= 2:
                    weight.mul_(_AMPLIFIED)
    return model.to("cpu").eval()


def _built(config: Any, dtype: torch.dtype | None) -> Any:
    from transformers import AutoModelForCausalLM

    build: Any = AutoModelForCausalLM.from_config
    with _silence():
        try:
            return build(config, dtype=dtype)
        except Exception as error:  # a class checks its config as it pleases
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise _refused(config.model_type, f"it cannot be built ({reason[:200]})") from error


def empty_model(config: Any) -> Any:
    """Build a model of a config without numbers (on the meta device), to count and name them.

    Raises:
        ModelError: Its class cannot be found or built.
    """
    with torch.device("meta"):
        return _built(config, None)


def _refused(kind: str, why: str) -> ModelError:
    return ModelError(
        f"models of type {kind} are not supported",
        why=why,
        fix="use another model; docs/architectures.md lists those that were tried",
    )


@lru_cache(maxsize=1)
def _texts() -> tuple[list[int], list[int], list[list[int]]]:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(3, _VOCABULARY, (64,), generator=generator).tolist()
    return drawn[:9], drawn[9:13], [drawn[13 + 7 * i : 20 + 7 * i] for i in range(4)]


def _plain(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """Return the logits (T, V) of one row, as the model itself computes it."""
    logits: torch.Tensor = model(input_ids=torch.tensor([list(ids)]), use_cache=False).logits[0]
    return logits.float()


def _apart(ours: torch.Tensor, plain: torch.Tensor) -> float:
    return float((ours - plain).abs().max() / plain.std())


def _cache_difference(model: Any) -> float:
    """Two prompts, three branches: two ids at once (the controls), then one by one."""
    from transformers import DynamicCache

    long, short, branches = _texts()
    prompts, width = [long, short], len(long)
    ids = torch.zeros(2, width, dtype=torch.long)
    mask = torch.zeros(2, width, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    cache = DynamicCache(config=model.config)

    def step(fed: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -fed.shape[1] :]
        output = model(
            input_ids=fed, attention_mask=mask, position_ids=positions, past_key_values=cache,
            use_cache=True, logits_to_keep=1,
        )  # fmt: skip
        logits: torch.Tensor = output.logits[:, -1].float()
        return logits

    ours = [step(ids, mask)]
    cache.batch_select_indices(torch.tensor([1, 0, 1]))  # rows are repeated, and change places
    order, mask = [1, 0, 1], mask[[1, 0, 1]]
    texts = torch.tensor(branches[:3])
    for start, end in ((0, 2), *((i, i + 1) for i in range(2, texts.shape[1]))):
        mask = torch.cat([mask, mask.new_ones(3, end - start)], dim=1)
        ours.append(step(texts[:, start:end], mask))
    worst = max(_apart(ours[0][i], _plain(model, prompts[i])[-1]) for i in range(2))
    for row, source in enumerate(order):
        plain = _plain(model, [*prompts[source], *branches[row]])[len(prompts[source]) + 1 :]
        found = torch.stack([logits[row] for logits in ours[1:]])
        worst = max(worst, _apart(found, plain))
    return worst


def _branch_difference(model: Any) -> float:
    """Two prompts of two lengths, two branches behind each, in one forward."""
    long, short, branches = _texts()
    prompts, width, n = [long, short], len(long), len(branches[0])
    total = width + 2 * n
    ids = torch.zeros(2, total, dtype=torch.long)
    positions = torch.zeros(2, total, dtype=torch.long)
    owners = torch.full((2, total), -1)
    for row, prompt in enumerate(prompts):
        start = width - len(prompt)
        ids[row, start:width] = torch.tensor(prompt)
        positions[row, start:width] = torch.arange(len(prompt))
        owners[row, start:width] = 0
        for number in range(2):
            at = width + number * n
            ids[row, at : at + n] = torch.tensor(branches[2 * row + number])
            positions[row, at : at + n] = len(prompt) + torch.arange(n)
            owners[row, at : at + n] = number + 1
    logits = model(**branch_inputs(model, ids, positions, owners), use_cache=False).logits.float()
    worst = 0.0
    for row, prompt in enumerate(prompts):
        for number in range(2):
            at = width + number * n
            plain = _plain(model, [*prompt, *branches[2 * row + number]])[len(prompt) :]
            worst = max(worst, _apart(logits[row, at : at + n], plain))
    return worst


@contextmanager
def _silence() -> Iterator[None]:
    from transformers.utils import logging as loud

    verbosity = loud.get_verbosity()
    loud.set_verbosity(logging.CRITICAL)
    try:
        yield
    finally:
        loud.set_verbosity(verbosity)
