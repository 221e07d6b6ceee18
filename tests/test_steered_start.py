"""The steered start: control tokens learn to add the directions, and a resumed run ends alike."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from equipoise.config import SteeredStartConfig, TuneConfig
from equipoise.dials.dials import Dials
from equipoise.dials.tokens import install
from equipoise.encoding.encode import Encoder
from equipoise.errors import ConfigError, TrainingError
from equipoise.models.layers import decoder_layers, states_behind, watched
from equipoise.recipes.load import load_recipe
from equipoise.training.checkpoints import OnStep
from equipoise.training.loop import Training
from equipoise.tune.lora import add_lora
from equipoise.tune.prefix import before_labels
from equipoise.tune.shifts import ShiftDirections, ShiftPlan, mirrored, shift_batch, shift_of
from equipoise.tune.steered_start import disturbance_weight, missing
from equipoise.tune.trainer import TunedPolicy, tune
from equipoise.types import DialSetting
from steering_kit import SHIFT
from tuning_kit import ATTRIBUTES, examples, lively_policy

VECTORS = 3 * SHIFT
STEERING = ShiftDirections(VECTORS, 0)
START = SteeredStartConfig(
    steps=60, batch_size=2, strength=1.0, learning_rate=1e-2, rows_learning_rate=2e-2,
    checkpoint_every=40,
)  # fmt: skip
FREE = SteeredStartConfig(max_shift=100.0)


def config(start: SteeredStartConfig = START, **changes: object) -> TuneConfig:
    plain = {"objective": "clm", "steps": 2, "batch_size": 4, "lora_rank": 8, "learning_rate": 1e-9}
    return TuneConfig(**{**plain, **changes}, steered_start=start)  # type: ignore[arg-type]


def run(folder: Path, made: TuneConfig, on_step: OnStep | None = None) -> TunedPolicy:
    return tune(
        lively_policy(),
        examples(),
        made,
        dials=Dials(ATTRIBUTES, 5),
        training=Training(folder, seed=1, on_step=on_step),
        steering=STEERING,
    )


def test_a_level_has_its_share_of_the_direction() -> None:
    def shift(*levels: int | None) -> torch.Tensor:
        return shift_of(DialSetting(levels), ShiftDirections(SHIFT, 0), FREE, 5)

    assert torch.allclose(shift(4, 2), 2 * SHIFT[0])
    assert torch.allclose(shift(3, None), SHIFT[0])
    assert torch.allclose(shift(None, 0), -2 * SHIFT[1])
    assert torch.allclose(shift(0, 4), 2 * (SHIFT[1] - SHIFT[0]))
    assert torch.equal(shift(2, None), torch.zeros(32))


def test_directions_that_add_up_are_held_back_and_keep_their_way() -> None:
    alike, held_back = (
        ShiftDirections(torch.stack([SHIFT[0], SHIFT[0]]), 0),
        SteeredStartConfig(max_shift=1.5),
    )
    held = shift_of(DialSetting((4, 4)), alike, held_back, 5)
    assert torch.allclose(held, 1.5 * SHIFT[0], atol=1e-5)
    assert torch.allclose(shift_of(DialSetting((3, 2)), alike, held_back, 5), SHIFT[0])


def test_states_behind_a_layer_are_those_of_the_whole_pass_and_nothing_above_is_computed() -> None:
    model = lively_policy().model
    ids = torch.randint(3, 60, (2, 9), generator=torch.Generator().manual_seed(0))
    with watched(model, 0) as seen, torch.no_grad():
        model(input_ids=ids)
    called: list[int] = []
    handle = decoder_layers(model)[1].register_forward_pre_hook(lambda *_: called.append(1))
    with torch.no_grad():
        assert torch.equal(states_behind(model, 0, ids), seen[0])
    handle.remove()
    assert not called
    assert not any(module._forward_hooks for module in decoder_layers(model))


def planned(count: int, *, auto_rate: float = 0.0) -> tuple[Any, list[Any]]:
    policy = lively_policy()
    manifest = install(policy.model, policy.tokenizer, dials=Dials(ATTRIBUTES, 5))
    encoder = Encoder(policy.tokenizer, manifest)
    plan = ShiftPlan(examples(), encoder, STEERING, START, auto_rate=auto_rate, seed=3)
    return policy, [plan[index] for index in range(count)]


def test_a_setting_is_read_beside_its_mirror_images() -> None:
    found = [setting.levels for setting in mirrored([0, 3], 5)]
    assert found == [(0, 3), (0, 1), (4, 3), (4, 1)]
    assert [setting.levels for setting in mirrored([1], 2)] == [(1,), (0,)]


def test_what_a_text_would_teach_alone_cancels_and_the_text_tells_no_setting() -> None:
    _, rows = planned(len(examples()))
    assert all(torch.allclose(row.shifts.sum(0), torch.zeros(32), atol=1e-5) for row in rows)
    assert any(row.shifts.norm() > 1 for row in rows)
    asked = {branch[:2] for row in rows for branch in row.text.branches}
    assert len(asked) == 25
    by_text: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for row in planned(START.steps * START.batch_size)[1]:
        text = (*row.text.prompt_ids, *row.text.branches[0][2:])
        by_text.setdefault(text, set()).update(branch[:2] for branch in row.text.branches)
    # More than one setting and its mirror images.
    assert min(map(len, by_text.values())) > 4
    autos = {branch[0] for row in planned(16, auto_rate=0.5)[1] for branch in row.text.branches}
    assert autos - {branch[0] for branch in asked}


def test_both_readings_meet_at_the_same_tokens() -> None:
    _, rows = planned(12, auto_rate=0.2)
    batch = shift_batch(rows)
    follow = batch.plain_ids[:, 1:][batch.plain_at[:, :-1]]
    dialled, places = batch.dialled.input_ids, before_labels(batch.dialled)
    texts = follow.split(batch.plain_at.sum(1).tolist())
    expected = torch.cat([text.repeat(4) for text in texts])
    assert torch.equal(dialled[:, 1:][places[:, :-1]], expected)
    prompts = sum(len(row.text.prompt_ids) for row in rows)
    read = 5 * len(follow) + 2 * prompts + 8 * len(rows)
    assert batch.n_tokens == read


def test_what_is_missing_is_told_apart() -> None:
    policy, rows = planned(6)
    model: Any = add_lora(
        policy.model,
        install(policy.model, policy.tokenizer, dials=Dials(ATTRIBUTES, 5)),
        rank=2,
        seed=0,
    )
    batch = shift_batch(rows)
    with torch.no_grad():
        found = missing(model, batch, 0)
        still = missing(model, replace(batch, shifts=torch.zeros_like(batch.shifts)), 0)
        both = missing(model, replace(batch, shifts=batch.shifts + SHIFT[0]), 0)
    share = batch.plain_at.sum(1) / batch.plain_at.sum()
    wanted = (batch.shifts.square().sum(-1).mean(1) * share).sum()
    # A policy that nobody has taught misses about the shifts, and the same disturbance whatever
    # they are; what all settings shall add alike is disturbance too.
    assert found.unexplained == pytest.approx(float(wanted), rel=0.2)
    assert found.disturbance == pytest.approx(float(still.disturbance), rel=1e-4)
    assert both.unexplained == pytest.approx(float(found.unexplained), rel=1e-4)
    assert abs(both.disturbance - found.disturbance) > 0.1


def test_the_disturbance_counts_in_full_after_a_third() -> None:
    assert disturbance_weight(0) == pytest.approx(0.1)
    assert disturbance_weight(1 / 6) == pytest.approx(0.55)
    assert disturbance_weight(1 / 3) == disturbance_weight(1.0) == pytest.approx(1.0)


def test_the_start_teaches_the_shift_and_its_curve_says_so(tmp_path: Path) -> None:
    shown: list[tuple[int, int]] = []
    tuned = run(tmp_path, config(), on_step=lambda done, total: shown.append((done, total)))
    curve = tuned.start_curve
    assert len(curve) == 60
    for name in ("unexplained", "disturbance"):
        assert sum(row[name] for row in curve[-5:]) / 5 < 0.3
    assert curve[0]["unexplained"] > 0.5
    assert shown[0] == (1, 62) and shown[-1] == (62, 62)
    assert [row["tokens"] for row in curve] == sorted(row["tokens"] for row in curve)
    encoder = Encoder(tuned.tokenizer, tuned.manifest)
    plan = ShiftPlan(examples(), encoder, STEERING, START, auto_rate=0.0, seed=77)
    with torch.no_grad():
        found = missing(tuned.model, shift_batch([plan[index] for index in range(24)]), 0)
    assert found.unexplained + found.disturbance < 0.5 * plan.wanted


@pytest.mark.parametrize("at", [50, 61])
def test_resume_is_exact_in_the_start_and_behind_it(tmp_path: Path, at: int) -> None:
    made = config(learning_rate=1e-3, checkpoint_every=1, objective="exmate", auto_rate=0.0)
    whole = run(tmp_path / "whole", made)

    class StopError(Exception):
        pass

    def stop(done: int, _: int) -> None:
        if done == at:
            raise StopError

    with pytest.raises(StopError):
        run(tmp_path / "parts", made, on_step=stop)
    resumed = run(tmp_path / "parts", made)
    assert resumed.start_curve == whole.start_curve
    assert resumed.curve == whole.curve
    ours, theirs = resumed.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_the_start_can_stand_alone(tmp_path: Path) -> None:
    tuned = run(tmp_path, config(steps=0))
    assert len(tuned.start_curve) == 60 and tuned.curve == []
    assert tuned.start_curve[-1]["unexplained"] < 0.5


def test_states_that_are_not_finite_stop_the_start(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="not finite"):
        tune(
            lively_policy(), examples(), config(), dials=Dials(ATTRIBUTES, 5),
            training=Training(tmp_path, seed=1), steering=ShiftDirections(VECTORS * torch.nan, 0),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["steer=null", "regenerate=null"], "needs the directions of `steer`"),
        (["tune.lora_rank=0"], "set `tune.lora_rank`"),
        (["tune.objective=rlhf"], "set `tune.lora_rank`"),
        (["tune.steered_start=null", "tune.steps=0"], "nothing would be tuned"),
    ],
)
def test_a_recipe_without_what_the_start_needs_is_refused(changes: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_recipe("smollm2", overrides=["tune.steered_start={}", *changes])
