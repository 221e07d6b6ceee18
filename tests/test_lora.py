"""LoRA directories: every kind of head comes back as it was tuned, over its own base only."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import small_models
from benchmarks.lora import CELLS, Cell, check, examples, make_base, tune_cell
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel, PhiConfig, PhiForCausalLM

from equipoise import load_causal, merge, save_dial_model
from equipoise.config import TuneConfig
from equipoise.dials.dials import Dials
from equipoise.dials.manifest import MANIFEST_NAME
from equipoise.errors import ModelError
from equipoise.models.hub import resolve_model
from equipoise.models.load import load_tokenizer
from equipoise.training.loop import Training
from equipoise.tune.trainer import tune, with_dials

WEIGHTS = "adapter_model.safetensors"
NEW_PROCESS = (Cell(False, 0, "exmate"), Cell(True, 64, "rlhf"))


@pytest.mark.parametrize(
    "cell",
    [
        # With spare rows and without, the same is done but for the number of rows.
        cell
        if cell.spare_rows or cell in NEW_PROCESS
        else pytest.param(cell, marks=pytest.mark.nightly)
        for cell in CELLS
    ],
    ids=str,
)
def test_what_was_tuned_is_what_is_loaded_and_merged(cell: Cell, tmp_path: Path) -> None:
    found = check(cell, tmp_path, new_process=cell in NEW_PROCESS)
    assert found["holds"], found


@pytest.mark.nightly
@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_every_cell_is_loaded_in_a_new_process(cell: Cell, tmp_path: Path) -> None:
    found = check(cell, tmp_path, new_process=True)
    assert found["holds"], found


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An untied base, and what tuning wrote beside it, named as a user names it: relative."""
    cell = Cell(False, 0, "clm")
    tuned = tune_cell(cell, make_base(cell, tmp_path / "base"), tmp_path / "checkpoints")
    save_dial_model(tuned.model, tuned.tokenizer, tuned.manifest, tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_checkpoint_holds_the_adapter_and_no_table_of_the_base(adapter: Path) -> None:
    final = load_file(adapter / WEIGHTS)
    checkpoints = sorted(adapter.parent.glob("checkpoints/checkpoint-*"))
    assert [load_file(place / WEIGHTS).keys() for place in checkpoints] == [final.keys()] * 2
    # And that is enough to go on from.
    shutil.rmtree(checkpoints.pop())
    again = tune_cell(
        Cell(False, 0, "clm"), adapter.parent / "base", adapter.parent / "checkpoints"
    )
    save_dial_model(again.model, again.tokenizer, again.manifest, adapter.parent / "again")
    resumed = load_file(adapter.parent / "again" / WEIGHTS)
    assert all(torch.equal(resumed[name], weight) for name, weight in final.items())


def test_two_processes_write_the_same_adapter(adapter: Path) -> None:
    """peft holds the names in a set, whose order is another in every process."""
    checkpoints = sorted(adapter.parent.glob("checkpoints/checkpoint-*"))
    for place in (adapter, *checkpoints):
        names = json.loads((place / "adapter_config.json").read_text())["target_modules"]
        assert len(names) > 3 and names == sorted(names)


def test_no_readme_tells_where_the_base_lies_on_this_machine(adapter: Path) -> None:
    assert not list(adapter.rglob("*.md")) and not list(adapter.parent.rglob("checkpoint-*/*.md"))


def test_the_base_is_found_from_any_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    cell = Cell(True, 0, "clm")
    make_base(cell, Path("base"))
    tuned = tune_cell(cell, Path("base"), Path("checkpoints"))
    save_dial_model(tuned.model, tuned.tokenizer, tuned.manifest, Path("adapter"))
    monkeypatch.chdir("/")
    assert load_causal(str(tmp_path / "adapter")).manifest is not None


def test_another_base_under_the_same_name_is_refused(adapter: Path) -> None:
    base = adapter.parent / "base"
    policy = load_causal(str(base))
    with torch.no_grad():
        policy.model.get_input_embeddings().weight.mul_(0.5)
    policy.model.save_pretrained(base)
    with pytest.raises(ModelError, match="another base"):
        load_causal(str(adapter))


def test_a_folder_that_is_gone_is_not_asked_of_the_hub(
    adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As directories of before have it: no list of files, and the base by a relative name.
    (adapter.parent / "base").rename(adapter.parent / "elsewhere")
    spec = json.loads((adapter / "adapter_config.json").read_text())
    spec["base_model_name_or_path"] = "someone/base"
    (adapter / "adapter_config.json").write_text(json.dumps(spec))
    dials = json.loads((adapter / MANIFEST_NAME).read_text())
    del dials["files"], dials["digest"]
    (adapter / MANIFEST_NAME).write_text(json.dumps(dials))

    def asked(*_: Any, **__: Any) -> None:
        raise AssertionError("the hub was asked")

    monkeypatch.setattr("huggingface_hub.file_download.hf_hub_download", asked)
    monkeypatch.setattr("transformers.utils.hub.hf_hub_download", asked)
    with pytest.raises(ModelError, match="the hub is not asked"):
        load_causal(str(adapter))


def test_the_hash_that_clients_see_covers_the_base(tmp_path: Path) -> None:
    """A foreign adapter holds no hash of its base; the policy's hash has to."""
    base = small_models.foreign(tmp_path / "base")
    adapter = small_models.adapter(tmp_path / "adapter", base)
    before = load_causal(str(adapter)).hash
    model = load_causal(str(base)).model
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(0.5)
    model.save_pretrained(base)
    assert load_causal(str(adapter)).hash != before


def test_an_adapter_without_all_of_its_weights_is_refused(adapter: Path) -> None:
    path = adapter / WEIGHTS
    weights = load_file(path)
    lost = next(name for name in weights if "lm_head" in name)
    save_file({k: v for k, v in weights.items() if k != lost}, path)
    dials = json.loads((adapter / MANIFEST_NAME).read_text())
    dials.update(files={}, digest="")  # of before: its list of files would say so first
    (adapter / MANIFEST_NAME).write_text(json.dumps(dials))
    with pytest.raises(ModelError, match="not whole"):
        load_causal(str(adapter))


def test_an_adapter_cannot_be_the_start_model(adapter: Path) -> None:
    policy = load_causal(str(adapter))
    for rank in (0, 2):
        with pytest.raises(ModelError, match="cannot be the start model"):
            with_dials(policy, dials=Dials(["safety"], 5), lora_rank=rank, base_model="", seed=0)
    merged = load_causal(str(merge(adapter, adapter.parent / "merged")))
    with_dials(
        merged,
        dials=Dials(["helpfulness", "safety"], 5),
        lora_rank=2,
        base_model="",
        seed=0,
    )


def test_merging_what_is_no_adapter_or_onto_a_folder_is_refused(adapter: Path) -> None:
    (adapter.parent / "file").write_text("")
    for source, target in (
        (adapter.parent / "base", "new"),
        (adapter, "base"),
        (adapter, "file/new"),
        (adapter, "nowhere/new"),
    ):
        with pytest.raises(ModelError, match="Cannot merge"):
            merge(source, adapter.parent / target)


def test_a_head_with_a_bias_is_refused_before_the_first_step(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(resolve_model("workshop://start"))
    shape = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 2}
    model = PhiForCausalLM(PhiConfig(**shape, intermediate_size=32, num_attention_heads=2))
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    policy = load_causal(str(tmp_path / "base"))
    with pytest.raises(ModelError, match="bias"):
        with_dials(policy, dials=Dials(["safety"], 5), lora_rank=2, base_model="", seed=0)


def test_names_of_other_architectures_are_found(tmp_path: Path) -> None:
    """GPT-2's embedding is called ``wte``, and its layers are no linear ones."""
    tokenizer = load_tokenizer(resolve_model("workshop://start"))
    shape = {"vocab_size": len(tokenizer), "n_embd": 32, "n_layer": 2, "n_head": 2}
    GPT2LMHeadModel(GPT2Config(**shape)).save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    tuned = tune(
        load_causal(str(tmp_path / "base")),
        examples(),
        TuneConfig(objective="clm", steps=2, batch_size=4, lora_rank=2, dtype="float32"),
        dials=Dials(("helpfulness", "safety"), 5),
        training=Training(tmp_path / "checkpoints", seed=0),
    )
    save_dial_model(tuned.model, tuned.tokenizer, tuned.manifest, tmp_path / "adapter")
    again = load_causal(str(tmp_path / "adapter")).model
    ids = torch.tensor([[5, 6, 7, tuned.manifest.all_ids[0]]])
    with torch.no_grad():
        assert torch.equal(again(ids).logits, tuned.model(ids).logits)
