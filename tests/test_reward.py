"""Reward models: loading, scoring, training, and what is refused."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from equipoise.config import FitRewardConfig, RewardModelConfig, SourceConfig
from equipoise.data.pairs import LabelledAnswer
from equipoise.encoding.encode import Encoder
from equipoise.errors import DataError, ModelError, RewardError, TrainingError
from equipoise.models import load
from equipoise.overlap import prompt_key
from equipoise.rewards.baselines import auc, held_out_estimate, length_scores
from equipoise.rewards.card import read_card
from equipoise.rewards.classifier import FrozenFeatures
from equipoise.rewards.fit import fit_reward, split_by_prompt
from equipoise.rewards.input import InputEncoder
from equipoise.rewards.load import ClassifierReward, load_reward_model, reward_hash
from equipoise.types import Message, PreferencePair, Prompt
from reward_kit import (
    bert_dir,
    byte_tokenizer,
    causal_dir,
    classifier_dir,
    labelled,
    pairs,
    prompt,
    sentence,
)


def rows(n: int, *, seed: int = 0) -> list[tuple[Prompt, str]]:
    chooser = random.Random(seed)
    return [
        (prompt(sentence(chooser, n=chooser.randint(1, 8))), sentence(chooser, n=i % 9))
        for i in range(n)
    ]


def loaded(place: Path, **settings: Any) -> ClassifierReward:
    batch_size = settings.pop("batch_size", 4)
    model = load_reward_model(
        RewardModelConfig(model=str(place), **settings), attribute="x", batch_size=batch_size
    )
    assert isinstance(model, ClassifierReward)
    return model


@pytest.fixture(scope="module")
def causal(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return classifier_dir(tmp_path_factory.mktemp("models") / "classifier", num_labels=2)


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("backbones")
    return {"causal": causal_dir(folder / "causal"), "bert": bert_dir(folder / "bert")}


@pytest.mark.parametrize("batch_size", [1, 3, 64])
@pytest.mark.parametrize("two_segments", [False, True])
def test_score_depends_on_neither_batch_nor_order(
    causal: Path, tmp_path: Path, batch_size: int, two_segments: bool
) -> None:
    place = bert_dir(tmp_path / "bert", head=True) if two_segments else causal
    asked = rows(20)
    wanted = loaded(place, batch_size=7).score(asked)
    model = loaded(place, batch_size=batch_size)
    order = list(range(20))
    random.Random(batch_size).shuffle(order)
    found = model.score([asked[i] for i in order])
    assert found == pytest.approx([wanted[i] for i in order], abs=1e-5)
    assert len(set(np.round(wanted, 4))) > 10


def test_score_is_what_transformers_computes_for_the_chat(causal: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(causal)
    plain = AutoModelForSequenceClassification.from_pretrained(causal)
    text = "<|user|>mend it<|end|><|assistant|>with glue<|end|>"
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        wanted = plain(input_ids=ids).logits[0].tolist()
    asked = [(prompt("mend it"), "with glue"), (prompt("lamp " * 9), "x")]
    assert loaded(causal).score(asked)[0] == pytest.approx(wanted[0], abs=1e-5)
    assert loaded(causal, logit=1).score(asked)[0] == pytest.approx(wanted[1], abs=1e-5)
    assert loaded(causal, sign=-1).score(asked)[0] == pytest.approx(-wanted[0], abs=1e-5)


def test_padding_token_is_settled_where_the_config_names_none(tmp_path: Path) -> None:
    place = classifier_dir(tmp_path / "m", pad_token_id=None)
    asked = rows(9)
    together = loaded(place, batch_size=9).score(asked)
    assert together == pytest.approx(loaded(place, batch_size=1).score(asked), abs=1e-5)


def test_without_padding_the_head_reads_the_end_as_transformers_does_on_one_row(
    tmp_path: Path,
) -> None:
    place = classifier_dir(tmp_path / "m", pad_token_id=None)
    tokenizer = byte_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    tokenizer.save_pretrained(place)
    ours, asked = loaded(place), rows(3)
    plain: Any = AutoModelForSequenceClassification.from_pretrained(place)
    plain.config.pad_token_id = None
    with torch.no_grad():
        wanted = [
            plain(torch.tensor([ours.encode(p.messages, text).ids])).logits.item()
            for p, text in asked
        ]
    assert ours.score(asked) == pytest.approx(wanted, abs=1e-5)


def test_hash_tells_settings_apart(causal: Path) -> None:
    choices: list[dict[str, Any]] = [
        {}, {"sign": -1}, {"logit": 1}, {"max_length": 32}, {"format": "pair"}
    ]  # fmt: skip
    hashes = [loaded(causal, **settings).hash for settings in choices]
    assert len(set(hashes)) == len(choices)
    unloaded = [RewardModelConfig(model=str(causal), **settings) for settings in choices]
    assert [reward_hash(config, fitted_root=None) for config in unloaded] == hashes
    assert loaded(causal).hash == loaded(causal, batch_size=1).hash


def test_score_of_nothing_is_nothing(causal: Path) -> None:
    assert loaded(causal).score([]) == []


def test_score_that_is_not_finite_names_the_prompt(causal: Path) -> None:
    model = loaded(causal)
    asked = [(prompt("mend", id="fine"), "glue"), (prompt("lamp", id="broken-one"), "Zz")]
    token = byte_tokenizer().convert_tokens_to_ids("Z")
    with torch.no_grad():
        model.model.model.embed_tokens.weight[token] = float("nan")
    with pytest.raises(RewardError, match="broken-one"):
        model.score(asked)


def test_logits_of_the_wrong_shape_are_refused(causal: Path) -> None:
    model = loaded(causal)
    model.model.config.num_labels = 3
    with pytest.raises(RewardError, match="wrong shape"):
        model.score(rows(2))


def test_causal_model_without_head_is_refused(backbones: dict[str, Path]) -> None:
    with pytest.raises(ModelError, match="no classification head"):
        loaded(backbones["causal"])


@pytest.mark.parametrize(
    ("settings", "what"),
    [({"logit": 2}, "no logit 2"), ({"max_length": 8}, "too short")],
)
def test_impossible_settings_are_refused(causal: Path, settings: dict[str, int], what: str) -> None:
    with pytest.raises(ModelError, match=what):
        loaded(causal, **settings)


def test_missing_model_and_missing_template_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="No model directory"):
        loaded(tmp_path / "nowhere")
    place = bert_dir(tmp_path / "bert")
    encoder = Encoder(load.load_tokenizer(str(place)))
    with pytest.raises(ModelError, match="no chat template"):
        InputEncoder.of(encoder, format="chat", max_length=64)


def test_long_chat_keeps_the_end_of_the_prompt_and_the_start_of_the_completion() -> None:
    tokenizer = byte_tokenizer()
    encode = InputEncoder.of(Encoder(tokenizer), format="auto", max_length=40)
    row = encode((Message("user", "p" * 100 + "Q"),), "A" + "b" * 100)
    text = tokenizer.decode(row.ids)
    assert len(row.ids) == 40 and row.truncated
    assert text.startswith("ppp") and "pQ<|end|><|assistant|>Abbb" in text
    assert text.endswith("b<|end|>")
    start, end = row.answer
    assert tokenizer.decode(row.ids[start:end]).startswith("Abb") and end == 40
    short = encode((Message("user", "hi"),), "yes")
    assert not short.truncated
    assert tokenizer.decode(short.ids) == "<|user|>hi<|end|><|assistant|>yes<|end|>"


def test_long_pair_keeps_its_markers(tmp_path: Path) -> None:
    tokenizer = load.load_tokenizer(str(bert_dir(tmp_path / "bert")))
    encode = InputEncoder.of(Encoder(tokenizer), format="auto", max_length=16)
    row = encode((Message("user", "mend " * 30 + "lamp"),), "glue " + "slow " * 30)
    tokens = tokenizer.convert_ids_to_tokens(list(row.ids))
    assert encode.format == "pair" and row.truncated and len(tokens) == 16
    assert tokens == ["[CLS]", "mend", "mend", "lamp", "[SEP]", "glue", *["slow"] * 9, "[SEP]"]
    assert row.type_ids == (0,) * 5 + (1,) * 11
    assert row.answer == (5, 16)
    whole = encode((Message("user", "mend"),), "glue")
    assert tokenizer.convert_ids_to_tokens(list(whole.ids)) == [
        *("[CLS]", "mend", "[SEP]", "glue", "[SEP]")
    ]


def fit_config(kind: str, backbone: Path, **more: Any) -> FitRewardConfig:
    settings: dict[str, Any] = {
        "kind": kind,
        "backbone": str(backbone),
        "sources": [SourceConfig(source="unused")],
        "held_out": 40,
        "batch_size": 16,
        "epochs": 2,
        "learning_rate": 3e-3,
        **more,
    }
    return FitRewardConfig(**settings)


@pytest.mark.parametrize("kind", ["pairs", "labels"])
@pytest.mark.parametrize("head_only", [False, True])
@pytest.mark.parametrize("name", ["causal", "bert"])
def test_fitted_model_finds_what_is_better(
    backbones: dict[str, Path], tmp_path: Path, kind: str, head_only: bool, name: str
) -> None:
    data: Any = pairs(200) if kind == "pairs" else labelled(300)
    settings = fit_config(kind, backbones[name], head_only=head_only)
    card = fit_reward(data, settings, attribute="care", out_dir=tmp_path / "rm", seed=0)
    assert card.held_out is not None
    assert card.held_out.metric == ("accuracy" if kind == "pairs" else "auc")
    assert card.held_out.model.value > 0.9
    assert card.held_out.model.low <= card.held_out.model.value <= card.held_out.model.high
    assert card.held_out.bag_of_words.value > 0.75
    assert 0.2 < card.held_out.length_only.value < 0.8
    assert card.n_train + card.n_held_out == len(data)
    assert not set(card.train_prompts) & set(card.held_out_prompts)
    assert read_card(tmp_path / "rm") == card
    model = loaded(tmp_path / "rm")
    asked = [(prompt("mend the lamp"), "ask slow"), (prompt("mend the lamp"), "ask fast")]
    good, bad = model.score(asked)
    assert good > bad
    assert model.hash == reward_hash(RewardModelConfig(model=model.name), fitted_root=None)
    assert model.model.config.num_hidden_layers == (2 if head_only else 3)
    # An ordinary directory: the library's own class reads it, head included.
    _, found = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "rm", output_loading_info=True
    )
    assert not found["missing_keys"]
    assert [p.name for p in tmp_path.iterdir()] == ["rm"]


def test_same_seed_gives_the_same_bytes(backbones: dict[str, Path], tmp_path: Path) -> None:
    settings = fit_config("pairs", backbones["causal"], epochs=0.5)
    hashes = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        fit_reward(pairs(120), settings, attribute="x", out_dir=tmp_path / name, seed=seed)
        hashes.append(load.model_hash(str(tmp_path / name)))
    assert hashes[0] == hashes[1] != hashes[2]


def test_truncated_rows_are_counted(backbones: dict[str, Path], tmp_path: Path) -> None:
    settings = fit_config("labels", backbones["bert"], head_only=True, max_length=16, held_out=10)
    data = [*labelled(60), LabelledAnswer(prompt("mend " * 50), "slow", 1.0)]
    card = fit_reward(data, settings, attribute="x", out_dir=tmp_path / "rm", seed=0)
    assert card.n_truncated == 1


def test_two_heads_on_one_frozen_backbone_read_it_once(
    backbones: dict[str, Path], tmp_path: Path
) -> None:
    settings = fit_config("labels", backbones["causal"], head_only=True)
    for name, seed in (("a", 1), ("b", 2)):
        fit_reward(
            labelled(200, seed=seed), settings, attribute=name, out_dir=tmp_path / name, seed=0
        )
    features: dict[str, FrozenFeatures] = {}
    rows = [(prompt("mend the lamp"), text) for text in ("ask slow", "ask fast", "ask slow")]
    configs = {name: RewardModelConfig(model=str(tmp_path / name)) for name in "ab"}
    models = [
        load_reward_model(config, attribute=name, features=features)
        for name, config in configs.items()
    ]
    together = [model.score(rows) for model in models]
    [shared] = features.values()
    assert all(model.model.base_model is shared.body for model in models)  # type: ignore[attr-defined]
    alone = [load_reward_model(config, attribute=name) for name, config in configs.items()]
    assert together == [model.score(rows) for model in alone]
    assert together[0] != together[1]
    encode = loaded(tmp_path / "a").encode
    distinct = {encode(asked.messages, text) for asked, text in rows}
    assert shared.positions == sum(len(row.ids) for row in distinct)


def test_divergence_is_an_error_and_leaves_nothing(
    backbones: dict[str, Path], tmp_path: Path
) -> None:
    settings = fit_config("labels", backbones["causal"], learning_rate=1e30)
    with pytest.raises(TrainingError, match="diverged"):
        fit_reward(labelled(200), settings, attribute="x", out_dir=tmp_path / "rm", seed=0)
    assert not list(tmp_path.iterdir())


def test_rows_of_one_prompt_stay_on_one_side() -> None:
    data = [
        LabelledAnswer(prompt(f"question {i % 10}"), f"answer {i}", float(i % 2)) for i in range(60)
    ]
    train, held_out = split_by_prompt(data, n_held_out=12, seed=3)
    keys = [{prompt_key(r.prompt.messages) for r in part} for part in (train, held_out)]
    assert len(held_out) >= 12 and len(train) + len(held_out) == 60
    assert not keys[0] & keys[1]
    assert split_by_prompt(data[::-1], n_held_out=12, seed=3)[1] != []
    assert {r.completion for r in split_by_prompt(data[::-1], n_held_out=12, seed=3)[1]} == {
        r.completion for r in held_out
    }


@pytest.mark.parametrize(
    ("data", "kind", "what"),
    [
        ([], "pairs", "needs PreferencePair"),
        (labelled(200), "pairs", "needs PreferencePair"),
        (pairs(50), "pairs", "Too few rows"),
        ([replace(row, score=0.7) for row in labelled(200)], "labels", "one label"),
    ],
)
def test_wrong_or_few_rows_are_refused(
    backbones: dict[str, Path], tmp_path: Path, data: Any, kind: str, what: str
) -> None:
    with pytest.raises(DataError, match=what):
        fit_reward(
            data,
            fit_config(kind, backbones["causal"]),
            attribute="x",
            out_dir=tmp_path / "rm",
            seed=0,
        )


def test_damaged_card_is_refused(causal: Path, tmp_path: Path) -> None:
    (tmp_path / "reward.json").write_text(json.dumps({"version": 9}))
    with pytest.raises(ModelError, match=r"reward\.json"):
        read_card(tmp_path)
    assert read_card(causal) is None


def test_auc_by_hand() -> None:
    scores, positive = np.array([0.1, 0.4, 0.4, 0.9]), np.array([False, True, False, True])
    assert auc(scores, positive) == pytest.approx((1 + 0.5 + 1 + 1) / 4)
    assert np.isnan(auc(scores, np.array([True] * 4)))


def test_interval_counts_prompts_not_rows() -> None:
    data = [PreferencePair(prompt("q"), "a", "b")] * 100
    scores = np.array([1.0] * 70 + [-1.0] * 30)
    many = held_out_estimate(scores, data, [str(i) for i in range(100)], seed=0)
    few = held_out_estimate(scores, data, [str(i // 20) for i in range(100)], seed=0)
    assert many.value == few.value == pytest.approx(0.7)
    assert few.high - few.low > 2 * (many.high - many.low)


def test_length_baseline_learns_its_sign() -> None:
    shorter = [PreferencePair(prompt("q"), "a", "long"), PreferencePair(prompt("r"), "b", "long")]
    assert length_scores(shorter, shorter).tolist() == [3.0, 3.0]


def test_model_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EQUIPOISE_CACHE", str(tmp_path / "cache"))
    place = tmp_path / "fitted" / "helpfulness"
    place.mkdir(parents=True)
    (tmp_path / "cache" / "smollm2").mkdir(parents=True)
    assert load.resolve_model(str(place)) == str(place)
    assert load.resolve_model("owner/name") == "owner/name"
    assert load.resolve_model("fitted://helpfulness", fitted_root=tmp_path / "fitted") == str(place)
    assert load.resolve_model("cache://smollm2") == str(tmp_path / "cache" / "smollm2")
    for name in (
        *("./nowhere", "/no/where", "~/nowhere", "a/b/c", "cache://", "cache://other"),
        *("cache://../fitted", "fitted://safety", "ftp://x", f"{tmp_path}/fitted/none"),
    ):
        with pytest.raises(ModelError) as caught:
            load.resolve_model(name, fitted_root=tmp_path / "fitted")
        assert caught.value.fix
    with pytest.raises(ModelError, match="no run directory"):
        load.resolve_model("fitted://helpfulness")


def test_model_hash_knows_content_not_place(tmp_path: Path) -> None:
    a, b = classifier_dir(tmp_path / "a"), classifier_dir(tmp_path / "b")
    assert load.model_hash(str(a)) == load.model_hash(str(b))
    (b / "notes.txt").write_text("not part of the model")
    assert load.model_hash(str(a)) == load.model_hash(str(b))
    (b / "config.json").write_text((b / "config.json").read_text() + " ")
    assert load.model_hash(str(a)) != load.model_hash(str(b))
    with pytest.raises(ModelError, match="no model directory"):
        load.model_hash(str(tmp_path))


def test_policy_loads_with_encoder_and_hash(backbones: dict[str, Path]) -> None:
    policy = load.load_causal(str(backbones["causal"]))
    assert policy.manifest is None and not policy.model.training
    assert policy.model.dtype == torch.float32
    assert policy.hash == load.model_hash(str(backbones["causal"]))
    assert policy.encoder.prompt_ids((Message("user", "a"),))


def test_policy_without_template_or_safetensors_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no chat template"):
        load.load_causal(str(causal_dir(tmp_path / "mute", template=None)))
    place = causal_dir(tmp_path / "old")
    (place / "model.safetensors").rename(place / "pytorch_model.bin")
    with pytest.raises(ModelError, match="Cannot load"):
        load.load_causal(str(place))
    adapter = causal_dir(tmp_path / "adapter")
    (adapter / "adapter_config.json").write_text("{}")
    (adapter / "adapter_model.bin").write_bytes(b"a pickle")
    with pytest.raises(ModelError, match=r"adapter_model\.safetensors is missing"):
        load.load_causal(str(adapter))


@pytest.mark.parametrize(
    ("gain", "found"), [(2.0, torch.bfloat16), (1.2, torch.float32), (0.2, torch.float32)]
)
def test_bfloat16_is_taken_where_it_is_much_faster(
    monkeypatch: pytest.MonkeyPatch, gain: float, found: torch.dtype
) -> None:
    now, ones = [0.0], torch.ones

    def timed(*shape: int, dtype: torch.dtype, **options: Any) -> Any:
        class Product:
            def __matmul__(self, other: object) -> torch.Tensor:
                now[0] += 1.0 if dtype == torch.float32 else 1.0 / gain
                return ones(1)

        return Product()

    monkeypatch.setattr(torch, "ones", timed)
    monkeypatch.setattr(load.time, "perf_counter", lambda: now[0])
    load.probe_dtype.cache_clear()
    try:
        assert load.probe_dtype() is found
        assert load.torch_dtype("bfloat16") == torch.bfloat16
    finally:
        load.probe_dtype.cache_clear()
