"""An answer ends where the template, the tokenizer or generation_config say that it ends."""

from __future__ import annotations

from pathlib import Path

import pytest

from bigram_kit import bigram_dir, byte_tokenizer, sample
from equipoise.config import TuneConfig
from equipoise.dials.dials import Dials
from equipoise.dials.tokens import save_dial_model
from equipoise.models.load import LoadedPolicy, load_causal
from equipoise.training.loop import Training
from equipoise.tune.trainer import tune
from tuning_kit import ATTRIBUTES, examples

_GLM = (
    "<|sop|>{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_MARKERS = ("<|sop|>", "<|system|>", "<|user|>", "<|assistant|>", "<|endoftext|>")


def glm(folder: Path, *, ends: object = None, eos: str | None = "<|endoftext|>") -> str:
    """GLM's way: nothing stands behind an answer, and the next user turn's marker ends it."""
    tokenizer = byte_tokenizer(_GLM, _MARKERS, eos=eos)
    return bigram_dir(folder, tokenizer, ("<|assistant|>", "o", "k", "<|user|>"), ends=ends)


def ends_of(policy: LoadedPolicy) -> set[str]:
    return set(policy.tokenizer.convert_ids_to_tokens(sorted(policy.encoder.eos_ids)))


def test_a_role_marker_of_generation_config_ends_the_answer(tmp_path: Path) -> None:
    user = byte_tokenizer(_GLM, _MARKERS).convert_tokens_to_ids("<|user|>")
    policy = load_causal(glm(tmp_path, ends=[user]))
    assert ends_of(policy) == {"<|user|>", "<|endoftext|>"}
    answer = sample(policy)
    assert (answer.text, answer.finish, answer.n_tokens) == ("ok", "stop", 3)
    assert user in policy.encoder.forbidden


def test_one_id_is_taken_like_a_list_of_one(tmp_path: Path) -> None:
    user = byte_tokenizer(_GLM, _MARKERS).convert_tokens_to_ids("<|user|>")
    policy = load_causal(glm(tmp_path, ends=user, eos=None))
    assert ends_of(policy) == {"<|user|>"}
    assert policy.encoder.eos_id == user


def test_the_template_and_the_tokenizer_come_before_generation_config(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(markers=("<|end|>", "<|user|>", "<|assistant|>", "<|eom|>"))
    eom = tokenizer.convert_tokens_to_ids("<|eom|>")
    said = ("<|assistant|>", "o", "k", "<|eom|>")
    policy = load_causal(bigram_dir(tmp_path, tokenizer, said, ends=[eom]))
    assert ends_of(policy) == {"<|end|>", "<|eom|>"}
    assert policy.encoder.eos_id == tokenizer.convert_tokens_to_ids("<|end|>")
    assert sample(policy).finish == "stop"


@pytest.mark.parametrize("ends", [10**6, [-1, 10**6], None, []])
def test_ids_outside_the_vocabulary_end_nothing(tmp_path: Path, ends: object) -> None:
    assert ends_of(load_causal(glm(tmp_path, ends=ends))) == {"<|endoftext|>"}


def test_what_config_json_inherits_from_its_class_ends_nothing(tmp_path: Path) -> None:
    """``LlamaConfig`` says 2, whatever token that is here."""
    policy = load_causal(glm(tmp_path))
    policy.model.config.eos_token_id = policy.tokenizer.convert_tokens_to_ids("k")
    policy.model.save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    assert ends_of(load_causal(str(tmp_path))) == {"<|endoftext|>"}


def test_a_tuned_model_keeps_its_ends_and_no_control_token_is_one(tmp_path: Path) -> None:
    user = byte_tokenizer(_GLM, _MARKERS).convert_tokens_to_ids("<|user|>")
    policy = load_causal(glm(tmp_path / "base", ends=[user, len(_MARKERS) + 256]))
    tuned = tune(
        policy,
        examples(2),
        TuneConfig(objective="clm", steps=1, batch_size=2, dtype="float32", checkpoint_every=1),
        dials=Dials(ATTRIBUTES, 5),
        training=Training(tmp_path / "checkpoints", seed=0),
    )
    assert policy.encoder.with_dials(tuned.manifest).eos_ids >= {user}
    save_dial_model(tuned.model, tuned.tokenizer, tuned.manifest, tmp_path / "tuned")
    again = load_causal(str(tmp_path / "tuned"))
    assert again.manifest is not None
    # An id that was beyond the vocabulary is a control token's by now.
    listed = again.model.generation_config
    assert listed is not None
    listed.eos_token_id = [user, again.manifest.all_ids[0]]
    listed.save_pretrained(tmp_path / "tuned")
    again = load_causal(str(tmp_path / "tuned"))
    assert ends_of(again) == {"<|user|>", "<|endoftext|>"}
    assert again.manifest is not None
    assert set(again.manifest.all_ids) <= set(again.encoder.masked_ids)
