"""Tiny model directories of every kind, made and used: plain, an adapter, with dials, a reward."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from equipoise.config import Sampling
from equipoise.dials.dials import Dials
from equipoise.dials.tokens import install, save_dial_model
from equipoise.engine.sample import TransformersEngine
from equipoise.models.load import LoadedPolicy, load_causal
from equipoise.tune.lora import add_lora
from equipoise.types import Branch, GenerationRequest, Message

ATTRIBUTES = ("helpfulness", "safety")
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def tokenizer() -> Any:
    """A byte-level tokenizer without merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    markers = ["<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    letters = [*markers, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(letters)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|end|>", additional_special_tokens=markers[1:]
    )
    fast.chat_template = TEMPLATE
    return fast


def sizes(n_tokens: int, **changes: Any) -> dict[str, Any]:
    """Sizes of a tiny Llama."""
    return {
        "vocab_size": n_tokens,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "bos_token_id": None,
        "eos_token_id": 0,
        **changes,
    }


def foreign(directory: Path) -> Path:
    """Save a plain model, as anybody would."""
    from transformers import LlamaConfig, LlamaForCausalLM

    fast = tokenizer()
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes(len(fast)))).save_pretrained(directory)
    fast.save_pretrained(directory)
    names = {"eos_token": "<|end|>", "additional_special_tokens": ["<|user|>"]}
    (directory / "special_tokens_map.json").write_text(json.dumps(names))
    return directory


def sharded(directory: Path) -> Path:
    """Save the same with an index and two or more shards."""
    foreign(directory)
    model = load_causal(str(directory)).model
    (directory / "model.safetensors").unlink()
    model.save_pretrained(directory, max_shard_size="12KB")
    return directory


def tuned(directory: Path, base: Path, *, rank: int) -> Path:
    """Save a model with dials: full weights, or an adapter on ``base``."""
    policy = load_causal(str(base))
    model: Any = policy.model
    manifest = install(
        model, policy.tokenizer, dials=Dials(ATTRIBUTES, 3), base_model_hash=policy.hash
    )
    if rank:
        model = add_lora(model, manifest, rank=rank, seed=0)
    save_dial_model(model, policy.tokenizer, manifest, directory)
    (directory / "README.md").write_text("# A model\n")
    return directory


def adapter(directory: Path, base: Path) -> Path:
    """Save a plain adapter, as anybody would."""
    from peft import LoraConfig, get_peft_model

    policy = load_causal(str(base))
    config = LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "v_proj"])
    get_peft_model(policy.model, config).save_pretrained(str(directory))
    policy.tokenizer.save_pretrained(directory)
    return directory


def reward(directory: Path) -> Path:
    """Save a reward model."""
    from transformers import LlamaConfig, LlamaForSequenceClassification

    fast = tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(**sizes(len(fast), num_labels=1, pad_token_id=1, num_hidden_layers=1))
    LlamaForSequenceClassification(config).save_pretrained(directory)
    fast.save_pretrained(directory)
    return directory


def use_dials(place: Path) -> None:
    """Load a tuned directory."""
    load_causal(str(place), device="cpu")


def use_policy(place: Path) -> None:
    """Load a policy, hold its weights against the file, and sample three tokens."""
    policy = load_causal(str(place), device="cpu")
    check_weights_are_stored(place, policy.model)
    sample(policy)


def use_reward(place: Path) -> None:
    """Load a reward model, hold its weights against the file, and score two answers."""
    from equipoise.config import RewardModelConfig
    from equipoise.rewards.load import load_reward_model
    from equipoise.types import Prompt

    model: Any = load_reward_model(
        RewardModelConfig(model=str(place)), attribute="safety", device="cpu"
    )
    check_weights_are_stored(place, model.model)
    prompt = Prompt("p", (Message("user", "hi"),), "train")
    model.score([(prompt, "a"), (prompt, "a longer one")])


def sample(policy: LoadedPolicy) -> None:
    """Sample three tokens."""
    ids = tuple(policy.encoder.prompt_ids((Message("user", "hi"),)))
    engine = TransformersEngine.of(policy)
    request = GenerationRequest(ids, (Branch((), 1),))
    engine.generate([request], Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=3))


def check_weights_are_stored(place: Path, model: Any) -> None:
    """Assert that every weight is one that stands in a file under its name."""
    from safetensors.torch import load_file

    stored: dict[str, torch.Tensor] = {}
    for folder in (place, *map(Path, {c.base_model_name_or_path for c in _adapters(model)})):
        for file in folder.glob("*.safetensors"):
            stored |= load_file(file)
    for name, weight in model.named_parameters():
        own = name.replace(".default", "").replace(".base_layer", "")
        found = stored.get(own, stored.get(own.removeprefix("base_model.model.")))
        if found is None or not torch.equal(found.float(), weight):
            raise AssertionError(f"{name} is not what the file holds")


def _adapters(model: Any) -> list[Any]:
    return list(getattr(model, "peft_config", {}).values())
