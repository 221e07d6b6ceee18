"""Models by hub id: the same loader reads what the hub's cache holds."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline_kit import build_tokenizer

LOAD = """
import sys
from equipoise.models.load import load_causal
policy = load_causal(sys.argv[1])
model = policy.model
print(type(model).__name__, model.config.hidden_size, policy.encoder.has_chat_template)
"""


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param("Qwen/Qwen2.5-0.5B-Instruct", "Qwen2", marks=pytest.mark.nightly),
        ("meta-llama/Llama-3.1-8B-Instruct", "Llama"),
    ],
)
def test_a_model_is_loaded_by_its_hub_id(tmp_path: Path, name: str, kind: str) -> None:
    import transformers

    folder = tmp_path / "hub" / f"models--{name.replace('/', '--')}"
    snapshot = folder / "snapshots" / ("0" * 40)
    tokenizer = build_tokenizer()
    config = getattr(transformers, f"{kind}Config")(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    getattr(transformers, f"{kind}ForCausalLM")(config).save_pretrained(snapshot)
    tokenizer.save_pretrained(snapshot)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("0" * 40)
    # The hub's library reads its environment once, when it is imported.
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, name],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == [f"{kind}ForCausalLM", "32", "True"], done.stderr[-500:]
