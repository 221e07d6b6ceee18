"""ExMATE's options by hand, the head at labels only, and what the curve tells."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from equipoise.config import TuneConfig
from equipoise.dials.dials import Dials
from equipoise.dials.tokens import install
from equipoise.encoding.encode import Encoder
from equipoise.models.load import LoadedPolicy
from equipoise.training.loop import Training
from equipoise.tune.batch import LOOK_EVERY, ControlledBatch, TuningPlan, collate
from equipoise.tune.lora import add_lora
from equipoise.tune.objectives import preferred
from equipoise.tune.prefix import branch_log_likelihoods
from equipoise.tune.trainer import objective, tune
from tuning_kit import ATTRIBUTES, examples, tiny_policy


def test_preferred_counts_wins_and_half_of_ties() -> None:
    sums = torch.tensor([[-1.0, -2.0, -1.0], [-5.0, -4.0, 0.0]])
    exists = torch.tensor([[True, True], [True, False]])
    assert preferred(sums, exists).item() == pytest.approx(1.5 / 3)
    assert preferred(sums, torch.zeros(2, 2, dtype=torch.bool)).isnan()


def batch_of(config: TuneConfig, policy: LoadedPolicy) -> tuple[ControlledBatch, Encoder]:
    manifest = install(policy.model, policy.tokenizer, dials=Dials(ATTRIBUTES, 5))
    encoder = Encoder(policy.tokenizer, manifest)
    plan = TuningPlan(examples(), encoder, config, levels=5, seed=0)
    return collate([plan[i] for i in range(config.batch_size)]), encoder


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("tied", [True, False])
def test_the_head_is_applied_where_a_label_stands_and_nowhere_else(lora: bool, tied: bool) -> None:
    policy = tiny_policy(tied=tied)
    config = TuneConfig(batch_size=6, steps=1)
    batch, encoder = batch_of(config, policy)
    model = policy.model
    if lora:
        assert encoder.manifest is not None
        model = add_lora(model, encoder.manifest, rank=2, seed=0)
    rows: list[int] = []
    head = model.get_output_embeddings()
    handle = head.register_forward_hook(
        lambda _module, _arguments, output: rows.append(output.numel() // output.shape[-1])
    )
    sums, counts = branch_log_likelihoods(model, batch)
    handle.remove()
    labels = int(batch.completion_mask.sum())
    assert rows == [labels] and int(counts.sum()) == labels
    _, n, length = batch.completion_mask.shape
    assert labels < 6 * n * (length - 2)  # less than all positions behind the two control tokens
    sums.sum().backward()
    assert any(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
    assert model(batch.input_ids[:, :3]).logits.shape[:2] == (6, 3)  # the hook is gone


def test_exmate_learns_to_prefer_the_asked_cell(tmp_path: Path) -> None:
    config = TuneConfig(
        steps=40,
        batch_size=8,
        learning_rate=2e-2,
        dtype="float32",
        auto_rate=0.0,
    )
    tuned = tune(
        tiny_policy(),
        examples(),
        config,
        dials=Dials(ATTRIBUTES, 5),
        training=Training(tmp_path, seed=1),
    )
    first, last = tuned.curve[0], tuned.curve[-10:]
    assert sum(row["preferred"] for row in last) / 10 > 0.75
    assert 0.1 < first["preferred"] < 0.9
    assert first["epoch"] == pytest.approx(8 / 24)


def test_clm_is_looked_at_every_tenth_batch_and_learns_nothing_from_it() -> None:
    policy = tiny_policy()
    manifest = install(policy.model, policy.tokenizer, dials=Dials(ATTRIBUTES, 5))
    encoder = Encoder(policy.tokenizer, manifest)
    config = TuneConfig(objective="clm", auto_rate=0.0, steps=2 * LOOK_EVERY, batch_size=2)
    plan = TuningPlan(examples(), encoder, config, levels=5, seed=0)
    branches = [len(plan[i].branches) for i in range(len(plan))]
    assert branches == [2, 2, *[1] * 18] * 2
    looked = collate([plan[0], plan[1]])
    loss, right = objective(policy.model, looked, config)
    assert 0 <= right <= 1
    loss.loss.backward()
    grads = [p.grad.clone() for p in policy.model.parameters()]
    policy.model.zero_grad()
    sums, counts = branch_log_likelihoods(policy.model, looked)
    (-(sums / counts)[:, 0].mean()).backward()
    for one, p in zip(grads, policy.model.parameters(), strict=True):
        torch.testing.assert_close(one, p.grad)
