"""A GGUF file of a Llama with a GPT-2 style tokenizer -> an ordinary model directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from equipoise.errors import ModelError

_SPECIAL = 3
"""Token type of control tokens in GGUF."""


def convert_gguf(file: Path, directory: Path) -> None:
    """Write config, float32 safetensors and tokenizer into ``directory``.

    The weights are the dequantised ones. The tokenizer is built from the file's own tables; the
    way ``smollm`` splits text (single digits, then GPT-2's pattern) is not in the file.

    Args:
        file: ``*.gguf`` with ``tokenizer.ggml.pre = smollm``.
        directory: Existing folder that gets the files.

    Raises:
        ModelError: The package ``gguf`` is missing, or the file is of another kind.
    """
    try:
        from gguf import GGUFReader
    except ImportError as error:
        raise ModelError(
            "GGUF weights cannot be read",
            why="The package gguf is not installed.",
            fix="pip install 'equipoise[fetch]'",
        ) from error
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    fields = GGUFReader(str(file)).fields

    def field(name: str) -> Any:
        return fields[name].contents()

    kind = (field("general.architecture"), field("tokenizer.ggml.pre"))
    if kind != ("llama", "smollm"):
        raise ModelError(
            f"{file.name} cannot be converted",
            why=f"It is of the kind {kind}, and only ('llama', 'smollm') is known.",
            fix="Use the model's safetensors from its hub page.",
        )
    quantised = AutoModelForCausalLM.from_pretrained(str(file.parent), gguf_file=file.name)
    settings = quantised.config.to_diff_dict()
    for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        settings.pop(key, None)
    config = LlamaConfig(**settings)
    config.bos_token_id = field("tokenizer.ggml.bos_token_id")
    config.eos_token_id = field("tokenizer.ggml.eos_token_id")
    config.pad_token_id = field("tokenizer.ggml.padding_token_id")
    # A model that was read from GGUF refuses to be saved, so its weights move to a plain one.
    model: Any = LlamaForCausalLM(config)
    model.float()
    model.load_state_dict(quantised.state_dict())
    model.generation_config.bos_token_id = config.bos_token_id
    model.generation_config.eos_token_id = config.eos_token_id
    model.generation_config.pad_token_id = config.pad_token_id
    model.save_pretrained(directory)
    _build_tokenizer(field, config).save_pretrained(directory)


def _build_tokenizer(field: Any, config: Any) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words: list[str] = field("tokenizer.ggml.tokens")
    types: list[int] = field("tokenizer.ggml.token_type")
    merges = [tuple(line.split(" ")) for line in field("tokenizer.ggml.merges")]
    core = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(
        [
            AddedToken(word, special=True, normalized=False)
            for word, kind in zip(words, types, strict=True)
            if kind == _SPECIAL
        ]
    )
    kind: Any = PreTrainedTokenizerFast
    return kind(
        tokenizer_object=core,
        bos_token=words[config.bos_token_id],
        eos_token=words[config.eos_token_id],
        pad_token=words[config.pad_token_id],
        unk_token=words[field("tokenizer.ggml.unknown_token_id")],
        chat_template=field("tokenizer.chat_template"),
        model_max_length=config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    )
