"""Directories that earlier versions wrote are read as they are, or refused by every command alike.

``old/model`` was written by 4cc18aa, with hashes and without a format number; the ``dials.json``
beside it is what 21b5c08 wrote for the same model, before there were hashes of files.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from equipoise.check.model import check_model
from equipoise.cli.main import main
from equipoise.config import Sampling
from equipoise.dials.dials import Dials
from equipoise.dials.manifest import FORMAT, MANIFEST_NAME, read_manifest
from equipoise.dials.tokens import save_dial_model
from equipoise.engine.sample import TransformersEngine
from equipoise.errors import ConfigError
from equipoise.models.load import load_causal
from equipoise.serve.main import served_model
from equipoise.types import Branch, DialSetting, GenerationRequest, Message

OLD = Path(__file__).parent / "old"
MANIFESTS = (OLD / "model" / MANIFEST_NAME, OLD / "dials-of-before-file-hashes.json")


@pytest.fixture(params=MANIFESTS, ids=("4cc18aa", "21b5c08"))
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    shutil.copytree(OLD / "model", tmp_path / "model")
    shutil.copyfile(request.param, tmp_path / "model" / MANIFEST_NAME)
    return tmp_path / "model"


def test_a_model_of_before_is_loaded_served_and_checked(model: Path) -> None:
    policy = load_causal(str(model), device="cpu")
    assert policy.manifest is not None and policy.manifest.format is None
    assert policy.encoder.control_ids(DialSetting((2, None))) == (262, 267)
    served = served_model(policy, "old")
    assert served.dials == Dials(("helpfulness", "safety"), 3)
    ids = tuple(policy.encoder.prompt_ids([Message("user", "hi")]))
    request = GenerationRequest(ids, (Branch((262, 267), seed=1),))
    sampled = TransformersEngine.of(policy).generate([request], Sampling(max_tokens=4))[0][0]
    assert 0 < len(sampled.token_ids) <= 4
    assert check_model(str(model)).works


def test_saved_anew_it_has_the_format_of_today(model: Path, tmp_path: Path) -> None:
    policy = load_causal(str(model), device="cpu")
    assert policy.manifest is not None
    save_dial_model(policy.model, policy.tokenizer, policy.manifest, tmp_path / "new")
    assert json.loads((tmp_path / "new" / MANIFEST_NAME).read_text())["format"] == FORMAT
    again = load_causal(str(tmp_path / "new"), device="cpu").manifest
    assert again is not None and again.row_hashes == policy.manifest.row_hashes


def test_a_format_of_later_is_refused_everywhere_alike(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = model / MANIFEST_NAME
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": FORMAT + 1}))
    with pytest.raises(ConfigError, match="has format 2") as refused:
        load_causal(str(model))
    assert "tune anew: `equipoise run RECIPE --dir NEW_RUN`" in refused.value.fix
    for command in (["check", str(model)], ["serve", str(model), "--policy", "example"]):
        with pytest.raises(SystemExit) as ended:
            main(command)
        assert ended.value.code == 1
        assert str(refused.value) in capsys.readouterr().err


def test_the_format_is_part_of_what_the_digest_covers(tmp_path: Path) -> None:
    policy = load_causal(str(OLD / "model"), device="cpu")
    assert policy.manifest is not None
    save_dial_model(policy.model, policy.tokenizer, policy.manifest, tmp_path)
    path = tmp_path / MANIFEST_NAME
    fields = json.loads(path.read_text())
    for changed in ({k: v for k, v in fields.items() if k != "format"}, fields | {"format": None}):
        path.write_text(json.dumps(changed))
        with pytest.raises(ConfigError, match="it was changed since it was written"):
            read_manifest(tmp_path)
