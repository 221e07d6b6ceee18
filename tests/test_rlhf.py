"""RLHF: the reward by hand, ids of rollouts, the reference, exact resume, and every guard."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from equipoise.config import Sampling, SamplingConfig
from equipoise.dials.dials import Dials, cells
from equipoise.dials.tokens import install
from equipoise.encoding.encode import Encoder
from equipoise.engine.sample import TransformersEngine
from equipoise.errors import RewardError, TrainingError
from equipoise.pipeline.rundir import RunDir
from equipoise.pipeline.runner import run_all
from equipoise.pipeline.stored import with_new_defaults
from equipoise.progress import Progress
from equipoise.recipes.load import load_recipe
from equipoise.rlhf.closeness import AskPlan, closeness, deaf_floor
from equipoise.rlhf.online import Guards, StartReference
from equipoise.rlhf.rollouts import Ask, OnlineConfig, Rollouts
from equipoise.store.rundir import diff
from equipoise.tune.trainer import TunedPolicy
from equipoise.types import DialSetting, Prompt
from pipeline_kit import save_assets, tiny_recipe, write_recipe
from rlhf_kit import Constant, Scorer, config, models, run
from tuning_kit import ATTRIBUTES, kept_steps, prompt, tiny_policy


def weights(tuned: TunedPolicy) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in tuned.model.state_dict().items()}


# The reward


def test_closeness_by_hand() -> None:
    assert closeness([0.9, 0.1], DialSetting((4, 0)), 5) == pytest.approx(1.0)
    assert closeness([0.5, 0.3], DialSetting((4, 0)), 5) == pytest.approx(1 - (0.4 + 0.2) / 2)
    assert closeness([0.5, 0.3], DialSetting((None, 0)), 5) == pytest.approx(0.8)
    with pytest.raises(ValueError, match="auto"):
        closeness([0.5, 0.3], DialSetting((None, None)), 5)


def test_the_deaf_floor_is_what_the_median_earns() -> None:
    assert deaf_floor(5) == pytest.approx(0.76)
    earned = [closeness([0.5, 0.5], cell, 5) for cell in cells(2, 5)]
    assert sum(earned) / len(earned) == pytest.approx(deaf_floor(5))


@given(
    units=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    levels=st.tuples(st.integers(0, 4), st.integers(0, 4)),
)
def test_closeness_is_a_share_and_never_better_than_on_target(
    units: tuple[float, float], levels: tuple[int, int]
) -> None:
    found = closeness(units, DialSetting(levels), 5)
    assert 0.0 <= found <= closeness([(n + 0.5) / 5 for n in levels], DialSetting(levels), 5)


# What is asked


def plan(auto_rate: float = 0.3) -> AskPlan:
    prompts = [prompt(i) for i in range(7)]
    return AskPlan(prompts, dials=Dials(("helpfulness", "safety"), 5), auto_rate=auto_rate, seed=1)


def test_an_ask_is_a_function_of_the_index() -> None:
    one, other = plan(), plan()
    assert [one(i) for i in range(40)] == [other(i) for i in reversed(range(40))][::-1]


def test_every_prompt_once_per_epoch_and_never_all_on_auto() -> None:
    asks = [plan(0.9)(i) for i in range(70)]
    for epoch in range(10):
        part = asks[7 * epoch : 7 * epoch + 7]
        assert {ask.prompt.id for ask in part} == {f"p{i}" for i in range(7)}
    settings = [ask.setting for ask in asks if ask.setting]
    assert all(any(level is not None for level in s.levels) for s in settings)
    assert any(None in s.levels for s in settings)


def test_settings_cover_the_grid() -> None:
    asked = {plan(0.0)(i).setting for i in range(400)}
    assert asked == set(cells(2, 5))


# Rollouts and reference


def test_rollouts_hand_over_the_encoders_ids_with_the_controls() -> None:
    policy = tiny_policy()
    manifest = install(policy.model, policy.tokenizer, dials=Dials(ATTRIBUTES, 5))
    encoder = Encoder(policy.tokenizer, manifest)
    seen: list[tuple[Ask, str]] = []

    def reward(pairs: Sequence[tuple[Ask, str]]) -> list[float]:
        seen.extend(pairs)
        return [i / 10 for i in range(len(pairs))]

    asks = plan()
    rollouts = Rollouts(
        engine=TransformersEngine(policy.model, encoder, model_hash=""),
        encoder=encoder,
        asks=asks,
        reward=reward,
        config=online_config(),
        seed=5,
    )
    found = rollouts(["3", "3", "4", "4"], None)
    for row, ids in zip((3, 3, 4, 4), found["prompt_ids"], strict=True):
        ask = asks(row)
        assert ask.setting is not None
        assert ids == [*encoder.prompt_ids(ask.prompt.messages), *encoder.control_ids(ask.setting)]
    assert found["earned"] == [0.0, 0.1, 0.2, 0.3]
    assert [ask.prompt.id for ask, _ in seen] == [asks(i).prompt.id for i in (3, 3, 4, 4)]
    for (_, text), ids in zip(seen, found["completion_ids"], strict=True):
        assert 1 <= len(ids) <= 6
        assert encoder.decode(ids).startswith(text)
    # Samples of a group differ by their seed; the same row gives the same samples again.
    assert found["completion_ids"][0] != found["completion_ids"][1]
    assert rollouts(["4", "4"], None)["completion_ids"] == found["completion_ids"][2:]
    # Two prompts once each, then controls and all but the last token of each sample.
    sampled = sum(map(len, found["completion_ids"][2:]))
    assert rollouts.facts["tokens"] <= len(found["prompt_ids"][2]) + 2 + sampled


def online_config(**changes: Any) -> OnlineConfig:
    plain: dict[str, Any] = {
        "steps": 2,
        "batch_size": 4,
        "group": 2,
        "learning_rate": 1e-3,
        "beta": 0.01,
        "kl_limit": 10.0,
        "sampling": Sampling(top_k=0, max_tokens=6),
        "checkpoint_every": 10,
        "section": "tune.rlhf",
        **changes,
    }
    return OnlineConfig(**plain)


def test_the_reference_reads_the_prompt_without_controls() -> None:
    policy, start = tiny_policy(), tiny_policy()
    manifest = install(policy.model, policy.tokenizer, dials=Dials(ATTRIBUTES, 5))
    controls = list(manifest.control_ids(DialSetting((1, 4))))
    short, long, answer = [5, 6], [5, 6, 7, 8], [9, 10, 11]
    ids = torch.tensor([[0, 0, *short, *controls, *answer], [*long, *controls, *answer]])
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    reference = StartReference(start.model, manifest.all_ids, temperature=2.0)
    found = reference.log_probs(ids, mask, 3)
    for row, head in enumerate((short, long)):
        plain = torch.tensor([head + answer])
        logits = start.model(input_ids=plain).logits[0, len(head) - 1 : -1] / 2.0
        expected = logits.log_softmax(-1)[range(3), answer]
        torch.testing.assert_close(found[row], expected, atol=1e-5, rtol=1e-5)
    assert reference.tokens == 5 + 7


# Training


def test_the_reward_rises_and_the_start_model_holds_it_back(tmp_path: Path) -> None:
    def tuned(name: str, beta: float) -> TunedPolicy:
        rlhf = {"group": 8, "learning_rate": 1e-2, "beta": beta}
        made = config(steps=60, batch_size=32, checkpoint_every=1000, auto_rate=0.0, rlhf=rlhf)
        return run(tmp_path / name, made)

    free, held = tuned("free", 1e-4), tuned("held", 5.0)

    def mean(result: TunedPolicy, name: str, part: slice) -> float:
        values = [row[name] for row in result.curve[part]]
        return sum(values) / len(values)

    gain = mean(free, "reward", slice(-15, None)) - mean(free, "reward", slice(0, 15))
    assert gain > 0.05
    assert mean(held, "kl", slice(-15, None)) < 0.2 * mean(free, "kl", slice(-15, None))
    assert all(row["floor"] == pytest.approx(0.76) for row in free.curve)
    tokens = [row["tokens"] for row in free.curve]
    assert tokens == sorted(tokens)
    last = free.curve[-1]
    parts = last["tokens_sampled"] + last["tokens_trained"] + last["tokens_reference"]
    assert tokens[-1] - tokens[-2] == pytest.approx(parts)


def test_resume_is_exact(tmp_path: Path) -> None:
    made = config(batch_size=4, rlhf={"warm_start": 3, "batch_size": 8})
    whole = run(tmp_path / "whole", made)

    class StoppedError(Exception):
        pass

    def stop(done: int, total: int) -> None:
        assert total == 7
        if done == 6:  # the third step online, past the checkpoint at two
            raise StoppedError

    with pytest.raises(StoppedError):
        run(tmp_path / "cut", made, on_step=stop)
    resumed = run(tmp_path / "cut", made)
    assert weights(resumed).keys() == weights(whole).keys()
    for name, value in weights(whole).items():
        assert torch.equal(value, weights(resumed)[name]), name
    # NaN is not equal to itself, JSON is.
    assert json.dumps(resumed.curve) == json.dumps(whole.curve)
    assert [row["step"] for row in whole.curve] == list(range(1, 8))
    assert [row["warm_start"] for row in whole.curve] == [1.0] * 3 + [0.0] * 4
    # The warm start is part of the budget.
    first = whole.curve[3]
    own = first["tokens_sampled"] + first["tokens_trained"] + first["tokens_reference"]
    assert first["tokens"] == whole.curve[2]["tokens"] + own


def test_the_online_part_has_checkpoints_of_its_own(tmp_path: Path) -> None:
    rare = config(steps=4, checkpoint_every=100, rlhf={"warm_start": 2, "checkpoint_every": 3})
    run(tmp_path, rare)
    assert kept_steps(tmp_path) == [3, 4]
    assert kept_steps(tmp_path / "warm-start") == [2]


def test_the_shipped_recipe_has_checkpoints_before_the_end_and_old_runs_of_it_go_on() -> None:
    recipe = load_recipe("workshop-rlhf")
    tune = recipe.tune
    assert tune.rlhf.checkpoint_every < tune.steps
    assert tune.checkpoint_every < tune.rlhf.warm_start
    new = recipe.model_dump(mode="json")
    old = copy.deepcopy(new)
    del old["tune"]["rlhf"]["checkpoint_every"]
    assert diff(old, new) != [] == diff(with_new_defaults(old, recipe), new)


def test_the_online_part_may_have_another_batch(tmp_path: Path) -> None:
    same = run(tmp_path / "same", config(steps=2, rlhf={"warm_start": 2})).curve
    made = config(steps=2, rlhf={"warm_start": 2, "batch_size": 16})
    double = run(tmp_path / "double", made).curve
    assert [row["loss"] for row in double[:2]] == [row["loss"] for row in same[:2]]
    read = [sum(row["tokens_reference"] for row in curve[2:]) for curve in (same, double)]
    assert read[1] == pytest.approx(2 * read[0], rel=0.25)


def test_probes_stay_in_the_curve_until_the_next(tmp_path: Path) -> None:
    looked: list[int] = []

    def probe(engine: TransformersEngine, encoder: Encoder) -> dict[str, float]:
        assert not engine.model.training
        looked.append(len(looked))
        return {"closeness": float(len(looked))}

    tuned = run(tmp_path, config(steps=5, rlhf={"probe_every": 2}), probe=probe)
    assert [row["probe_step"] for row in tuned.curve] == [0.0, 2.0, 2.0, 4.0, 5.0]
    assert [row["probe_closeness"] for row in tuned.curve] == [1.0, 2.0, 2.0, 3.0, 4.0]
    assert len(looked) == 4


def test_lora_trains_adapter_and_control_rows_only(tmp_path: Path) -> None:
    tuned = run(tmp_path, config(lora_rank=2))
    start = tiny_policy().model.state_dict()
    state = tuned.model.state_dict()
    frozen = {k.replace("base_model.model.", "").replace(".base_layer", ""): k for k in state}
    name = "model.layers.0.self_attn.q_proj.weight"
    assert torch.equal(state[frozen[name]], start[name])
    assert any("lora_B" in key and bool(value.any()) for key, value in state.items())


# Guards


def test_a_constant_reward_stops_within_three_steps(tmp_path: Path) -> None:
    done: list[int] = []
    with pytest.raises(TrainingError, match="no reward to learn from") as caught:
        run(
            tmp_path,
            config(steps=20, checkpoint_every=1),
            reward_models=models(Constant),
            on_step=lambda step, _: done.append(step),
        )
    # Settings differ, so rewards differ over the batch: what counts is that none differs
    # within a group.
    assert max(done, default=0) <= 3
    assert "nothing tells good from bad" in caught.value.why
    assert kept_steps(tmp_path) == []


@pytest.mark.parametrize("steps", [1, 2])
def test_a_short_run_without_signal_does_not_end_well(tmp_path: Path, steps: int) -> None:
    with pytest.raises(TrainingError, match=f"step {steps}: no reward to learn from"):
        run(tmp_path, config(steps=steps), reward_models=models(Constant))


def test_a_short_run_with_some_signal_ends_well(tmp_path: Path) -> None:
    class Dying(Scorer):
        calls = 0

        def score(self, pairs: Sequence[tuple[Prompt, str]]) -> list[float]:
            Dying.calls += 1  # two attributes: one step
            return super().score(pairs) if Dying.calls <= 2 else [0.5] * len(pairs)

    curve = run(tmp_path, config(steps=2), reward_models=models(Dying)).curve
    assert curve[0]["spread"] > curve[1]["spread"] == pytest.approx(0, abs=1e-6)


def test_a_reward_that_dies_keeps_the_last_good_checkpoint(tmp_path: Path) -> None:
    class Dying(Scorer):
        calls = 0

        def score(self, pairs: Sequence[tuple[Prompt, str]]) -> list[float]:
            Dying.calls += 1
            alive = Dying.calls <= 8  # two attributes: four steps
            return super().score(pairs) if alive else [0.5] * len(pairs)

    with pytest.raises(TrainingError, match="stopped at step 7"):
        run(tmp_path, config(steps=20, checkpoint_every=1), reward_models=models(Dying))
    assert kept_steps(tmp_path)[-1] == 4


def test_a_policy_that_runs_away_stops_within_three_steps(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="runs away") as caught:
        run(
            tmp_path,
            config(
                steps=40,
                checkpoint_every=1,
                rlhf={"learning_rate": 0.1, "kl_limit": 0.05, "beta": 1e-6},
            ),
        )
    assert "0.05 nats per token" in caught.value.why
    last = kept_steps(tmp_path)[-1]
    curve = json.loads((tmp_path / f"checkpoint-{last}/equipoise.json").read_text())["curve"]
    assert all(row["kl"] <= 0.05 for row in curve[-1:])


@pytest.mark.parametrize("steps", [3, 4])
def test_a_policy_that_runs_away_at_the_end_is_not_published(tmp_path: Path, steps: int) -> None:
    rlhf = {"learning_rate": 0.1, "kl_limit": 0.05, "beta": 1e-6}
    with pytest.raises(TrainingError, match=f"step {steps}: the policy runs away") as caught:
        run(tmp_path, config(steps=steps, checkpoint_every=1, rlhf=rlhf))
    # The first step has no learning rate yet.
    assert kept_steps(tmp_path)[-1] == 2
    assert f"in a row: {steps - 2};" in caught.value.why
    assert "tune.rlhf.beta" in caught.value.fix


def last_step(kl: float, section: str = "tune.rlhf") -> None:
    rows = [{"kl": kl, "spread": 0.1, "reward": 0.7}]
    done, control = SimpleNamespace(global_step=9, max_steps=9), SimpleNamespace()
    Guards(rows, online_config(section=section)).on_step_end(None, done, control)


def test_the_last_step_must_be_near_and_the_advice_names_the_section() -> None:
    last_step(9.9)
    with pytest.raises(TrainingError, match="runs away"):
        last_step(math.nan)
    with pytest.raises(TrainingError) as caught:
        last_step(10.1, "align")
    assert "raise align.beta or lower align.learning_rate" in caught.value.fix


def test_a_finished_training_may_be_resumed(tmp_path: Path) -> None:
    """Killed between its last checkpoint and the end of the stage, a run goes on from there."""
    first = run(tmp_path, config(steps=2)).curve
    assert run(tmp_path, config(steps=2), reward_models=models(Constant)).curve == first


def test_a_reward_that_is_not_a_number_stops_at_once(tmp_path: Path) -> None:
    class Broken(Scorer):
        def score(self, pairs: Sequence[tuple[Prompt, str]]) -> list[float]:
            return [math.nan] * len(pairs)

    with pytest.raises(RewardError, match="nan"):
        run(tmp_path, config(), reward_models=models(Broken))


# The stage


def test_the_whole_run_by_rlhf(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = tiny_recipe(save_assets(tmp_path / "assets"))
    plain["tune"] |= {
        "objective": "rlhf",
        "batch_size": 8,
        "rlhf": {
            "group": 4,
            "warm_start": 2,
            "probe_every": 4,
            "probe_prompts": 2,
            "sampling": SamplingConfig(max_tokens=12).model_dump(),
        },
    }
    recipe = load_recipe(str(write_recipe(tmp_path / "tiny.yaml", plain)))
    with RunDir.open(tmp_path / "run", recipe) as opened:
        run_all(opened, progress=Progress())
        assert opened.done("tune").facts()["steps"] == 8
    assert f"{deaf_floor(3):.3f}" in capsys.readouterr().err
    curve = json.loads((tmp_path / "run/tune/curve.json").read_text())
    assert [row["warm_start"] for row in curve] == [1.0] * 2 + [0.0] * 6
    last = curve[-1]
    assert last["probe_step"] == 6
    for judge in ("optimization", "generalization"):
        assert 0 <= last[f"probe_{judge}_closeness"] <= 1
        assert -1 <= last[f"probe_{judge}_mp_safety"] <= 1
    assert {"reward", "kl", "length", "degenerate", "floor", "tokens"} <= last.keys()
    report = json.loads((tmp_path / "run/report/report.json").read_text())
    assert report["methods"]["tuned"]["cost"]["tuning_tokens"] == last["tokens"]
    assert report["losses"]["tuned"]["kl"][-1] == pytest.approx(last["kl"])
