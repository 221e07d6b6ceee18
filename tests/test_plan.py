"""The plan: what a stage is expected to cost, from sizes and rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from equipoise.config import SourceConfig
from equipoise.encoding.encode import Encoder
from equipoise.models.load import LoadedPolicy
from equipoise.pipeline.plan import ROWS_UNKNOWN, parameters_of, rows_of, training_speed
from pipeline_kit import build_tokenizer


def test_a_table_that_is_looked_up_costs_nothing(tmp_path: Path) -> None:
    save_file(
        {
            "model.embed_tokens.weight": torch.zeros(100, 8),
            "embeddings.position_embeddings.weight": torch.zeros(16, 8),
            "layer.0.weight": torch.zeros(8, 8),
            "layer.0.bias": torch.zeros(8),
        },
        tmp_path / "model.safetensors",
    )
    assert parameters_of(tmp_path) == 8 * 8 + 8


@pytest.mark.parametrize(("limit", "expected"), [(None, 7), (3, 3), (50, 7)])
def test_rows_are_those_of_the_file_up_to_the_limit(
    tmp_path: Path, limit: int | None, expected: int
) -> None:
    rows = (json.dumps({"prompt": str(i)}) for i in range(7))
    (tmp_path / "rows.jsonl").write_text("\n".join(rows) + "\n")
    assert rows_of(SourceConfig(source="rows.jsonl", limit=limit), tmp_path) == expected


@pytest.mark.parametrize(("limit", "expected"), [(None, ROWS_UNKNOWN), (3, 3)])
def test_rows_that_are_elsewhere_are_guessed(limit: int | None, expected: int) -> None:
    assert rows_of(SourceConfig(source="owner/name", limit=limit), None) == expected


def test_training_is_timed_where_the_model_is() -> None:
    """A device without numbers stands for a GPU."""
    tokenizer = build_tokenizer()
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    with torch.device("meta"):
        config = LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=1, **shape)
        model = LlamaForCausalLM(config)
    fed: set[str] = set()
    model.register_forward_pre_hook(
        lambda _module, _args, given: fed.add(given["input_ids"].device.type), with_kwargs=True
    )
    policy = LoadedPolicy(model, tokenizer, Encoder(tokenizer), None, "")
    assert training_speed(policy, [[5, 6, 7]], 2) > 0
    assert fed == {"meta"}
