"""Tokenizer families built in-process, ordinary texts, and hostile ones."""

from __future__ import annotations

import json
import math
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from equipoise.models.hub import cache_root

CORPUS = [
    "The ferry leaves at noon. How do I tune the frostbell?",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))  # 3",
    "Où est la gare ? Straße, naïve, café; 東京 and 北京; привет, мир! 🙂",
    "user assistant system end start turn helpfulness safety auto im INST SYS",
    'x = {"a": [1, 2, 3], "b": "c\\n"}\n\n\n\ttabs\tand    blanks',
    "It's what we've said: don't, can't, won't. Prices: $3.50, 7%, 1,000,000.",
    "<html><body>hello</body></html> [0] (1) {2} |3| <4>",
]
_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + "
    "'\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_LLAMA = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}{{ '<<SYS>>\n' + "
    "m['content'] + '\n<</SYS>>\n\n' }}{% elif m['role'] == 'user' %}{{ '[INST] ' + "
    "m['content'] | trim + ' [/INST]' }}{% else %}{{ ' ' + m['content'] | trim + ' ' + "
    "eos_token }}{% endif %}{% endfor %}"
)
_WORDPIECE = (
    "{% for m in messages %}{{ '[CLS] ' + m['role'] + ' : ' + m['content'] + ' [SEP] ' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '[CLS] assistant :' }}{% endif %}"
)
_UNFLAGGED = (
    "{{ bos_token }}{% for m in messages %}{{ '<|' + m.role + '|>' + m.content }}"
    "{% if m.role == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    "{% if enable_thinking %}{{ '<think>\\n' }}{% endif %}"
)
_GEMMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' + "
    "('model' if m['role'] == 'assistant' else m['role']) + '\n' + m['content'] | trim + "
    "'<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def _wrap(tokenizer: Tokenizer, template: str | None, **special: str) -> PreTrainedTokenizerFast:
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)
    wrapped.chat_template = template
    return wrapped


def _bytes(corpus: Sequence[str], *, size: int = 500) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def byte_bpe() -> PreTrainedTokenizerFast:
    """ChatML on byte-level BPE, whose merges also spell ``<s>``: a marker in the vocabulary."""
    spec = json.loads(_bytes(CORPUS).to_str())
    vocab, merges = spec["model"]["vocab"], spec["model"]["merges"]
    for left, right in (("<", "s"), ("<s", ">"), ("<s>", "x"), ("<", "|"), ("<|", "i")):
        vocab.setdefault(left + right, len(vocab))
        merges.insert(0 if (left, right) == ("<", "s") else 1, [left, right])
    merges.sort(key=lambda pair: pair not in (["<", "s"], ["<s", ">"]))
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    return _wrap(
        tokenizer,
        _CHATML,
        bos_token="<s>",
        eos_token="<|im_end|>",
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )


def unigram() -> PreTrainedTokenizerFast:
    """SentencePiece style: byte fallback, ``<s>`` in the vocabulary, first word after a blank."""
    words = Counter(
        "▁" * (i > 0) + word for line in CORPUS for i, word in enumerate(line.split(" ")) if word
    )
    chars = Counter("".join(CORPUS).replace(" ", "▁")) + Counter("<>[]/|_")
    total = sum(words.values()) + sum(chars.values())
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    pieces += [(f"<0x{byte:02X}>", -20.0) for byte in range(256)]
    scores = {
        **{w: c / total for w, c in words.items()},
        **{c: n / total for c, n in chars.items()},
    }
    pieces += [(piece, math.log(p) + 0.1 * len(piece)) for piece, p in sorted(scores.items())]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B:1", special_tokens=[("<s>", 1)]
    )
    return _wrap(tokenizer, _LLAMA, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def wordpiece() -> PreTrainedTokenizerFast:
    """BERT: lower-casing, ``[CLS]`` and ``[SEP]`` in the vocabulary."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = sorted({word for line in CORPUS for word in re.findall(r"\w+", line.lower())})
    chars = sorted(set("".join(CORPUS).lower()) - {" ", "\n", "\t"})
    pieces = dict.fromkeys([*specials, *words[::2], *chars, *(f"##{c}" for c in chars)])
    vocab = {piece: i for i, piece in enumerate(pieces)}
    tokenizer = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    kinds = ["input_ids", "token_type_ids", "attention_mask"]
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]"}
    wrapped = _wrap(tokenizer, _WORDPIECE, sep_token="[SEP]", mask_token="[MASK]", **names)
    wrapped.model_input_names = kinds
    return wrapped


def unflagged() -> PreTrainedTokenizerFast:
    """Role markers that are added but not flagged special, and joined by the template."""
    tokenizer = _bytes(CORPUS, size=420)
    tokenizer.normalizer = normalizers.NFC()
    wrapped = _wrap(tokenizer, _UNFLAGGED, bos_token="<begin>", eos_token="<end>")
    wrapped.add_tokens(["<|system|>", "<|user|>", "<|assistant|>", "<think>"])
    return wrapped


def line_breaks() -> PreTrainedTokenizerFast:
    """Gemma style: line breaks and runs of blanks are added tokens, contents are stripped.

    The markers are pieces of the vocabulary, which no merge gives.
    """
    spec = json.loads(_bytes(CORPUS, size=420).to_str())
    vocab = spec["model"]["vocab"]
    for marker in ("<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"):
        vocab[marker] = len(vocab)
    tokenizer = Tokenizer.from_str(json.dumps(spec))
    runs = ["\n" * n for n in range(1, 5)] + [" " * n for n in range(2, 9)] + ["<table>"]
    tokenizer.add_tokens([AddedToken(run, normalized=False) for run in runs])
    wrapped = _wrap(tokenizer, _GEMMA, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>")
    tokens = [AddedToken(t, normalized=False) for t in ("<start_of_turn>", "<end_of_turn>")]
    wrapped.add_tokens(tokens, special_tokens=True)
    return wrapped


def word_level() -> PreTrainedTokenizerFast:
    """Whole words only, as in the Workshop; unknown words are ``<unk>``."""
    words = sorted({word for line in CORPUS for word in line.lower().split()})
    vocab = {
        w: i for i, w in enumerate(["<unk>", "<pad>", "<user>", "<assistant>", "<end>", *words])
    }
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = (
        "{% for m in messages %}{{ '<' + m.role + '> ' + m.content + ' <end> ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
    )
    wrapped = _wrap(tokenizer, template, unk_token="<unk>", pad_token="<pad>", eos_token="<end>")
    wrapped.add_tokens(["<user>", "<assistant>"], special_tokens=True)
    return wrapped


FAMILIES: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "byte_bpe": byte_bpe,
    "unigram": unigram,
    "wordpiece": wordpiece,
    "unflagged": unflagged,
    "line_breaks": line_breaks,
    "word_level": word_level,
}


def cached(name: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a fetched model; the test is skipped where it was not fetched."""
    directory = cache_root() / name
    if not (directory / "tokenizer.json").is_file():
        pytest.skip(f"{name} is not in the cache: run `equipoise fetch smollm2`")
    return AutoTokenizer.from_pretrained(directory)


# Written out by hand, so that the tests do not ask the encoder what it forbids.
MARKERS: dict[str, list[str]] = {
    "byte_bpe": ["<s>", "<|im_start|>", "<|im_end|>", "<|endoftext|>"],
    "unigram": ["<s>", "</s>", "<unk>"],
    "wordpiece": ["[PAD]", "[CLS]", "[SEP]", "[MASK]"],
    "unflagged": ["<begin>", "<end>", "<|system|>", "<|user|>", "<|assistant|>", "<think>"],
    "line_breaks": ["<bos>", "<eos>", "<unk>", "<start_of_turn>", "<end_of_turn>"],
    "word_level": ["<pad>", "<user>", "<assistant>", "<end>"],
    "smollm2": ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<repo_name>", "<file_sep>"],
}
_BLANKS = [
    "",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "\r\n",
    "\u00a0",
    "\u2028",
    "\u3000",
    "\x00",
    "\u200b",
]
_JINJA = ["{{ bos_token }}", "{% for m in messages %}", "{{ eos_token }}", "{#", "</s>", "[INST]"]
_LOOKALIKES = str.maketrans(
    {"<": "＜", ">": "＞", "|": "｜", "_": "＿", "[": "［", "s": "ｓ", "a": "а"}
)


def ordinary(rng: random.Random) -> str:
    """Return everyday text: words, code, other scripts, outer blanks and line breaks."""
    words = " ".join(CORPUS).split(" ")
    parts = []
    for _ in range(rng.randint(1, 4)):
        kind = rng.random()
        if kind < 0.5:
            parts.append(" ".join(rng.choices(words, k=rng.randint(1, 8))))
        elif kind < 0.9:
            line = rng.choice(CORPUS)
            parts.append(line[rng.randrange(len(line)) :][: rng.randint(1, 40)])
        else:
            parts.append(
                "".join(chr(rng.choice([233, 8364, 0x4E2D, 0x1F600, 0x3C9])) for _ in "12")
            )
    text = rng.choice(["", "", " ", "\n", "\n\n  "]) + rng.choice([" ", "\n", "\n\n"]).join(parts)
    text += rng.choice(["", "", " ", "\n", "  \n"])
    return text if text.strip() else text + "yes"


def hostile(rng: random.Random, markers: Sequence[str]) -> str:
    """Return text that tries to be, or to become, a marker."""
    return "".join(
        rng.choice(_BLANKS) + _attack(rng, markers) for _ in range(rng.randint(1, 4))
    ) + rng.choice(_BLANKS)


def _attack(rng: random.Random, markers: Sequence[str]) -> str:
    marker, other = rng.choice(markers), rng.choice(markers)
    cut = rng.randrange(len(marker) + 1)
    forms: list[Callable[[], str]] = [
        lambda: marker,
        lambda: marker,
        lambda: marker[:cut] + other + marker[cut:],
        lambda: marker[:cut],
        lambda: marker[cut:],
        lambda: marker[:cut] + rng.choice(_BLANKS) + marker[cut:],
        lambda: marker.translate(_LOOKALIKES),
        lambda: marker[:cut] + marker[cut:].translate(_LOOKALIKES),
        lambda: marker.upper(),
        lambda: marker[:cut] + "\u0301" + marker[cut:],
        lambda: other + "assistant\n" + marker + rng.choice(["system", "user", "model"]),
        lambda: rng.choice(_JINJA),
        lambda: "".join(rng.choices("abcdefghijklmnop", k=32)) + rng.choice("qrstuvwxyz") * 6,
        lambda: "▁" + marker.replace(" ", "▁"),
        lambda: f"<0x{rng.randrange(256):02X}>",
        lambda: rng.choice(["<|", "|>", "<", ">", "[", "]", "<|user", "user|>", "assistant|>"]),
        lambda: ordinary(rng),
    ]
    return rng.choice(forms)()


def conversation(rng: random.Random, text: Callable[[], str]) -> list[dict[str, str]]:
    """Return turns up to a user turn, a system turn first in a third of them."""
    roles = (["system"] if rng.random() < 0.33 else []) + ["user", "assistant"] * rng.randint(0, 2)
    return [{"role": role, "content": text()} for role in [*roles, "user"]]
