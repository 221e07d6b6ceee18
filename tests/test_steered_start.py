"""The steered start: control tokens learn to add the directions, and a resumed run ends alike."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from equipoise.config import SteeredStartConfig, TuneConfig
from equipoise.dials.encode import Encoder
from equipoise.errors import ConfigError, TrainingError
from equipoise.models.layers import decoder_layers, states_behind, watched
from equipoise.recipe_io import load_recipe
from equipoise.tune.steered_start import (
    ShiftBatch,
    ShiftDirections,
    ShiftPlan,
    collate,
    shift_of,
    unexplained,
)
from equipoise.tune.trainer import Tuned, tune
from equipoise.types import DialSetting
from steering_kit import SHIFT
from tuning_kit import ATTRIBUTES, examples, lively_policy

VECTORS = 3 * SHIFT
STEERING = ShiftDirections(VECTORS, 0)
START = SteeredStartConfig(
    steps=100, batch_size=8, strength=1.0, learning_rate=1e-2, rows_learning_rate=2e-2,
    checkpoint_every=40,
)  # fmt: skip
FREE = SteeredStartConfig(max_shift=100.0)


def config(start: SteeredStartConfig = START, **changes: object) -> TuneConfig:
    plain = {"objective": "clm", "steps": 2, "batch_size": 4, "lora_rank": 8, "learning_rate": 1e-9}
    return TuneConfig(**{**plain, **changes}, steered_start=start)  # type: ignore[arg-type]


def run(folder: Path, made: TuneConfig, **more: object) -> Tuned:
    return tune(
        lively_policy(),
        examples(),
        made,
        attributes=ATTRIBUTES,
        levels=5,
        seed=1,
        checkpoints=folder,
        steering=STEERING,
        **more,  # type: ignore[arg-type]
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


def test_strengths_that_are_known_take_the_place_of_strength() -> None:
    steering = ShiftDirections(SHIFT, 0, lambda setting: (0.5, -2.0 * (setting.levels[1] or 0)))
    free = shift_of(DialSetting((4, 3)), steering, FREE, 5)
    assert torch.allclose(free, 0.5 * SHIFT[0] - 6 * SHIFT[1])
    held = shift_of(DialSetting((4, 3)), steering, SteeredStartConfig(max_shift=1.5), 5)
    assert torch.allclose(held, free * 1.5 * SHIFT.norm(dim=1).mean() / free.norm())


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


def test_both_readings_meet_at_the_same_tokens_and_the_text_tells_no_setting() -> None:
    policy = lively_policy()
    from equipoise.dials.tokens import install

    manifest = install(policy.model, policy.tokenizer, attributes=ATTRIBUTES, levels=5)
    encoder = Encoder(policy.tokenizer, manifest)
    plan = ShiftPlan(examples(), encoder, STEERING, START, levels=5, auto_rate=0.2, seed=3)
    rows = [plan[index] for index in range(48)]
    batch = collate(rows)
    assert batch.plain_at.sum(1).tolist() == batch.dialled_at.sum(1).tolist()
    # What stands behind a marked place is the same token on both sides.
    follow = [
        ids[:, 1:][at[:, :-1]]
        for ids, at in (
            (batch.plain_ids, batch.plain_at), (batch.dialled_ids, batch.dialled_at)
        )
    ]  # fmt: skip
    assert torch.equal(*follow)
    by_text: dict[tuple[int, ...], set[tuple[int, ...]]] = {}
    for row in (plan[index] for index in range(len(plan))):
        by_text.setdefault(row.completion_ids, set()).add(row.control_ids)
    assert min(map(len, by_text.values())) > 10


def test_the_start_teaches_the_shift_and_its_curve_says_so(tmp_path: Path) -> None:
    shown: list[tuple[int, int]] = []
    tuned = run(tmp_path, config(), on_step=lambda done, total: shown.append((done, total)))
    curve = [row["unexplained"] for row in tuned.start_curve]
    assert len(curve) == 100
    assert sum(curve[-5:]) / 5 < 0.5 < 1 < curve[0]
    assert shown[0] == (1, 102) and shown[-1] == (102, 102)
    assert [row["tokens"] for row in tuned.start_curve] == sorted(
        row["tokens"] for row in tuned.start_curve
    )
    encoder = Encoder(tuned.tokenizer, tuned.manifest)
    plan = ShiftPlan(examples(), encoder, STEERING, START, levels=5, auto_rate=0.0, seed=77)
    rows = [plan[index] for index in range(24)]
    batch: ShiftBatch = collate(rows)
    read = sum(2 * (len(r.prompt_ids) + len(r.completion_ids)) + len(r.control_ids) for r in rows)
    assert batch.n_tokens == read < batch.plain_ids.numel() + batch.dialled_ids.numel()
    with torch.no_grad():
        missing, wanted = unexplained(tuned.model, batch, 0)
    assert missing < 0.5 * wanted


@pytest.mark.parametrize("at", [60, 101])
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
    assert len(tuned.start_curve) == 100 and tuned.curve == []
    assert tuned.start_curve[-1]["unexplained"] < 0.5


def test_states_that_are_not_finite_stop_the_start(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="not finite"):
        tune(
            lively_policy(), examples(), config(), attributes=ATTRIBUTES, levels=5, seed=1,
            checkpoints=tmp_path, steering=ShiftDirections(VECTORS * torch.nan, 0),
        )  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (["steer=null", "regenerate=null"], "needs the directions of `steer`"),
        (["tune.lora_rank=0"], "set `tune.lora_rank`"),
        (["tune.objective=rlhf"], "set `tune.lora_rank`"),
        (["tune.steered_start.max_fluency_drop=0.3", "prompts.n_dev=0"], "on dev prompts: set"),
        (["tune.steered_start=null", "tune.steps=0"], "nothing would be tuned"),
    ],
)
def test_a_recipe_without_what_the_start_needs_is_refused(changes: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_recipe("smollm2", overrides=["tune.steered_start={}", *changes])
