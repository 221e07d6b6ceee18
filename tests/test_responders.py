"""Responders against fakes: what is asked of the engine, what is kept, what is counted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from equipoise.dials.dials import Dials, cells
from equipoise.engine.seam import Sampled
from equipoise.errors import ConfigError, DataError, RewardError
from equipoise.rewards.scorer import Scorer
from equipoise.steer.prompting import Prompting, Wording, built_in_phrases
from equipoise.steer.reranking import Candidates, Reranking, nearest
from equipoise.steer.responders import Tuned, Untouched
from equipoise.types import ControlledExample, DialSetting, Message, Prompt, Responder
from eval_kit import (
    ATTRIBUTES,
    SAMPLING,
    FakeEncoder,
    FakeEngine,
    FakeRewardModel,
    Identity,
    prompt,
)

PROMPTS = [prompt("a"), prompt("bb")]
CELLS = cells(2, 5)
AUTO = DialSetting((None, None))
PROMPT_TOKENS = sum(len(f"user:question {name}") for name in ("a", "bb"))


def make(kind: str, engine: FakeEngine) -> Responder:
    args = {"sampling": SAMPLING}
    encoder = FakeEncoder()
    if kind == "tuned":
        return Tuned(engine, encoder, **args)
    if kind == "start":
        return Untouched(engine, encoder, **args)
    if kind == "prompting":
        return Prompting(engine, encoder, wording=Wording(Dials(ATTRIBUTES, 5)), **args)
    return Reranking(candidates(engine, 4), n=4, levels=5)


def candidates(engine: FakeEngine, n_max: int, stock: int | None = None) -> Candidates:
    models = {"helpfulness": FakeRewardModel(1), "safety": FakeRewardModel(2)}
    return Candidates(engine, FakeEncoder(), Scorer(models, Identity()), SAMPLING, n_max, stock)


def test_settings_draw_their_candidates_from_a_stock_without_replacement() -> None:
    engine = FakeEngine()
    shared = candidates(engine, 4, stock=10)
    drawn = shared.get(PROMPTS, CELLS, seed=7)
    assert [len(request.branches) for request in engine.requests] == [10, 10]
    for row in drawn:
        texts = [[sampled.text for sampled in items] for items, _ in row]
        assert all(len(set(four)) == 4 for four in texts)
        assert len({text for four in texts for text in four}) == 10
        assert len({tuple(four) for four in texts}) > 20  # each cell has a draw of its own
    again = candidates(FakeEngine(), 4, stock=10).get(PROMPTS[1:], CELLS[3:], seed=7)
    assert again == [drawn[1][3:]]


@pytest.mark.parametrize("kind", ["tuned", "start", "prompting", "rerank4"])
def test_every_responder_answers_every_cell_alike_in_any_chunk(kind: str) -> None:
    settings = [*CELLS, AUTO, DialSetting((2, None))]
    responder = make(kind, FakeEngine())
    assert responder.name == kind
    whole = responder.respond(PROMPTS, settings, seed=7)
    assert [[c.setting for c in row] for row in whole] == [settings] * 2
    assert [[c.prompt_id for c in row] for row in whole] == [[p.id] * 27 for p in PROMPTS]
    again = make(kind, FakeEngine())
    parts = [again.respond([p], settings, seed=7)[0] for p in PROMPTS]
    assert [[c.text for c in row] for row in parts] == [[c.text for c in row] for row in whole]
    assert again.tokens_through_model == responder.tokens_through_model
    other = make(kind, FakeEngine()).respond(PROMPTS, settings, seed=8)
    assert [c.text for c in other[0]] != [c.text for c in whole[0]]
    assert len({c.text for c in whole[0]}) > 10  # a fresh completion per cell


def test_tuned_prefills_once_and_controls_by_id() -> None:
    engine = FakeEngine()
    tuned = Tuned(engine, FakeEncoder(), sampling=SAMPLING)
    row = tuned.respond(PROMPTS[:1], [*CELLS, AUTO], seed=0)[0]
    (request,) = engine.requests
    assert len(request.branches) == 26
    assert request.branches[0].control_ids == (-2, -12)
    assert request.branches[25].control_ids == (-1, -11)
    assert len({branch.seed for branch in request.branches}) == 26
    assert row[0].n_tokens == 5  # four and the end token
    assert tuned.tokens_through_model == len("user:question a") + 26 * (2 + 5)


def test_untouched_never_hears_the_setting() -> None:
    engine = FakeEngine()
    start = Untouched(engine, FakeEncoder(), sampling=SAMPLING)
    start.respond(PROMPTS, CELLS, seed=0)
    assert {b.control_ids for r in engine.requests for b in r.branches} == {()}
    assert start.tokens_through_model == PROMPT_TOKENS + 2 * 25 * 5


def test_rerankers_of_two_n_share_one_pass_and_the_first_samples() -> None:
    engine = FakeEngine()
    shared = candidates(engine, 16)
    eight, sixteen = (Reranking(shared, n=n, levels=5) for n in (8, 16))
    few = eight.respond(PROMPTS, CELLS, seed=3)
    assert len(engine.requests) == 2  # one prefill per prompt
    assert len(engine.requests[0].branches) == 25 * 16
    rows = {a: m.rows for a, m in shared.scorer.reward_models.items()}
    many = sixteen.respond(PROMPTS, CELLS, seed=3)
    assert len(engine.requests) == 2
    assert {a: m.rows for a, m in shared.scorer.reward_models.items()} == rows
    alone = Reranking(candidates(FakeEngine(), 8), n=8, levels=5).respond(PROMPTS, CELLS, seed=3)
    assert [[c.text for c in row] for row in alone] == [[c.text for c in row] for row in few]
    assert all(c.sample_index < 8 for row in few for c in row)
    assert any(c.sample_index >= 8 for row in many for c in row)
    # Each counts what it would have cost alone.
    assert eight.tokens_through_model == PROMPT_TOKENS + 2 * 25 * 8 * 5
    assert sixteen.tokens_through_model == PROMPT_TOKENS + 2 * 25 * 16 * 5


def test_reranking_comes_nearer_with_n() -> None:
    shared = candidates(FakeEngine(), 64)

    def miss(n: int) -> float:
        rows = Reranking(shared, n=n, levels=5).respond(PROMPTS, CELLS, seed=0)
        return sum(
            (int(c.text[1 + a]) / 10 + 0.05 - (c.setting.levels[a] + 0.5) / 5) ** 2
            for row in rows
            for c in row
            for a in (0, 1)
        )

    assert miss(1) > 2 * miss(8) > 4 * miss(64)


def test_reranking_ranks_by_the_text_that_is_judged() -> None:
    class Cut(FakeEngine):
        def generate(self, requests: Any, sampling: Any) -> list[list[Sampled]]:
            return [
                [replace(item, text=f"{item.text}. And th", finish="length") for item in row]
                for row in super().generate(requests, sampling)
            ]

    class Whole(FakeRewardModel):
        def score(self, pairs: Sequence[tuple[Prompt, str]]) -> list[float]:
            assert all(text.endswith(".") for _, text in pairs)
            return super().score(pairs)

    shared = candidates(Cut(), 4)
    shared.scorer = Scorer({"helpfulness": Whole(1), "safety": Whole(2)}, Identity())
    kept = Reranking(shared, n=4, levels=5).respond(PROMPTS, CELLS, seed=0)
    # What is given is the whole text.
    assert {one.text[-6:] for row in kept for one in row} == {"And th"}


def test_nearest() -> None:
    units = [(0.1, 0.9), (0.9, 0.1), (0.9, 0.1), (0.5, 0.5)]
    assert nearest(units, DialSetting((4, 0)), 5) == 1  # ties to the first
    assert nearest(units, DialSetting((None, 4)), 5) == 0
    assert nearest(units, DialSetting((2, None)), 5) == 3
    assert nearest(units, AUTO, 5) == 0
    # (.8, .1) lies .1 from the target (.9, .1) and (1, .1) as well, up to float noise.
    assert nearest([(0.8, 0.1), (1.0, 0.1)], DialSetting((4, 0)), 5) == 0


@pytest.mark.parametrize("n", [0, 5])
def test_reranking_refuses_an_n_it_cannot_have(n: int) -> None:
    with pytest.raises(ValueError, match=r"1\.\.4"):
        Reranking(candidates(FakeEngine(), 4), n=n, levels=5)


@pytest.mark.parametrize("scores", [[0.5], [float("nan")] * 1000])
def test_reranking_stops_at_a_broken_reward_model(scores: list[float]) -> None:
    class Broken(FakeRewardModel):
        def score(self, pairs: Sequence[tuple[Prompt, str]]) -> list[float]:
            return scores[: len(pairs)]

    shared = candidates(FakeEngine(), 4)
    shared.scorer = Scorer({"helpfulness": Broken()}, Identity())
    with pytest.raises(RewardError, match="returned"):
        Reranking(shared, n=4, levels=5).respond(PROMPTS, CELLS, seed=0)


def wording(**args: Any) -> Wording:
    return Wording(Dials(ATTRIBUTES, 5), **args)


def test_prompting_appends_to_the_last_user_turn() -> None:
    chat = Prompt(
        "x",
        (
            Message("system", "S"),
            Message("user", "u1"),
            Message("assistant", "a1"),
            Message("user", "u2"),
        ),
        "test",
    )
    phrases = {name: [f"{name}{level}." for level in range(5)] for name in ATTRIBUTES}
    said = wording(phrases=phrases).messages(chat, DialSetting((4, 0)))
    assert said[:3] == chat.messages[:3]
    assert said[3] == Message("user", "u2 helpfulness4. safety0.")
    assert wording(phrases=phrases).messages(chat, DialSetting((None, 2)))[3].content == (
        "u2 safety2."
    )
    assert wording().messages(chat, AUTO) == chat.messages
    system = wording(phrases=phrases, placement="system").messages(chat, DialSetting((4, 0)))
    assert system == (Message("system", "S\n\nhelpfulness4. safety0."), *chat.messages[1:])
    bare = wording(placement="system")
    assert bare.messages(PROMPTS[0], AUTO) == PROMPTS[0].messages


def test_prompting_pays_a_prefill_per_setting() -> None:
    engine = FakeEngine()
    responder = Prompting(engine, FakeEncoder(), sampling=SAMPLING, wording=wording())
    responder.respond(PROMPTS, CELLS, seed=0)
    assert len(engine.requests) == 50
    prefilled = sum(len(request.prompt_ids) for request in engine.requests)
    assert responder.tokens_through_model == prefilled + 50 * 5
    assert len({request.prompt_ids for request in engine.requests}) == 50


@pytest.mark.parametrize("levels", [2, 3, 5, 7, 11])
@pytest.mark.parametrize("attribute", ["helpfulness", "safety", "brevity"])
def test_built_in_phrases_differ_by_level(attribute: str, levels: int) -> None:
    phrases = built_in_phrases(attribute, levels)
    assert len(phrases) == len(set(phrases)) == levels


def example(name: str, text: str, helpfulness: float, safety: float) -> ControlledExample:
    unit = {"helpfulness": helpfulness, "safety": safety}
    return ControlledExample(prompt(name, split="train"), DialSetting((0, 0)), text, True, unit)


def test_in_context_examples_are_the_nearest_one_per_prompt_nearest_last() -> None:
    pool = [
        example("p", "far", 0.1, 0.1),
        example("p", "exact", 0.9, 0.1),
        example("q", "near", 0.8, 0.2),
        example("p", "also exact", 0.9, 0.1),
        example("r", "safe", 0.1, 0.9),
    ]
    phrases = {name: [f"{name[0]}{level}" for level in range(5)] for name in ATTRIBUTES}
    said = wording(phrases=phrases, examples=pool, in_context=2).messages(
        PROMPTS[0], DialSetting((4, 0))
    )
    assert [message.content for message in said] == [
        "question q h4 s0",
        "near",
        "question p h4 s0",
        "exact",
        "question a h4 s0",
    ]
    one = wording(phrases=phrases, examples=pool, in_context=1)
    assert one.messages(PROMPTS[0], DialSetting((None, 4)))[1].content == "safe"


def test_prompting_refuses_what_it_cannot_say() -> None:
    with pytest.raises(ConfigError, match="safety"):
        wording(phrases={"safety": ["a", "b"]})
    with pytest.raises(ConfigError, match="safty"):
        wording(phrases={"safty": ["a"] * 5})
    with pytest.raises(DataError, match="3 examples"):
        wording(in_context=3, examples=[example("p", "x", 0.1, 0.1)] * 5)
