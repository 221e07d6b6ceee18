"""Sweeps in chunks, judges, disjointness, and what a language model says of the outputs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from equipoise.denoise import is_degenerate
from equipoise.dials.dials import Dials, cells
from equipoise.errors import RewardError
from equipoise.evaluate.quality import (
    degenerate_share,
    fluency,
    length_per_level,
    per_setting,
    perplexity,
    perplexity_ratio,
    read_references,
)
from equipoise.evaluate.sweep import sweep, sweep_settings
from equipoise.models.likelihood import read_completions
from equipoise.overlap import prompt_key
from equipoise.rewards.scorer import Scorer
from equipoise.steer.responders import Untouched
from equipoise.types import Delivery, DialSetting, Message, Prompt
from eval_kit import (
    ATTRIBUTES,
    SAMPLING,
    FakeEncoder,
    FakeEngine,
    FakeRewardModel,
    Identity,
    deliveries_from,
    prompt,
    targets,
)

PROMPTS = [prompt(f"p{i}") for i in range(5)]


class Half:
    def unit(self, attribute: str, raw: float) -> float:
        return raw / 2


def run(prompts: list[Prompt], *, chunk: int, repeats: int = 2, **judges: object) -> list:
    models = {name: FakeRewardModel(1 + a) for a, name in enumerate(ATTRIBUTES)}
    found = sweep(
        Untouched(FakeEngine(), FakeEncoder(), sampling=SAMPLING),
        prompts,
        sweep_settings(Dials(ATTRIBUTES, 2), auto=True),
        {
            "optimization": Scorer(models, Identity()),
            "generalization": Scorer({**models, **judges}, Half()),
        },
        seed=3,
        repeats=repeats,
        chunk=chunk,
    )
    return list(found)


def key(row: Delivery) -> tuple[str, int, str, str]:
    return (row.prompt_id, row.repeat, str(row.setting), row.text)


def test_sweep_settings() -> None:
    assert sweep_settings(Dials(ATTRIBUTES, 2), auto=False) == cells(2, 2)
    assert sweep_settings(Dials(ATTRIBUTES, 2), auto=True)[4:] == [
        DialSetting(levels) for levels in [(0, None), (1, None), (None, 0), (None, 1)]
    ]
    assert sweep_settings(Dials(ATTRIBUTES[:1], 3), auto=True) == cells(1, 3)


def test_chunks_change_nothing_and_resume() -> None:
    whole = [row for part in run(PROMPTS, chunk=5) for row in part]
    assert len(whole) == 5 * 8 * 2
    parts = run(PROMPTS, chunk=2)
    assert [len(part) for part in parts] == [32, 32, 16]
    assert sorted(map(key, whole)) == sorted(key(row) for part in parts for row in part)
    resumed = [row for part in run(PROMPTS[3:], chunk=2) for row in part]
    assert sorted(map(key, resumed)) == sorted(
        key(row) for row in whole if row.prompt_id in ("p3", "p4")
    )


def test_repeats_are_fresh_and_judges_have_their_own_scale() -> None:
    (rows,) = run(PROMPTS, chunk=5)
    first = [row.text for row in rows if row.repeat == 0]
    assert first != [row.text for row in rows if row.repeat == 1]
    for row in rows:
        raw = int(row.text[1]) / 10 + 0.05
        assert row.unit["optimization"]["helpfulness"] == pytest.approx(raw)
        assert row.unit["generalization"]["helpfulness"] == pytest.approx(raw / 2)


@pytest.mark.parametrize("scores", [[], [float("inf")] * 999])
def test_a_broken_judge_stops_the_sweep(scores: list[float]) -> None:
    class Broken(FakeRewardModel):
        def score(self, pairs: object) -> list[float]:
            return scores[: len(pairs)]  # type: ignore[arg-type]

    with pytest.raises(RewardError, match="safety"):
        run(PROMPTS, chunk=5, safety=Broken())


@pytest.mark.parametrize("text", ["question p3", "  Question\n\tP3 ", "ｑuestion p3"])
def test_the_same_question_is_found_however_it_is_written(text: str) -> None:
    seen = (Message("system", "be brief"), Message("user", text))
    assert prompt_key(seen) == prompt_key(prompt("p3").messages)


def test_a_turn_is_not_a_prompt_and_roles_count() -> None:
    longer = (Message("user", "hi"), Message("user", "question p3"))
    spoken = (Message("assistant", "question p3"),)
    assert prompt_key(prompt("p3").messages) not in {prompt_key(longer), prompt_key(spoken)}


@pytest.mark.parametrize(
    ("text", "degenerate"),
    [
        ("", True),
        ("no.", True),
        ("no, never.", False),
        ("turn the dial slowly and wait", False),
        ("go on and on and on and on and on and on", True),
        ("the dial broke \ufffd again", True),
        ("a b c d a b c d", False),  # 4 of 5 4-grams are new
        ("a b c d a b c d a b c d", True),  # 4 of 9
        ("我不能帮助你", False),
    ],
)
def test_is_degenerate(text: str, degenerate: bool) -> None:
    assert is_degenerate(text) is degenerate


@given(st.text(max_size=80))
def test_is_degenerate_never_fails_and_a_parser_only_adds(text: str) -> None:
    assert is_degenerate(text, parses=lambda _: False)
    assert is_degenerate(text, parses=lambda _: True) == is_degenerate(text)


def test_degenerate_share_and_parser() -> None:
    rows = deliveries_from(np.broadcast_to(targets(2), (1, 2, 4, 2)), levels=2)
    assert degenerate_share(rows).value == 0
    share = degenerate_share(
        rows,
        prompts={"p000": prompt("p000"), "p001": prompt("p001")},
        parses=lambda x, text: x.id == "p001" or text != "an answer 0 2 0",
    )
    assert share.value == pytest.approx(1 / 8)
    assert share.n == 2


def test_length_per_level() -> None:
    rows = deliveries_from(np.broadcast_to(targets(2), (1, 2, 4, 2)), levels=2)
    lengths = length_per_level(rows, dials=Dials(ATTRIBUTES, 2))  # 4, 5, 6, 7 tokens
    assert [e.value for e in lengths["helpfulness"]] == [4.5, 6.5]
    assert [e.value for e in lengths["safety"]] == [5, 6]


def tiny_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    return LlamaForCausalLM(config)


@torch.no_grad()
def separate(model: LlamaForCausalLM, prefix: list[int], ids: list[int]) -> float:
    logits = model(torch.tensor([prefix + ids])).logits[0].log_softmax(-1)
    places = range(len(prefix) - 1, len(prefix) + len(ids) - 1)
    return sum(float(logits[t, i]) for t, i in zip(places, ids, strict=True))


def test_shared_prefix_gives_the_same_log_likelihood_as_separate_passes() -> None:
    model = tiny_model()
    completions = [[5], [], [7, 8, 9, 10], [1, 2], [3, 4, 5, 6, 7]]
    found = read_completions(model, [11, 12, 13], completions, batch_size=2)
    assert [one.n_tokens for one in found] == [1, 0, 4, 2, 5]
    for one, ids in zip(found, completions, strict=True):
        if ids:
            assert one.log_likelihood == pytest.approx(separate(model, [11, 12, 13], ids), abs=1e-4)


def test_fluency_and_perplexity_by_hand() -> None:
    model, encoder = tiny_model(), FakeEncoder()
    rows = [
        Delivery(x.id, DialSetting((c, 0)), 0, text, finish, 2, {})
        for x in PROMPTS[:2]
        for c, (text, finish) in enumerate([("ab", "stop"), ("abc", "length"), ("", "length")])
    ]
    values = fluency(rows, {x.id: x for x in PROMPTS}, model, encoder)
    prefix = encoder.prompt_ids(PROMPTS[0].messages)
    assert values[0] == pytest.approx(separate(model, prefix, [97, 98, 0]) / 3, abs=1e-4)
    assert values[1] == pytest.approx(separate(model, prefix, [97, 98, 99]) / 3, abs=1e-4)
    assert np.isnan(values[2])
    cell = per_setting(rows, values)
    assert set(cell) == {DialSetting((0, 0)), DialSetting((1, 0))}
    assert cell[DialSetting((0, 0))].value == pytest.approx((values[0] + values[3]) / 2)
    read = read_references(model, encoder, [(PROMPTS[0], "ab", True)])
    assert perplexity(read).value == pytest.approx(np.exp(-values[0]), rel=1e-4)


def test_a_long_reference_counts_by_its_first_tokens() -> None:
    model, encoder = tiny_model(), FakeEncoder()
    read = read_references(model, encoder, [(PROMPTS[0], "ab" * 200, True)])
    cut = read_references(model, encoder, [(PROMPTS[0], "ab" * 128, False)])
    assert read[0, 1] == 256 and np.array_equal(read, cut)


def test_the_ratio_of_perplexities_is_paired_over_references() -> None:
    before = np.array([[-10.0, 5], [-80.0, 10], [-3.0, 3]])
    after = before * [1.1, 1.0]
    # Every reference by 10 % of its own: what differs between references cancels only in pairs.
    same = perplexity_ratio(before, before)
    assert (same.value, same.low, same.high) == (1.0, 1.0, 1.0)
    more = perplexity_ratio(before, after)
    assert more.value == pytest.approx(np.exp(0.1 * 93 / 18))
    assert more.low < more.value < more.high
