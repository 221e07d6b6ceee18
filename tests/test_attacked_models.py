"""Models that a stranger has prepared: of the hub, of an adapter, of a rope that looks around."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from benchmarks import small_models
from benchmarks.architectures import tokenizer
from benchmarks.lora import Cell, make_base, tune_cell
from transformers import LlamaConfig, LlamaForCausalLM

from equipoise import load_causal, save_dial_model
from equipoise.check.model import check_model
from equipoise.config import TuneConfig
from equipoise.dials.dials import Dials
from equipoise.errors import DataError, ModelError
from equipoise.models.limits import positions
from equipoise.training.loop import Training
from equipoise.tune.trainer import tune
from hub_kit import COMMIT, add_model, offline
from tuning_kit import ATTRIBUTES, examples


def hub(root: Path, name: str, source: Path) -> None:
    add_model(root, name, COMMIT, lambda made: shutil.copytree(source, made))


def test_an_adapter_on_the_hub_names_no_folder_here(tmp_path: Path) -> None:
    """transformers would follow it from the hub id, and load what lies there."""
    other = make_base(Cell(True, 64, "clm"), tmp_path / "other")
    plain = make_base(Cell(True, 0, "clm"), tmp_path / "plain")
    small_models.adapter(tmp_path / "adapter", other)
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(tmp_path / "adapter" / name, plain / name)
    spec = json.loads((plain / "adapter_config.json").read_text())
    spec["base_model_name_or_path"] = str(other)
    (plain / "adapter_config.json").write_text(json.dumps(spec))
    hub(tmp_path / "hub-root", "someone/model", plain)
    with offline(tmp_path / "hub-root"), pytest.raises(ModelError, match="is not there"):
        load_causal("someone/model")


def test_a_dialled_model_of_the_hub_is_held_against_its_manifest(tmp_path: Path) -> None:
    small_models.tuned(tmp_path / "tuned", small_models.foreign(tmp_path / "base"), rank=0)
    hub(tmp_path / "hub-root", "someone/dials", tmp_path / "tuned")
    with offline(tmp_path / "hub-root"):
        assert load_causal("someone/dials").manifest is not None
        assert check_model("someone/dials").works  # from the cache, as the hub does not answer
    blob = next((tmp_path / "hub-root").rglob("*-generation_config.json"))
    blob.write_text("{}")
    with offline(tmp_path / "hub-root"), pytest.raises(ModelError, match="was changed"):
        load_causal("someone/dials")


@pytest.mark.parametrize("change", [{"layers_to_transform": [0]}, {"target_modules": ["q_proj"]}])
def test_weights_that_an_adapter_leaves_out_are_named(
    tmp_path: Path, change: dict[str, Any]
) -> None:
    base = small_models.foreign(tmp_path / "base")
    small_models.adapter(tmp_path / "adapter", base)
    load_causal(str(tmp_path / "adapter"))
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ModelError):
        load_causal(str(tmp_path / "adapter"))


@pytest.mark.parametrize("rank", [0, 2])
def test_a_tuned_directory_passes_its_check(tmp_path: Path, rank: int) -> None:
    cell = Cell(False, 0, "clm")
    base = make_base(cell, tmp_path / "base")
    if rank:
        tuned = tune_cell(cell, base, tmp_path / "checkpoints")
        save_dial_model(tuned.model, tuned.tokenizer, tuned.manifest, tmp_path / "tuned")
    else:
        small_models.tuned(tmp_path / "tuned", base, rank=0)
    found = check_model(str(tmp_path / "tuned"))
    assert found.works, found.lines()
    assert bool(found.base) == bool(rank)
    (tmp_path / "tuned" / "tokenizer_config.json").write_text("{}")
    with pytest.raises(ModelError, match="was changed"):
        check_model(str(tmp_path / "tuned"))


def test_an_adapter_without_weights_fails_its_check(tmp_path: Path) -> None:
    small_models.adapter(tmp_path / "adapter", small_models.foreign(tmp_path / "base"))
    (tmp_path / "adapter" / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match="is missing"):
        check_model(str(tmp_path / "adapter"))


def test_a_rope_that_changes_with_the_longest_row_ends_before_it_does(tmp_path: Path) -> None:
    """Beyond that an answer would depend on the rows beside it."""
    config = LlamaConfig(
        vocab_size=len(tokenizer()),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "original_max_position_embeddings": 16,
            "short_factor": [1.0] * 8,
            "long_factor": [float(i) for i in range(1, 9)],
        },
    )
    assert positions(config) == 16
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    tokenizer().save_pretrained(tmp_path / "base")
    with pytest.raises(DataError, match="more than 16"):
        tune(
            load_causal(str(tmp_path / "base")),
            examples(),
            TuneConfig(objective="clm", steps=1, batch_size=2),
            dials=Dials(ATTRIBUTES, 5),
            training=Training(tmp_path / "checkpoints", seed=0),
        )
