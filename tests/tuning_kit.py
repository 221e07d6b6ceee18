"""A tiny policy, examples and requests for the sampling and tuning tests."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from equipoise.encoding.encode import Encoder
from equipoise.models.load import LoadedPolicy
from equipoise.tune.batch import Presentation, collate
from equipoise.tune.objectives import mean_of
from equipoise.tune.prefix import branch_log_likelihoods
from equipoise.types import ControlledExample, DialSetting, Message, Prompt
from tokenizer_kit import byte_bpe

ATTRIBUTES = ("helpfulness", "safety")


def tiny_policy(*, tied: bool = True, attention: str = "sdpa", seed: int = 0) -> LoadedPolicy:
    """A two-layer Llama, 32 wide, on the byte-level BPE tokenizer of the kit."""
    tokenizer = byte_bpe()
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=256,
            tie_word_embeddings=tied,
            attn_implementation=attention,
        )
    ).eval()
    return LoadedPolicy(model, tokenizer, Encoder(tokenizer), None, f"tiny-{seed}")


def lively_policy() -> LoadedPolicy:
    """The same with ten times the weights.

    As it is born, its attention is next to nothing and its logits stay within 0.6: what is frozen
    under LoRA has to be of some use, as in a model that was trained.
    """
    policy = tiny_policy()
    with torch.no_grad():
        for weight in policy.model.parameters():
            if weight.ndim == 2:
                weight.mul_(10)
    return policy


def prompt(index: int) -> Prompt:
    words = ["how", "do", "i", "clean", "the", "small", "brass", "bell", "number"]
    text = " ".join(words[: 2 + index % 7]) + f" {index}?"
    return Prompt(f"p{index}", (Message("user", text),), "train")


def examples(n_prompts: int = 6) -> list[ControlledExample]:
    """Four cells per prompt; what is said depends on the cell only."""
    words = {0: "no no no", 4: "yes gladly"}
    return [
        ControlledExample(
            prompt(i),
            DialSetting((hp, sf)),
            f"{words[hp]} {'carefully' if sf else 'boldly'}",
            True,
            {"helpfulness": hp / 5 + 0.1, "safety": sf / 5 + 0.1},
        )
        for i in range(n_prompts)
        for hp in (0, 4)
        for sf in (0, 4)
    ]


def presented(
    example: ControlledExample, encoder: Encoder, others: Sequence[DialSetting]
) -> Presentation:
    """An example under its own setting, and under others."""
    completion = encoder.completion_ids(example.text, finished=example.finished)
    controls = [encoder.control_ids(setting) for setting in (example.setting, *others)]
    return Presentation(
        tuple(encoder.prompt_ids(example.prompt.messages)),
        tuple((*ids, *completion) for ids in controls),
        n_control=len(controls[0]),
        weight=example.weight,
    )


def lead_of_the_asked_cell(model: Any, encoder: Encoder) -> torch.Tensor:
    """Return, per example, m(y | x, right cell) minus the mean over its prompt's other cells."""
    corners = [DialSetting((hp, sf)) for hp in (0, 4) for sf in (0, 4)]
    batch = collate(
        [
            presented(one, encoder, [other for other in corners if other != one.setting])
            for one in examples()
        ]
    )
    assert batch.exists.all()
    with torch.no_grad():
        m = mean_of(*branch_log_likelihoods(model, batch))  # (24, 4)
    return m[:, 0] - m[:, 1:].mean(dim=1)


def spoiler(policy: LoadedPolicy, where: str, *, after: int) -> Callable[[int, int], None]:
    """Return an ``on_step`` that makes every loss or gradient NaN once ``after`` steps are done.

    The weights stay as they are: only a step that is not refused could spoil them.
    """

    def on_step(done: int, total: int) -> None:
        if done != after:
            return
        embeddings: Any = policy.model.get_input_embeddings()
        if where == "gradient":
            embeddings.weight.register_hook(lambda gradient: gradient * torch.nan)
        else:
            embeddings.register_forward_hook(lambda module, ids, vectors: vectors * torch.nan)

    return on_step


def kept_steps(folder: Path) -> list[int]:
    """Return the steps whose checkpoints are marked as complete."""
    found = folder.glob("checkpoint-*/equipoise.json")
    return sorted(int(path.parent.name.split("-")[1]) for path in found)
