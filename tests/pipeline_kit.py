"""A whole run in miniature: model directories of two layers, a dozen prompts, a short recipe."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

ATTRIBUTES = ("helpfulness", "safety")
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
ITEMS = ("kettle", "ladder", "lantern", "piano", "rudder", "scarf", "teapot", "wheel")
VERBS = ("mend", "paint", "carry", "clean")


def build_tokenizer(*, template: bool = True) -> Any:
    """A byte-level BPE tokenizer of a few hundred pieces, with ChatML-like markers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|pad|>", "<|start|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [f"how do i {verb} the {item} ? use the {item} ." for verb in VERBS for item in ITEMS]
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>"
    )
    if template:
        fast.chat_template = TEMPLATE
    return fast


def save_policy(directory: Path, *, template: bool = True, seed: int = 0) -> Path:
    """Save a Llama of 2 layers and 32 channels as an ordinary model directory."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = build_tokenizer(template=template)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config)
    _teach(model, tokenizer, seed=seed)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def _teach(model: Any, tokenizer: Any, *, seed: int, steps: int = 120) -> None:
    """Teach sentences with full stops and ends, so that a pool is not all gibberish."""
    import random

    import torch

    draw = random.Random(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        texts = []
        for _ in range(16):
            verb, item = draw.choice(VERBS), draw.choice(ITEMS)
            answer = " ".join(
                f"{draw.choice(VERBS)} the {draw.choice((item, *ITEMS))} ."
                for _ in range(draw.randint(1, 2))
            )
            texts.append(
                f"<|start|>user\nhow do i {verb} the {item} ?<|end|>\n"
                f"<|start|>assistant\n{answer}<|end|>"
            )
        batch = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
        labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
        model(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels
        ).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def save_reward_model(directory: Path, *, seed: int, constant: bool = False) -> Path:
    """Save a sequence-classification Llama with one logit; ``constant``: every score is equal."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    tokenizer = build_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=256,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=2,
        num_labels=1,
    )
    model = LlamaForSequenceClassification(config)
    if constant:
        torch.nn.init.zeros_(model.score.weight)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


def save_nan_reward_model(directory: Path) -> Path:
    """Save a reward model whose every score is NaN."""
    import torch
    from transformers import AutoModelForSequenceClassification

    save_reward_model(directory, seed=9)
    model = AutoModelForSequenceClassification.from_pretrained(directory)
    torch.nn.init.constant_(model.score.weight, float("nan"))
    model.save_pretrained(directory)
    return directory


def write_prompts(file: Path, texts: list[str]) -> Path:
    """Write a JSONL file of prompts."""
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts), "utf-8")
    return file


def prompt_texts(count: int, start: int = 0) -> list[str]:
    """Distinct prompts."""
    found = [f"how do i {verb} the {item} ?" for item in ITEMS for verb in VERBS]
    return found[start : start + count]


def save_assets(root: Path) -> Path:
    """Save policy, two reward models, two judges and prompts below ``root``."""
    root.mkdir(parents=True, exist_ok=True)
    save_policy(root / "policy")
    for index, name in enumerate(("rm_hp", "rm_sf", "judge_hp", "judge_sf")):
        save_reward_model(root / name, seed=10 + index)
    write_prompts(root / "train.jsonl", prompt_texts(8))
    write_prompts(root / "test.jsonl", prompt_texts(4, start=8))
    return root


def tiny_recipe(assets: Path, **changes: Any) -> dict[str, Any]:
    """A recipe over the assets that runs in seconds; ``changes`` replace top-level fields."""
    return {
        "name": "tiny",
        "description": "A run in miniature.",
        "levels": 3,
        "model": str(assets / "policy"),
        "prompts": {
            "train": [{"source": str(assets / "train.jsonl")}],
            "test": [{"source": str(assets / "test.jsonl")}],
            "max_prompt_tokens": 64,
        },
        "reward_models": {
            "helpfulness": {"model": str(assets / "rm_hp")},
            "safety": {"model": str(assets / "rm_sf")},
        },
        "judges": {
            "helpfulness": {"model": str(assets / "judge_hp")},
            "safety": {"model": str(assets / "judge_sf")},
        },
        "generate": {
            "completions_per_prompt": 6,
            "batch_size": 12,
            "sampling": {"temperature": 1.0, "max_tokens": 16},
        },
        "distil": {"data": "denoised"},
        "tune": {"steps": 6, "batch_size": 4, "checkpoint_every": 2, "dtype": "float32"},
        "evaluate": {
            "responders": ["start", "tuned"],
            "bootstrap": 50,
            "auto_sweep": False,
            "sampling": {"max_tokens": 8},
        },
        **changes,
    }


def write_recipe(file: Path, plain: dict[str, Any]) -> Path:
    """Write a recipe as YAML."""
    file.write_text(yaml.safe_dump(plain, sort_keys=False), "utf-8")
    return file


@contextmanager
def blank_pictures() -> Iterator[None]:
    """Let reports be made with empty pictures: drawing them takes longer than a tiny run."""

    from equipoise.report.canvas import Picture

    def blank(draw: Callable[[], Any], name: str, folder: Path) -> list[Picture]:
        folder.mkdir(parents=True, exist_ok=True)
        paths = [folder / f"{name}.svg", folder / f"{name}.png"]
        for path in paths:
            path.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>", "utf-8")
        return [Picture("<svg xmlns='http://www.w3.org/2000/svg'/>", 100, 0)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("equipoise.report.canvas.save_and_split", blank)
        yield
