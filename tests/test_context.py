"""Prompt, controls and answer fit into the model's context, or nothing is sampled."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from equipoise.cli.main import main
from equipoise.config import Sampling
from equipoise.encoding.encode import Encoder
from equipoise.engine.batcher import ContinuousBatcher
from equipoise.engine.sample import TransformersEngine
from equipoise.engine.seam import Generation
from equipoise.errors import DataError
from equipoise.models.limits import positions
from equipoise.types import Branch, GenerationRequest
from pipeline_kit import build_tokenizer, save_assets, tiny_recipe, write_recipe

CONTEXT = 24
SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": CONTEXT},
    "opt": {
        "hidden_size": 16,
        "ffn_dim": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "word_embed_proj_dim": 16,
        "max_position_embeddings": CONTEXT,
    },
    "llama": {
        "hidden_size": 16,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "max_position_embeddings": CONTEXT,
    },
}


def model(kind: str) -> Any:
    config = transformers.AutoConfig.for_model(
        kind, vocab_size=400, bos_token_id=None, eos_token_id=None, pad_token_id=None, **SIZES[kind]
    )
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def sampling(max_tokens: int) -> Sampling:
    return Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=max_tokens)


@pytest.mark.parametrize("kind", SIZES)
def test_the_engine_fills_a_context_to_its_last_position_and_no_further(kind: str) -> None:
    engine = TransformersEngine(model(kind), Encoder(build_tokenizer()), model_hash="")
    asked = [
        GenerationRequest((5,), (Branch((), 0),)),
        GenerationRequest((5, 6, 7, 8), tuple(Branch((9, 10), seed) for seed in range(20))),
    ]
    longest = max(one.n_tokens for one in engine.generate(asked, sampling(CONTEXT - 6))[1])
    assert longest == CONTEXT - 6
    before = engine.prompt_positions
    with pytest.raises(DataError, match=f"6 tokens of prompt and {CONTEXT - 5} to sample"):
        engine.generate(asked, sampling(CONTEXT - 5))
    assert engine.prompt_positions == before


def test_the_server_counts_the_same_positions() -> None:
    batcher = ContinuousBatcher(model("gpt2"), Encoder(build_tokenizer()), slots=1)
    assert batcher.context_tokens == CONTEXT
    generation = Generation((5, 6), (7,), sampling(CONTEXT - 2), 0, "")

    async def ask() -> None:
        async for _ in batcher.stream(generation):
            pass

    with pytest.raises(DataError, match="3 tokens of prompt"):
        asyncio.run(ask())


def test_a_config_that_names_no_positions_limits_nothing() -> None:
    config = transformers.BloomConfig()
    assert positions(config) is None
    config.max_position_embeddings = -1
    assert positions(config) is None


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"generate": {"sampling": {"max_tokens": 500}}}, "Lower generate.sampling.max_tokens to"),
        ({"evaluate": {"sampling": {"max_tokens": 500}}}, "Lower evaluate.sampling.max_tokens to"),
        ({"evaluate": {"sampling": {"max_tokens": 600}}}, "Lower evaluate.sampling.max_tokens to"),
        (
            {"tune": {"objective": "rlhf", "rlhf": {"sampling": {"max_tokens": 500}}}},
            "Lower tune.rlhf.sampling.max_tokens to",
        ),
        (
            {
                "evaluate": {
                    "responders": ["prompting"],
                    "sampling": {"max_tokens": 128},
                    "phrases": {"safety": ["a", "b", "do be careful " * 40]},
                }
            },
            "shorten evaluate.phrases",
        ),
    ],
)
def test_a_run_without_room_ends_before_it_samples(
    tmp_path: Path,
    assets: Path,
    capsys: pytest.CaptureFixture[str],
    changes: dict[str, Any],
    told: str,
) -> None:
    recipe = write_recipe(tmp_path / "recipe.yaml", tiny_recipe(assets, **changes))
    with pytest.raises(SystemExit) as caught:
        main(["stage", "generate", str(recipe), "--dir", str(tmp_path / "run")])
    assert caught.value.code == 1
    error = capsys.readouterr().err
    assert "context of 512 tokens" in error
    assert told in error
    assert not (tmp_path / "run" / "prompts" / "prompts.jsonl").exists()


@pytest.fixture(scope="module")
def assets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_assets(tmp_path_factory.mktemp("assets"))
