"""Two-layer models of the architectures that ``hub-8b`` names, by their names on the hub.

Their configs are as odd as the real ones are where it matters: several ends, no padding token or
one that is the end, rope scaling, tied and untied heads. The templates are written in our own words
after what the real ones do.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from hub_rows import CAREFUL, CARELESS, THINGS, ask

POLICY = "meta-llama/Llama-3.1-8B-Instruct"
_SMALL = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
_GROUPED = {**_SMALL, "num_key_value_heads": 2}
_LLAMA_MARKS = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>"),
    *("<|finetune_right_pad_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>"),
    *("<|eot_id|>", "<|python_tag|>"),
)
_LLAMA_HEAD = "{{ '<|start_header_id|>' + role + '<|end_header_id|>\n\n' }}"
_LLAMA_TURNS = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% set given = messages[0]['content'] | trim %}{% set messages = messages[1:] %}"
    "{% else %}{% set given = '' %}{% endif %}"
    "{% set role = 'system' %}" + _LLAMA_HEAD + "{{ 'Known until: 2023\nToday: ' + date_string + "
    "'\n\n' + given + '<|eot_id|>' }}"
    "{% for m in messages %}"
    "{% if 'tool_calls' in m %}{{ raise_exception('no tools here') }}{% endif %}"
    "{% set role = m['role'] %}" + _LLAMA_HEAD + "{{ m['content'] | trim + '<|eot_id|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{% set role = 'assistant' %}" + _LLAMA_HEAD + "{% endif %}"
)
LLAMA_31 = (
    "{% if date_string is not defined %}{% set date_string = '26 Jul 2024' %}{% endif %}"
    + _LLAMA_TURNS
)
LLAMA_32 = (
    "{% if date_string is not defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}{% else %}"
    "{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}" + _LLAMA_TURNS
)
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""As Llama and Qwen cut: line breaks stay together, whatever follows them."""
_QWEN_MARKS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
QWEN = (
    "{% for m in messages %}{% set said = m['content'] %}"
    "{% if m['role'] == 'assistant' and '</think>' in said %}"
    "{% set said = said.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + said + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
_BERT_MARKS = ("[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]")


def _tokenizer(
    marks: tuple[str, ...], template: str | None, *, plain: tuple[str, ...] = (), **named: str
) -> Any:
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        pre_tokenizers,
        processors,
    )
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=420, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([*map(_dialogue, range(8)), CAREFUL, CARELESS], trainer)
    tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in marks])
    tokenizer.add_tokens([AddedToken(mark, normalized=False) for mark in plain])
    first, last = named.get("cls_token", named.get("bos_token")), named.get("sep_token", "")
    if first:
        ends = [(mark, tokenizer.token_to_id(mark)) for mark in (first, last) if mark]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first} $A {last}".strip(),
            pair=f"{first} $A {last} $B:1 {last}:1" if last else f"{first} $A {first}:1 $B:1",
            special_tokens=ends,
        )
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=8192 if last else 131072,
        **named,
    )
    wrapped.chat_template = template
    return wrapped


def _dialogue(index: int) -> str:
    return f"{ask(('mend', 'paint', 'open', 'move')[index % 4], index)} {' '.join(THINGS)}"


def _llama_tokenizer(template: str) -> Any:
    return _tokenizer(_LLAMA_MARKS, template, bos_token="<|begin_of_text|>", eos_token="<|eot_id|>")


def _llama_config(tokenizer: Any, **more: Any) -> Any:
    from transformers import LlamaConfig

    ids = tokenizer.convert_tokens_to_ids
    return LlamaConfig(
        **_GROUPED,
        vocab_size=len(tokenizer),
        max_position_embeddings=131072,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        bos_token_id=ids("<|begin_of_text|>"),
        **{"eos_token_id": [ids(mark) for mark in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")]}
        | more,
    )


def save_llama(folder: Path, *, taught: bool = True) -> None:
    """Save an untied Llama 3.1 of two layers, which has learnt a few sentences and to end."""
    import torch
    from transformers import GenerationConfig, LlamaForCausalLM

    tokenizer = _llama_tokenizer(LLAMA_31)
    torch.manual_seed(0)
    model = LlamaForCausalLM(_llama_config(tokenizer, tie_word_embeddings=False))
    if taught:
        _teach(model, tokenizer)
    config = model.config
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id,
        eos_token_id=config.eos_token_id,
        do_sample=True,
        temperature=0.6,
        top_p=0.9,
    )
    _save(model, tokenizer, folder)


def _teach(model: Any, tokenizer: Any, *, steps: int = 60) -> None:
    """Teach a handful of answers, so that a pool holds finished sentences."""
    import torch

    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ends = (CAREFUL, CARELESS, "Ask a warden.", "Nothing will happen. Just switch it off.")
    rows = []
    for index, answer in enumerate(ends * 2):
        turns = [{"role": "user", "content": ask("mend", index)}]
        turns.append({"role": "assistant", "content": answer})
        rows.append(tokenizer.apply_chat_template(turns, tokenize=True, return_dict=False))
    width = max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    real = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    for _ in range(steps):
        labels = ids.masked_fill(real == 0, -100)
        model(input_ids=ids, attention_mask=real, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _save_qwen(folder: Path) -> None:
    """Qwen3-0.6B: a causal model with a tied head and a template that knows thoughts."""
    from transformers import Qwen3ForCausalLM

    tokenizer = _qwen_tokenizer()
    _save(Qwen3ForCausalLM(_qwen_config(tokenizer)), tokenizer, folder)


def _save_skywork(folder: Path) -> None:
    """Skywork-Reward-V2-Qwen3-0.6B: the same with one logit."""
    from transformers import Qwen3ForSequenceClassification

    tokenizer = _qwen_tokenizer()
    config = _qwen_config(tokenizer, num_labels=1, pad_token_id=tokenizer.pad_token_id)
    _save(Qwen3ForSequenceClassification(config), tokenizer, folder)


def _qwen_tokenizer() -> Any:
    return _tokenizer(
        _QWEN_MARKS,
        QWEN,
        plain=("<think>", "</think>"),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
    )


def _qwen_config(tokenizer: Any, **more: Any) -> Any:
    from transformers import Qwen3Config

    return Qwen3Config(
        **_GROUPED,
        head_dim=16,
        vocab_size=len(tokenizer),
        max_position_embeddings=40960,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
        eos_token_id=tokenizer.eos_token_id,
        **more,
    )


def _save_modernbert(folder: Path) -> None:
    """ModernBERT-base: a masked language model, no chat template, segments by [SEP] alone."""
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    tokenizer = _tokenizer(
        _BERT_MARKS,
        None,
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        mask_token="[MASK]",
    )
    config = ModernBertConfig(
        **_SMALL,
        vocab_size=len(tokenizer),
        max_position_embeddings=8192,
        classifier_pooling="mean",
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.cls_token_id,
        cls_token_id=tokenizer.cls_token_id,
        eos_token_id=tokenizer.sep_token_id,
        sep_token_id=tokenizer.sep_token_id,
        global_attn_every_n_layers=2,
        local_attention=16,
    )
    _save(ModernBertForMaskedLM(config), tokenizer, folder)


def _save_grm(folder: Path) -> None:
    """GRM-Llama3.2-3B: one logit, a tied config, and padding that is the end token."""
    from transformers import LlamaForSequenceClassification

    tokenizer = _llama_tokenizer(LLAMA_32)
    end = tokenizer.eos_token_id
    tokenizer.pad_token = tokenizer.eos_token
    config = _llama_config(
        tokenizer, tie_word_embeddings=True, num_labels=1, eos_token_id=end, pad_token_id=end
    )
    _save(LlamaForSequenceClassification(config), tokenizer, folder)


def _save(model: Any, tokenizer: Any, folder: Path) -> None:
    import torch

    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


MODELS: dict[str, Callable[[Path], None]] = {
    POLICY: save_llama,
    "Qwen/Qwen3-0.6B": _save_qwen,
    "answerdotai/ModernBERT-base": _save_modernbert,
    "Skywork/Skywork-Reward-V2-Qwen3-0.6B": _save_skywork,
    "Ray2333/GRM-Llama3.2-3B-rewardmodel-ft": _save_grm,
}
