"""Architectures: what is sampled is what is tuned, and both are what the model itself computes."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks.architectures import MUST_PASS, REFUSED, config_of, tokenizer

from equipoise.check.trial import PARTS, merge_and_compare, try_model
from equipoise.config import Sampling, TuneConfig
from equipoise.dials.dials import Dials
from equipoise.dials.tokens import install
from equipoise.encoding.encode import Encoder
from equipoise.engine.draw import draw, uniform_stream
from equipoise.engine.sample import TransformersEngine
from equipoise.errors import ModelError, TrainingError
from equipoise.models import architecture
from equipoise.models.architecture import check_architecture, compare
from equipoise.models.cut import cut_config, narrowest_model
from equipoise.models.load import LoadedPolicy, load_causal
from equipoise.tune import rehearsal
from equipoise.tune.batch import TuningPlan, collate
from equipoise.tune.prefix import branch_log_likelihoods
from equipoise.tune.rehearsal import check_disk, rehearse, rehearse_policy, small_base
from equipoise.types import Branch, GenerationRequest
from tuning_kit import ATTRIBUTES, examples, prompt

SAMPLING = Sampling(temperature=1.0, top_p=1.0, top_k=0, max_tokens=6)


@cache
def policy_of(kind: str) -> LoadedPolicy:
    """Two random layers with dials; windows are shorter than any prompt."""
    config = cut_config(config_of(kind))
    config.get_text_config().vocab_size = len(tokenizer())
    model = narrowest_model(config)
    fresh = tokenizer()
    manifest = install(model, fresh, dials=Dials(ATTRIBUTES, 5))
    return LoadedPolicy(model, fresh, Encoder(fresh, manifest), manifest, kind)


def plain(model: Any, ids: list[int]) -> torch.Tensor:
    logits: torch.Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return logits.float()


@pytest.mark.parametrize("kind", MUST_PASS)
def test_batched_sampling_is_the_plain_forward_token_by_token(kind: str) -> None:
    policy = policy_of(kind)
    encoder = policy.encoder
    settings = [examples()[i].setting for i in (0, 3)]
    requests = [
        GenerationRequest(
            tuple(encoder.prompt_ids(prompt(i).messages)),
            tuple(Branch(encoder.control_ids(s), seed) for seed, s in enumerate(settings)),
        )
        for i in (0, 5)
    ]
    found = TransformersEngine(policy.model, encoder, model_hash="").generate(requests, SAMPLING)
    masked = torch.tensor(encoder.masked_ids)
    for request, row in zip(requests, found, strict=True):
        for branch, sampled in zip(request.branches, row, strict=True):
            ids = [*request.prompt_ids, *branch.control_ids]
            uniforms = torch.tensor(uniform_stream(branch.seed, SAMPLING.max_tokens))
            for step, token_id in enumerate(sampled.token_ids):
                with torch.no_grad():
                    scores = plain(policy.model, ids)[-1:]
                scores[:, masked] = -torch.inf
                chosen = draw(
                    scores, uniforms[step : step + 1].float(), temperature=1.0, top_p=1.0, top_k=0
                )
                assert chosen.tolist() == [token_id]
                ids.append(token_id)


@pytest.mark.parametrize("kind", MUST_PASS)
def test_branch_likelihoods_of_tuning_are_those_of_plain_forwards(kind: str) -> None:
    policy = policy_of(kind)
    config = TuneConfig(objective="exmate", steps=1, batch_size=4, auto_rate=0.0)
    plan = TuningPlan(examples(), policy.encoder, config, levels=5, seed=0)
    rows = [plan[i] for i in range(4)]
    with torch.no_grad():
        ours = branch_log_likelihoods(policy.model, collate(rows))[0]
        for b, row in enumerate(rows):
            for n, branch in enumerate(row.branches):
                ids = [*row.prompt_ids, *branch]
                scores = plain(policy.model, ids).log_softmax(-1)
                start = len(row.prompt_ids) + row.n_control
                own = sum(scores[t - 1, ids[t]].item() for t in range(start, len(ids)))
                assert ours[b, n].item() == pytest.approx(own, abs=1e-3)


@pytest.mark.parametrize("kind", MUST_PASS)
def test_an_adapter_is_saved_loaded_and_merged(kind: str, tmp_path: Path) -> None:
    base = small_base(config_of(kind), tokenizer(), tmp_path / "base")
    saved = rehearse(base, tmp_path / "lora", lora_rank=2, dials=Dials(ATTRIBUTES, 5))
    merge_and_compare(saved, tmp_path / "merged")


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_exact_is_refused_by_its_config(kind: str) -> None:
    with pytest.raises(ModelError, match="not supported") as caught:
        check_architecture(config_of(kind), "some/model")
    assert caught.value.what.startswith("some/model: ") and caught.value.fix


@pytest.mark.parametrize("kind", [k for k in MUST_PASS if config_of(k).get_text_config().to_dict()
                                  .get("sliding_window")])  # fmt: skip
@pytest.mark.parametrize("change", [-1, 1, None])
def test_a_window_that_is_off_by_one_is_noticed(
    kind: str, change: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = architecture.layer_windows
    if not any(own(config_of(kind)).values()):
        pytest.skip("its default config has a window and does not use it")

    def wrong(config: Any) -> dict[str, int | None]:
        return {k: w and (w + change if change else None) for k, w in own(config).items()}

    monkeypatch.setattr(architecture, "layer_windows", wrong)
    with pytest.raises(ModelError, match="other numbers"):
        compare(policy_of(kind).model)


@pytest.mark.parametrize("kind", ["llama", "gemma3_text"])
def test_all_parts_of_a_check_work(kind: str) -> None:
    trials = try_model(config_of(kind), tokenizer(), kind)
    assert [(t.part, t.problem) for t in trials] == [(part, None) for part in PARTS]


def test_what_cannot_be_loaded_is_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = small_base(config_of("llama"), tokenizer(), tmp_path / "base")
    save = rehearsal.save_dial_model

    def spoilt(model: Any, *rest: Any) -> Any:
        with torch.no_grad():  # as if the head's control rows were not saved
            written = save(model, *rest)
            model.get_output_embeddings().weight[0, 0] += 1
        return written

    monkeypatch.setattr(rehearsal, "save_dial_model", spoilt)
    with pytest.raises(TrainingError, match="nothing was begun"):
        rehearse_policy(str(base), TuneConfig(), tmp_path / "scratch", dials=Dials(ATTRIBUTES, 5))
    assert not (tmp_path / "scratch").exists()


def test_a_disk_without_room_is_refused_before_the_first_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = policy_of("llama").model
    config = TuneConfig(lora_rank=0)
    numbers = sum(weight.numel() for weight in model.parameters())
    free = type("Usage", (), {"free": numbers * 40 - 1})
    monkeypatch.setattr(rehearsal.shutil, "disk_usage", lambda _: free)
    with pytest.raises(TrainingError, match="no room"):
        check_disk(model, config, tmp_path)
    check_disk(model, TuneConfig(lora_rank=1), tmp_path)


def test_a_model_is_loaded_without_its_type_being_known_to_us(tmp_path: Path) -> None:
    """A small model of a window: the check at load is that of the whole directory."""
    base = small_base(config_of("gpt_oss"), tokenizer(), tmp_path / "base")
    assert load_causal(str(base)).manifest is None
