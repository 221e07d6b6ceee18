"""Tuning: objectives by hand, the shared prefix, exact resume, LoRA in a new process."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import rlhf_kit
from equipoise.alignment.align import align_by_dpo
from equipoise.alignment.sft import encode_rows, teach
from equipoise.config import AlignConfig, SftConfig, SourceConfig, TuneConfig
from equipoise.dials.dials import Dials
from equipoise.dials.tokens import install, save_dial_model
from equipoise.encoding.encode import Encoder
from equipoise.errors import ModelError, TrainingError
from equipoise.models.load import LoadedPolicy, load_causal
from equipoise.training.checkpoints import OnStep
from equipoise.training.loop import Training
from equipoise.tune.batch import ControlledBatch, TuningPlan, collate, counterfactuals, drop_to_auto
from equipoise.tune.objectives import clm, exmate, mean_of, token_log_likelihoods
from equipoise.tune.prefix import branch_log_likelihoods
from equipoise.tune.trainer import TunedPolicy, objective, tune
from equipoise.types import DialSetting, PreferencePair
from tuning_kit import (
    ATTRIBUTES,
    examples,
    kept_steps,
    lead_of_the_asked_cell,
    lively_policy,
    presented,
    prompt,
    spoiler,
    tiny_policy,
)

LEARNS: dict[str, Any] = {
    "steps": 120,
    "batch_size": 8,
    "checkpoint_every": 120,
    "learning_rate": 1e-2,
    "dtype": "float32",
    "auto_rate": 0.0,
}
CONFIG = TuneConfig(steps=8, batch_size=4, checkpoint_every=3, dtype="float32", learning_rate=3e-3)


def run(folder: Path, config: TuneConfig = CONFIG, base: str = "tiny") -> TunedPolicy:
    return tune(
        tiny_policy(),
        examples(),
        config,
        dials=Dials(ATTRIBUTES, 5),
        training=Training(folder, seed=1),
        base_model=base,
    )


def weights(tuned: TunedPolicy) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in tuned.model.state_dict().items()}


def test_log_likelihoods_by_hand() -> None:
    logits = torch.zeros(2, 4)
    logits[0, 1] = math.log(3.0)  # P(1) = 3/6 at the first position
    found = token_log_likelihoods(logits, torch.tensor([1, 2]))
    assert found.tolist() == pytest.approx([math.log(0.5), math.log(0.25)])
    m = mean_of(torch.tensor([-3.0, 0.0]), torch.tensor([2, 0]))
    assert m.tolist() == [-1.5, 0.0]


def test_exmate_value_and_gradient_by_hand() -> None:
    m = torch.tensor([[-1.0, -0.5], [-2.0, -3.0]], requires_grad=True)
    uniform, exists = torch.ones(2), torch.ones(2, 1, dtype=torch.bool)
    loss = exmate(m, uniform, exists, weight=0.8)
    assert loss.loss.item() == pytest.approx(1.5 + 0.8 * (math.exp(-0.5) + math.exp(-3)) / 2)
    loss.loss.backward()
    # d/dm of -mean(m0) is -1/2; of w·mean(exp(m1)) it is w·exp(m1)/2.
    expected = [[-0.5, 0.4 * math.exp(-0.5)], [-0.5, 0.4 * math.exp(-3.0)]]
    assert torch.allclose(m.grad, torch.tensor(expected))


def test_exmate_of_the_batch_mean_by_hand() -> None:
    m = torch.tensor([[-1.0, -0.5], [-2.0, -3.0]], requires_grad=True)
    exists = torch.ones(2, 1, dtype=torch.bool)
    loss = exmate(m, torch.ones(2), exists, weight=0.8, exp_of="batch")
    assert loss.loss.item() == pytest.approx(1.5 + 0.8 * math.exp(-1.75))
    loss.loss.backward()
    expected = [[-0.5, 0.4 * math.exp(-1.75)], [-0.5, 0.4 * math.exp(-1.75)]]
    assert torch.allclose(m.grad, torch.tensor(expected))


def test_exmate_gradient_on_logits_matches_the_hand_derived_one() -> None:
    # One completion token in two branches: dL/dlogit = (p - onehot) for the asked branch and
    # -w·exp(m')·(p' - onehot) for the counterfactual one.
    torch.manual_seed(0)
    logits = torch.randn(2, 5, requires_grad=True)
    m = token_log_likelihoods(logits, torch.tensor([2, 2]))[None]
    exmate(m, torch.ones(1), torch.ones(1, 1, dtype=torch.bool), weight=1.7).loss.backward()
    with torch.no_grad():
        p = logits.softmax(-1)
        onehot = torch.zeros(5).scatter(0, torch.tensor(2), 1.0)
        asked = p[0] - onehot
        other = -1.7 * p[1, 2] * (p[1] - onehot)
    assert torch.allclose(logits.grad[0], asked, atol=1e-6)
    assert torch.allclose(logits.grad[1], other, atol=1e-6)


def test_missing_counterfactuals_and_weights_count_nothing() -> None:
    m = torch.tensor([[-1.0, -9.0], [-2.0, -0.1]])
    exists = torch.tensor([[True], [False]])
    with_missing = exmate(m, torch.tensor([1.0, 3.0]), exists, weight=1.0)
    assert with_missing.loss.item() == pytest.approx(1.75 + math.exp(-9))
    none = exmate(m, torch.ones(2), torch.zeros(2, 1, dtype=torch.bool), weight=1.0)
    assert none.loss.item() == pytest.approx(clm(m, torch.ones(2), exists).loss.item())


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_shared_prefix_equals_separate_forwards(attention: str) -> None:
    policy = tiny_policy(attention=attention)
    manifest = install(policy.model, policy.tokenizer, dials=Dials(ATTRIBUTES, 5))
    encoder = Encoder(policy.tokenizer, manifest)
    others = [DialSetting((2, None)), DialSetting((None, 1)), DialSetting((3, 3))]
    rows = [presented(one, encoder, others[: 1 + i % 3]) for i, one in enumerate(examples()[:5])]
    batch = collate(rows)
    with torch.no_grad():
        sums, counts = branch_log_likelihoods(policy.model, batch)
        for b, row in enumerate(rows):
            for i, branch in enumerate(row.branches):
                ids = torch.tensor([[*row.prompt_ids, *branch]])
                scores = policy.model(ids).logits[0, :-1].log_softmax(-1)
                start = len(row.prompt_ids) + row.n_control
                alone = scores[range(start - 1, len(ids[0]) - 1), ids[0, start:]]
                assert counts[b, i] == len(alone)
                assert sums[b, i].item() == pytest.approx(alone.sum().item(), abs=1e-4)


def test_plan_is_a_function_of_the_index() -> None:
    policy = tiny_policy()
    manifest = install(policy.model, policy.tokenizer, dials=Dials(ATTRIBUTES, 5))
    encoder = Encoder(policy.tokenizer, manifest)
    config = TuneConfig(steps=12, batch_size=4, auto_rate=0.5)
    one, other = (TuningPlan(examples(), encoder, config, levels=5, seed=7) for _ in range(2))
    assert [one[i] for i in reversed(range(48))] == [other[i] for i in range(48)][::-1]
    shown = sorted(int(i) for i in one._order)
    assert shown == sorted([*range(24)] * 2)  # two epochs show each example twice


@settings(max_examples=100, deadline=None)
@given(
    st.tuples(*[st.one_of(st.none(), st.integers(0, 4))] * 2),
    st.sampled_from(["uniform", "one_attribute", "observed"]),
    st.integers(0, 1000),
)
def test_counterfactuals_differ_and_keep_auto(
    levels: tuple[int | None, int | None], kind: str, seed: int
) -> None:
    asked = DialSetting(levels)
    occupied = [DialSetting((0, 0)), DialSetting((3, 1)), DialSetting((3, 4))]
    config = TuneConfig(counterfactual=kind)
    found = counterfactuals(asked, occupied, config, 5, np.random.default_rng(seed))
    assert len(found) <= 1
    assert asked not in found
    for other in found:
        pairs = list(zip(asked.levels, other.levels, strict=True))
        assert all((a is None) == (b is None) for a, b in pairs)
        if kind == "one_attribute":
            assert sum(a != b for a, b in pairs) == 1
        if kind == "observed" and asked.is_cell:
            assert other in occupied


def test_drop_to_auto_rates() -> None:
    rng = np.random.default_rng(0)
    setting = DialSetting((1, 2))
    assert drop_to_auto(setting, 0.0, rng) == setting
    assert drop_to_auto(setting, 1.0, rng) == DialSetting((None, None))


@pytest.mark.parametrize("objective_name", ["clm", "exmate"])
def test_tuning_learns_to_listen(tmp_path: Path, objective_name: str) -> None:
    policy, config = lively_policy(), TuneConfig(**{**LEARNS, "objective": objective_name})
    tuned = tune(
        policy,
        examples(),
        config,
        dials=Dials(ATTRIBUTES, 5),
        training=Training(tmp_path, seed=1),
    )
    lead = lead_of_the_asked_cell(tuned.model, Encoder(tuned.tokenizer, tuned.manifest))
    assert lead.min() > 0.1
    assert tuned.curve[-1]["asked"] > tuned.curve[0]["asked"] + 2


def test_resume_is_exact(tmp_path: Path) -> None:
    whole = run(tmp_path / "whole")

    class StopError(Exception):
        pass

    def stop_at(step: int, _: int) -> None:
        if step == 5:
            raise StopError

    with pytest.raises(StopError):
        tune(
            tiny_policy(),
            examples(),
            CONFIG,
            dials=Dials(ATTRIBUTES, 5),
            training=Training(tmp_path / "parts", seed=1, on_step=stop_at),
        )
    (tmp_path / "parts" / "checkpoint-4").mkdir()  # half-written: no marker
    resumed = run(tmp_path / "parts")
    assert resumed.curve == whole.curve
    assert len(resumed.curve) == 8
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name


SPOILT_STEPS = 5
TINY = {"steps": SPOILT_STEPS, "batch_size": 8, "checkpoint_every": 1}


def spoilt_tune(folder: Path, policy: LoadedPolicy, on_step: OnStep) -> None:
    tune(
        policy, examples(), TuneConfig(**TINY, dtype="float32"), dials=Dials(ATTRIBUTES, 5), 
        training=Training(folder, seed=1, on_step=on_step),
    )  # fmt: skip


def spoilt_teach(folder: Path, policy: LoadedPolicy, on_step: OnStep) -> None:
    rows = [(prompt(i), f"number {i} it is") for i in range(12)]
    teach(
        policy.model,
        policy.tokenizer,
        encode_rows(rows, policy.encoder, max_length=99, answers_only=True),
        SftConfig(sources=[SourceConfig(source="x")], **TINY),
        training=Training(folder, seed=1, on_step=on_step),
    )  # fmt: skip


def spoilt_dpo(folder: Path, policy: LoadedPolicy, on_step: OnStep) -> None:
    pairs = [PreferencePair(prompt(i), "no no no", "yes gladly") for i in range(16)]
    made = AlignConfig(sources=[SourceConfig(source="x")], **TINY)
    align_by_dpo(
        policy, tiny_policy(), pairs, made, training=Training(folder, seed=1, on_step=on_step),
    )  # fmt: skip


def spoilt_rlhf(folder: Path, policy: LoadedPolicy, on_step: OnStep) -> None:
    rlhf_kit.run(folder, rlhf_kit.config(**TINY), policy=policy, on_step=on_step)


@pytest.mark.parametrize("after", [3, SPOILT_STEPS - 1], ids=["middle", "last"])
@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("train", [spoilt_tune, spoilt_teach, spoilt_dpo, spoilt_rlhf])
def test_what_is_not_finite_stops_before_the_weights(
    tmp_path: Path, train: Callable[[Path, LoadedPolicy, OnStep], None], where: str, after: int
) -> None:
    policy = tiny_policy()
    # RLHF notices a broken policy as soon as it samples, before there is a loss.
    with pytest.raises((TrainingError, ModelError), match="not finite"):
        train(tmp_path, policy, spoiler(policy, where, after=after))
    assert kept_steps(tmp_path)[-1] == after
    assert all(bool(weight.isfinite().all()) for weight in policy.model.state_dict().values())


def test_lora_learns_and_is_reloaded_in_a_new_process(tmp_path: Path) -> None:
    base = tmp_path / "base"
    untouched = lively_policy()
    untouched.model.save_pretrained(base)
    untouched.tokenizer.save_pretrained(base)
    manifest = install(untouched.model, untouched.tokenizer, dials=Dials(ATTRIBUTES, 5))
    before = lead_of_the_asked_cell(untouched.model, Encoder(untouched.tokenizer, manifest))
    assert before.min() < 0 < before.max()
    tuned = tune(
        load_causal(str(base)),
        examples(),
        TuneConfig(**LEARNS, lora_rank=4),
        dials=Dials(ATTRIBUTES, 5),
        training=Training(tmp_path / "checkpoints", seed=1),
        base_model=str(base),
    )
    after = lead_of_the_asked_cell(tuned.model, Encoder(tuned.tokenizer, tuned.manifest))
    assert after.min() > 0.1
    rows = [p for name, p in tuned.model.named_parameters() if "trainable_tokens_delta" in name]
    assert rows and all(p.requires_grad for p in rows)
    saved = tmp_path / "adapter"
    manifest = save_dial_model(tuned.model, tuned.tokenizer, tuned.manifest, saved)
    assert manifest.row_hashes != tuned.manifest.row_hashes  # the control rows have moved
    with safe_open(saved / "adapter_model.safetensors", "pt") as file:
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    assert all(max(shape) < 100 for shape in shapes.values())  # no table of the whole vocabulary
    assert any("trainable_tokens" in name for name in shapes)
    encoder = Encoder(tuned.tokenizer, manifest)
    asked = [
        [*encoder.prompt_ids(prompt(1).messages), *encoder.control_ids(DialSetting((level, 4)))]
        for level in (0, 4)
    ]
    with torch.no_grad():
        logits = [tuned.model(torch.tensor([ids])).logits[0, -1] for ids in asked]
    assert (logits[0] - logits[1]).abs().max() > 1  # dials alive
    script = (
        "import json, sys, torch\n"
        "from equipoise.models.load import load_causal\n"
        "policy = load_causal(sys.argv[1])\n"
        "asked = json.loads(sys.argv[2])\n"
        "with torch.no_grad():\n"
        "    out = [policy.model(torch.tensor([ids])).logits[0, -1].tolist() for ids in asked]\n"
        "print(json.dumps(out))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(saved), json.dumps(asked)],
        capture_output=True,
        text=True,
        check=True,
    )
    again = torch.tensor(json.loads(done.stdout.strip().splitlines()[-1]))
    assert (again - torch.stack(logits)).abs().max() < 1e-5
    # As for an engine that cannot load such adapters: merged, it is a plain model with its dials.
    loaded = load_causal(str(saved))
    merged = loaded.model.merge_and_unload()
    save_dial_model(merged, loaded.tokenizer, loaded.manifest, tmp_path / "merged")
    plain = load_causal(str(tmp_path / "merged")).model
    assert not hasattr(plain, "peft_config")
    with torch.no_grad():
        found = torch.stack([plain(torch.tensor([ids])).logits[0, -1] for ids in asked])
    others = [i for i in range(found.shape[1]) if i not in manifest.all_ids]
    assert (found - again)[:, others].abs().max() < 1e-4


def test_objective_counts_completion_tokens_only() -> None:
    policy = tiny_policy()
    manifest = install(policy.model, policy.tokenizer, dials=Dials(ATTRIBUTES, 5))
    encoder = Encoder(policy.tokenizer, manifest)
    config = TuneConfig(objective="clm", auto_rate=0.0, steps=1, batch_size=1)
    plan = TuningPlan(examples(1)[:1], encoder, config, levels=5, seed=0)
    row = plan[0]
    batch: ControlledBatch = collate([row])
    with torch.no_grad():
        loss = objective(policy.model, batch, config)[0].loss.item()
        ids = [*row.prompt_ids, *row.branches[0]]
        start = len(row.prompt_ids) + row.n_control
        scores = policy.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    by_hand = -np.mean([scores[i - 1, ids[i]].item() for i in range(start, len(ids))])
    assert loss == pytest.approx(by_hand, abs=1e-5)
