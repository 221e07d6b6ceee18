"""Models that cannot be used are refused by name; nothing of them is run or filled up."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

import equipoise
from equipoise.alignment.align import align_by_dpo, align_by_rlhf
from equipoise.alignment.sft import encode_rows, teach
from equipoise.config import AlignConfig, RewardModelConfig, RolloutConfig, SamplingConfig
from equipoise.encoding.encode import Encoder
from equipoise.errors import ModelError
from equipoise.models.files import headers
from equipoise.models.load import LoadedPolicy, load_causal, load_tokenizer
from equipoise.rewards.classifier import read_classifier
from equipoise.training.loop import Training
from equipoise.types import PreferencePair
from reward_kit import bert_dir, byte_tokenizer, causal_dir, classifier_dir, llama_config
from rlhf_kit import Scorer
from tuning_kit import prompt, tiny_policy


def edit(directory: Path, file: str = "config.json", **changes: Any) -> str:
    path = directory / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return str(directory)


@pytest.mark.parametrize("read", [load_causal, lambda place: read_classifier(place, attribute="a")])
@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised by gptq"),
        ({"quantization_config": {"load_in_8bit": True}}, "quantised by bitsandbytes"),
        ({"quantization_config": {}}, "quantised;"),
        ({"hidden_size": 64}, r"embed_tokens.weight \(261, 64\), where there is \(261, 32\)"),
        ({"num_hidden_layers": 10**9}, "no model has that many"),
        ({"num_hidden_layers": -1}, "no model has that many"),
        ({"num_hidden_layers": 50_000}, "50000 layers cannot be in"),
        ({"num_labels": 10**9}, "no model has that many"),
        ({"vocab_size": 10**12}, "where there is"),
        ({"intermediate_size": 10**15}, "gate_proj"),
    ],
)
def test_a_config_is_held_against_the_headers_of_the_weights(
    tmp_path: Path, read: Callable[[str], Any], changes: dict[str, Any], told: str
) -> None:
    made = causal_dir if read is load_causal else classifier_dir
    with pytest.raises(ModelError, match=told):
        read(edit(made(tmp_path / "model"), **changes))


def test_headers_are_read_without_weights(tmp_path: Path) -> None:
    model = transformers.LlamaForCausalLM(llama_config())
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert (tmp_path / "many" / "model.safetensors.index.json").is_file()
    wanted = {name: ("F32", tuple(part.shape)) for name, part in model.state_dict().items()}
    assert headers(tmp_path / "one") == headers(tmp_path / "many") == wanted
    index = {"metadata": {}, "weight_map": {"x": "../one/model.safetensors"}}
    edit(tmp_path / "many", "model.safetensors.index.json", **index)
    with pytest.raises(ModelError, match="no safetensors file beside it"):
        headers(tmp_path / "many")


def test_experts_that_are_put_together_while_they_are_read_are_no_disagreement(
    tmp_path: Path,
) -> None:
    sizes = {**llama_config().to_dict(), "num_local_experts": 2}
    del sizes["model_type"]
    model = transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes))
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert not headers(tmp_path).keys() >= model.state_dict().keys()
    loaded = load_causal(str(tmp_path)).model.state_dict()
    assert all(torch.equal(loaded[name], part) for name, part in model.state_dict().items())


def test_code_that_comes_with_a_model_is_not_even_offered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("asked whether to run code"))
    place = causal_dir(tmp_path / "model")
    (place / "code.py").write_text("raise SystemExit('ran')")
    names = {"AutoConfig": "code.A", "AutoModelForCausalLM": "code.B", "AutoTokenizer": "code.C"}
    edit(place, auto_map=names, model_type="unheard")
    edit(place, "tokenizer_config.json", auto_map={"AutoTokenizer": ["code.C", None]})
    with pytest.raises(ModelError, match=r"custom code|unheard"):
        load_causal(str(place))


def test_a_wish_for_another_attention_is_none_for_code_of_the_hub(tmp_path: Path) -> None:
    place = causal_dir(tmp_path / "model")
    for wish in ("someone/kernels", "flash_attention_2"):
        policy = load_causal(edit(place, attn_implementation=wish, _attn_implementation=wish))
        assert policy.model.config._attn_implementation in ("sdpa", "eager")


def test_several_templates_need_a_default(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer()
    template = tokenizer.chat_template
    tokenizer.chat_template = {"rag": template, "tool_use": template}
    tokenizer.save_pretrained(tmp_path / "none")
    with pytest.raises(ModelError, match="rag, tool_use"):
        load_tokenizer(str(tmp_path / "none"))
    tokenizer.chat_template = {"default": template, "rag": template}
    tokenizer.save_pretrained(tmp_path / "one")
    assert load_tokenizer(str(tmp_path / "one")).get_chat_template() == template


def test_ids_without_a_row_are_refused_if_they_can_be_written(tmp_path: Path) -> None:
    place = causal_dir(tmp_path / "model")
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(place)
    load_causal(str(place))  # nothing writes it
    tokenizer.add_tokens(["wonderful"])
    tokenizer.save_pretrained(place)
    with pytest.raises(ModelError, match="'wonderful' as id 262, and the embedding has 261 rows"):
        load_causal(str(place))


# Reward models


def load_reward(place: Path) -> Any:
    return equipoise.load_reward_model(RewardModelConfig(model=str(place)), attribute="safety")


def test_a_reward_model_pads_with_a_token_that_has_a_row(tmp_path: Path) -> None:
    place = classifier_dir(tmp_path / "model", pad_token_id=None)
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.save_pretrained(place)
    with pytest.raises(ModelError, match="pads with id 261, for which it has no row"):
        load_reward(place)
    byte_tokenizer().save_pretrained(place)
    with pytest.raises(ModelError, match="pads with id -1"):
        load_reward(Path(edit(place, pad_token_id=-1)))


def test_an_adapter_as_reward_model_is_named(tmp_path: Path) -> None:
    base = classifier_dir(tmp_path / "base")
    model = transformers.AutoModelForSequenceClassification.from_pretrained(base)
    get_peft_model(model, LoraConfig(task_type="SEQ_CLS", r=2)).save_pretrained(tmp_path / "lora")
    byte_tokenizer().save_pretrained(tmp_path / "lora")
    with pytest.raises(ModelError, match="holds an adapter") as caught:
        load_reward(tmp_path / "lora")
    assert "Merge it" in caught.value.fix


def test_a_backbone_may_lack_a_head_and_a_pooler_but_no_layer(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    causal, bert = causal_dir(tmp_path / "causal"), bert_dir(tmp_path / "bert")
    two = classifier_dir(tmp_path / "two", num_labels=2)
    for place in (causal, bert, two):
        model = read_classifier(str(place), attribute="a", num_labels=1)
        assert model.config.num_labels == 1
    weights = load_file(causal / "model.safetensors")
    lost = {name: part for name, part in weights.items() if "layers.1.mlp.up" not in name}
    save_file(lost, causal / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"lacks: model.layers.1.mlp.up_proj"):
        read_classifier(str(causal), attribute="a", num_labels=1)


# Tokenizers that name no end: the chat template does


def endless() -> LoadedPolicy:
    policy = tiny_policy()
    for name in ("eos_token", "pad_token"):
        setattr(policy.tokenizer, name, None)
    return replace(policy, encoder=Encoder(policy.tokenizer))


def align_config(**changes: Any) -> AlignConfig:
    rlhf = RolloutConfig(group=2, kl_limit=50.0, sampling=SamplingConfig(max_tokens=6, top_k=0))
    plain = {"sources": [{"source": "x"}], "steps": 2, "batch_size": 4, "rlhf": rlhf}
    return AlignConfig.model_validate({**plain, **changes})


@pytest.mark.parametrize("method", ["rlhf", "dpo", "sft"])
def test_trainers_take_the_end_from_the_chat_template(tmp_path: Path, method: str) -> None:
    policy, config = endless(), align_config()
    training = Training(tmp_path, seed=1)
    asked = [prompt(i) for i in range(4)]
    if method == "rlhf":
        rewards = {"vowels": Scorer("v", "aeiou")}
        curve = align_by_rlhf(policy, endless(), asked, rewards, config, training)
    elif method == "dpo":
        pairs = [PreferencePair(one, "no no no", "yes gladly") for one in asked]
        curve = align_by_dpo(policy, endless(), pairs, config, training)
    else:
        rows = encode_rows(
            [(one, "yes") for one in asked], policy.encoder, max_length=99, answers_only=True
        )
        curve = teach(policy.model, policy.tokenizer, rows, config, training)  # type: ignore[arg-type]
    assert len(curve) == 2
    assert policy.tokenizer.eos_token is None
    assert policy.tokenizer.pad_token is None
