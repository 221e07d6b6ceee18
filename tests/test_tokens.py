"""Installing, saving and checking control tokens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from equipoise.dials.dials import Dials
from equipoise.dials.manifest import DialManifest, control_tokens, read_manifest, write_manifest
from equipoise.dials.tokens import install, save_dial_model, verify
from equipoise.errors import ConfigError, ModelError
from equipoise.types import DialSetting
from tokenizer_kit import byte_bpe, word_level

ATTRIBUTES = ["helpfulness", "safety"]


def tiny(vocabulary: int, *, tied: bool, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        tie_word_embeddings=tied,
    )
    return LlamaForCausalLM(config)


def dialled(
    *, tied: bool, levels: int = 5, padding: int = 0, seed: int = 0
) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast, DialManifest]:
    tokenizer = byte_bpe()
    model = tiny(len(tokenizer) + padding, tied=tied, seed=seed)
    manifest = install(model, tokenizer, dials=Dials(ATTRIBUTES, levels))
    return model, tokenizer, manifest


def test_one_token_per_level_and_one_for_auto() -> None:
    _, tokenizer, manifest = dialled(tied=True, levels=3)
    names = ["<|helpfulness_0|>", "<|helpfulness_1|>", "<|helpfulness_2|>", "<|helpfulness_auto|>"]
    assert tokenizer.convert_ids_to_tokens(list(manifest.all_ids))[:4] == names
    assert len(set(manifest.all_ids)) == 8
    for token_id in manifest.all_ids:
        added = tokenizer.added_tokens_decoder[token_id]
        assert added.special
        assert not added.normalized


def test_control_ids_follow_the_attribute_order() -> None:
    _, tokenizer, manifest = dialled(tied=True)
    ids = manifest.control_ids(DialSetting((3, None)))
    assert tokenizer.convert_ids_to_tokens(list(ids)) == ["<|helpfulness_3|>", "<|safety_auto|>"]
    for levels in ((1,), (1, 2, 3), (5, 0), (0, -1)):
        with pytest.raises(ConfigError):
            manifest.control_ids(DialSetting(levels))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("padding", [0, 5, 64])
def test_install_is_deterministic_and_leaves_other_rows_alone(tied: bool, padding: int) -> None:
    tokenizer = byte_bpe()
    before = (
        tiny(len(tokenizer) + padding, tied=tied).get_input_embeddings().weight.detach().clone()
    )
    torch.manual_seed(99)
    first, tokenizer, manifest = dialled(tied=tied, padding=padding)
    second, _, again = dialled(tied=tied, padding=padding)
    assert manifest == again
    known = min(manifest.all_ids)
    rows, others = (model.get_input_embeddings().weight for model in (first, second))
    assert torch.equal(rows, others)
    assert torch.equal(rows[:known], before[:known])
    assert rows.shape[0] == max(len(tokenizer), len(before))
    assert first.get_output_embeddings().weight.shape == rows.shape
    verify(first, tokenizer, manifest)


def test_install_does_not_touch_the_global_generator() -> None:
    tokenizer = byte_bpe()
    model = tiny(len(tokenizer), tied=False)
    state = torch.get_rng_state()
    install(model, tokenizer, dials=Dials(ATTRIBUTES, 5))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("tied", [True, False])
def test_rows_lie_on_an_ordinal_ramp(tied: bool) -> None:
    model, _, manifest = dialled(tied=tied)
    weight = model.get_input_embeddings().weight.detach()
    base = weight[: min(manifest.all_ids)]
    mean = base.mean(0)
    rows = {a: weight[list(ids)] - mean for a, ids in manifest.token_ids.items()}
    for ramp in rows.values():
        steps = ramp.diff(dim=0)
        assert torch.allclose(steps, steps[:1].expand_as(steps), atol=1e-5)
        assert (ramp[0] - ramp[4]).norm() > (ramp[0] - ramp[1]).norm() * 3.9
    centre_gap = (rows["helpfulness"][2] - rows["safety"][2]).norm()
    assert centre_gap > (rows["safety"][2] - rows["safety"][1]).norm()
    typical = (base - mean).norm(dim=1).median()
    assert torch.allclose(rows["safety"][[0, 4]].norm(dim=1), typical.expand(2), rtol=1e-3)
    auto = weight[manifest.auto_ids["safety"]] - mean
    assert torch.allclose(auto, rows["safety"][2], atol=1e-5)


def test_numbered_tokens_of_the_model_are_no_dials() -> None:
    tokenizer = byte_bpe()
    reserved = [AddedToken(f"<|reserved_special_token_{i}|>", special=True) for i in range(3)]
    tokenizer.add_tokens(reserved, special_tokens=True)
    model = tiny(len(tokenizer), tied=True)
    manifest = install(model, tokenizer, dials=Dials(ATTRIBUTES, 5))
    verify(model, tokenizer, manifest)
    with pytest.raises(ModelError, match="already installed"):
        install(model, tokenizer, dials=Dials(["reserved_special_token"], 3))


def test_a_model_with_fewer_rows_than_its_tokenizer_gets_mean_rows() -> None:
    tokenizer = byte_bpe()
    model = tiny(len(tokenizer) - 3, tied=True)
    manifest = install(model, tokenizer, dials=Dials(ATTRIBUTES, 5))
    weight = model.get_input_embeddings().weight.detach()
    known = min(manifest.all_ids)
    assert torch.allclose(weight[known - 3 : known], weight[: known - 3].mean(0), atol=1e-6)


def test_an_untied_head_starts_without_preference() -> None:
    model, _, manifest = dialled(tied=False)
    head = model.get_output_embeddings().weight.detach()
    known = min(manifest.all_ids)
    expected = head[:known].mean(0).expand(12, -1)
    assert torch.allclose(head[list(manifest.all_ids)], expected, atol=1e-6)


def test_installing_twice_keeps_tuned_rows_and_another_shape_is_refused() -> None:
    model, tokenizer, manifest = dialled(tied=True)
    with torch.no_grad():
        model.get_input_embeddings().weight[manifest.all_ids[0]] += 1.0
    tuned = model.get_input_embeddings().weight.detach().clone()
    again = install(model, tokenizer, dials=Dials(ATTRIBUTES, 5))
    assert torch.equal(model.get_input_embeddings().weight, tuned)
    assert again.token_ids == manifest.token_ids
    for attributes, levels in ((ATTRIBUTES, 4), (ATTRIBUTES, 6), (["tone", "safety"], 5)):
        with pytest.raises(ModelError, match="other dials are already installed"):
            install(model, tokenizer, dials=Dials(attributes, levels))


@pytest.mark.parametrize(
    ("attributes", "levels"),
    [([], 5), (["a", "a"], 5), (["Help"], 5), (["a|>"], 5), ([""], 5), (["a"], 1)],
)
def test_unusable_names_and_levels_are_refused(attributes: list[str], levels: int) -> None:
    tokenizer = byte_bpe()
    size = len(tokenizer)
    with pytest.raises(ConfigError):
        install(tiny(size, tied=True), tokenizer, dials=Dials(attributes, levels))
    assert len(tokenizer) == size


@pytest.mark.parametrize("tied", [True, False])
def test_save_and_load_give_the_same_model(tied: bool, tmp_path: Path) -> None:
    model, tokenizer, manifest = dialled(tied=tied)
    with torch.no_grad():
        model.get_input_embeddings().weight[list(manifest.all_ids)] *= 1.5
    manifest = manifest.model_copy(update={"calibration": {"mode": "pooled"}})
    written = save_dial_model(model, tokenizer, manifest, tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    loaded_tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    read = read_manifest(tmp_path)
    assert read == written
    assert read is not None
    assert read.calibration == {"mode": "pooled"}
    verify(loaded, loaded_tokenizer, read)
    ids = torch.tensor([[1, 2, *read.control_ids(DialSetting((4, 0)))]])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_another_float_type_is_not_a_broken_model(dtype: torch.dtype, tmp_path: Path) -> None:
    model, tokenizer, manifest = dialled(tied=False)
    written = save_dial_model(model, tokenizer, manifest, tmp_path)
    verify(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype), tokenizer, written)


def test_a_directory_without_dials_has_no_manifest(tmp_path: Path) -> None:
    assert read_manifest(tmp_path) is None


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[:40],
        lambda text: text.replace('"levels": 5', '"levels": 4'),
        lambda text: text.replace('"attributes"', '"attribute"'),
        lambda text: text.replace('"safety"', '"tone"', 1),
    ],
)
def test_a_damaged_manifest_is_refused(damage: Callable[[str], str], tmp_path: Path) -> None:
    _, _, manifest = dialled(tied=True)
    write_manifest(manifest, tmp_path)
    path = tmp_path / "dials.json"
    path.write_text(damage(path.read_text()))
    with pytest.raises(ConfigError, match="not a usable manifest"):
        read_manifest(tmp_path)


Mutation = Callable[
    [PreTrainedModel, PreTrainedTokenizerFast], tuple[PreTrainedModel, PreTrainedTokenizerFast]
]


def _base_tokenizer(model: PreTrainedModel, _: PreTrainedTokenizerFast) -> tuple:
    return model, byte_bpe()


def _other_tokenizer(model: PreTrainedModel, _: PreTrainedTokenizerFast) -> tuple:
    other = word_level()
    install(tiny(len(other), tied=True), other, dials=Dials(ATTRIBUTES, 5))
    return model, other


def _shifted_ids(model: PreTrainedModel, _: PreTrainedTokenizerFast) -> tuple:
    shifted = byte_bpe()
    shifted.add_tokens(["<|extra|>"])
    install(tiny(len(shifted), tied=True), shifted, dials=Dials(ATTRIBUTES, 5))
    return model, shifted


def _more_levels(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> tuple:
    tokenizer.add_tokens([AddedToken("<|safety_5|>", special=True)], special_tokens=True)
    return model, tokenizer


def _plain_tokens(model: PreTrainedModel, _: PreTrainedTokenizerFast) -> tuple:
    plain = byte_bpe()
    plain.add_tokens([AddedToken(t) for t in control_tokens(Dials(ATTRIBUTES, 5))])
    return model, plain


def _other_template(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> tuple:
    tokenizer.chat_template = str(tokenizer.chat_template).replace("\n", " ")
    return model, tokenizer


def _missing_rows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> tuple:
    model.resize_token_embeddings(len(tokenizer) - 1)
    return model, tokenizer


def _wrong_size(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> tuple:
    model.config.vocab_size -= 12
    return model, tokenizer


def _short_head(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> tuple:
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight[:-12].detach().clone())
    return model, tokenizer


def _tied_head(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> tuple:
    model.lm_head.weight = model.get_input_embeddings().weight
    return model, tokenizer


def _base_rows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> tuple:
    with torch.no_grad():
        model.get_input_embeddings().weight[-3] = 0.0
    return model, tokenizer


def _swapped_rows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> tuple:
    weight = model.get_input_embeddings().weight
    with torch.no_grad():
        weight[-12:] = weight[-12:].flip(0).clone()
    return model, tokenizer


def _head_rows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> tuple:
    with torch.no_grad():
        model.lm_head.weight[-1] += 0.5
    return model, tokenizer


@pytest.mark.parametrize(
    ("mutate", "message"),
    [
        (_base_tokenizer, "lacks the control token"),
        (_other_tokenizer, "in dials.json"),
        (_shifted_ids, "in dials.json"),
        (_more_levels, "does not name"),
        (_plain_tokens, "no longer flagged"),
        (_other_template, "not the one"),
        (_missing_rows, "embedding has"),
        (_wrong_size, "vocab_size"),
        (_short_head, "output head has"),
        (_tied_head, "was untied"),
        (_base_rows, "rows of the embedding"),
        (_swapped_rows, "rows of the embedding"),
        (_head_rows, "rows of the output head"),
    ],
)
def test_broken_exports_are_refused(mutate: Mutation, message: str) -> None:
    model, tokenizer, manifest = dialled(tied=False)
    verify(model, tokenizer, manifest)
    with pytest.raises(ModelError, match=message) as caught:
        verify(*mutate(model, tokenizer), manifest)
    assert "tuning wrote" in caught.value.fix


def test_a_head_that_came_loose_is_refused() -> None:
    model, tokenizer, manifest = dialled(tied=True)
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    with pytest.raises(ModelError, match="was tied"):
        verify(model, tokenizer, manifest)


def test_the_manifest_is_plain_json(tmp_path: Path) -> None:
    _, _, manifest = dialled(tied=True)
    write_manifest(manifest, tmp_path)
    data = json.loads((tmp_path / "dials.json").read_text())
    assert data["attributes"] == ATTRIBUTES
    assert [path.name for path in tmp_path.iterdir()] == ["dials.json"]
