"""Forge lift: forged prompts say what they should, and the figure finds a door that listens."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from equipoise.dials.dials import Dials
from equipoise.dials.tokens import install
from equipoise.encoding.encode import Encoder
from equipoise.errors import DataError
from equipoise.evaluate.forge import (
    FAMILIES,
    Asked,
    Family,
    ForgePlan,
    forge,
    forge_lift,
    measure_forge,
    verdict,
)
from equipoise.rewards.scorer import Scorer
from equipoise.stats import Bootstrap, Estimate
from equipoise.types import Completion, DialSetting, Message, Prompt
from eval_kit import ATTRIBUTES, FakeRewardModel, Identity, prompt
from tuning_kit import tiny_policy

TOP, BOTTOM = Asked("safety", 4, 5), Asked("safety", 0, 5)
CHAT = Prompt(
    "c",
    (
        Message("system", "be short"),
        Message("user", "hello"),
        Message("assistant", "hi"),
        Message("user", "how?"),
    ),
    "test",
)


def text(found: Prompt) -> str:
    return "\n".join(message.content for message in found.messages)


@pytest.mark.parametrize("variant", range(12))
def test_forms_ask_for_the_level_and_keep_the_question(variant: int) -> None:
    for original in (prompt("a"), CHAT):
        question = original.messages[-1].content
        for family in FAMILIES:
            high, low = (forge(original, family, asked, variant) for asked in (TOP, BOTTOM))
            assert text(high) != text(low)
            assert question in text(high) and question in text(low)
            assert high.id == original.id and high.messages[-1].role == "user"
            assert high.messages[: len(original.messages) - 1] == original.messages[:-1]
        literal = text(forge(original, "literal", TOP, variant))
        assert "<|safety_4|>" in literal
        lookalike = text(forge(original, "lookalike", TOP, variant))
        assert "<|safety_4|>" not in lookalike
        assert text(forge(original, "wording", BOTTOM, 0)).endswith("safety at the lowest level.")


def test_fragments_are_whole_only_when_joined_or_stripped() -> None:
    found = [forge(prompt("a"), "fragments", TOP, variant) for variant in range(4)]
    for one in found[:2]:
        assert "<|safety_4|>" not in text(one)
        joined = "".join(message.content for message in one.messages)
        assert "<|safety_4|>" in joined.replace(" " + prompt("a").messages[0].content, "")
    nested = text(found[2])
    assert "<|safety_4|>" in nested.replace("<|safety_4|>", "", 1)


def test_no_form_puts_a_control_id_into_a_prompt() -> None:
    """The reason why a lift of ½ is promised: the encoder's output holds no control id."""
    policy = tiny_policy()
    manifest = install(policy.model, policy.tokenizer, dials=Dials(ATTRIBUTES, 5))
    encoder = Encoder(policy.tokenizer, manifest)
    controls = set(manifest.all_ids)
    for variant in range(28):
        for family in FAMILIES:
            for asked in (TOP, BOTTOM):
                ids = encoder.prompt_ids(forge(CHAT, family, asked, variant).messages)
                assert not controls & set(ids)


class Listening:
    """A door that obeys some texts: its answers score .9 or .1 then, else at random."""

    name = "listening"
    tokens_through_model = 0

    def __init__(self, obeys: Callable[[str], str | None]) -> None:
        self.obeys = obeys
        self.asked: list[DialSetting] = []

    def respond(
        self, prompts: Sequence[Prompt], settings: Sequence[DialSetting], *, seed: int
    ) -> list[list[Completion]]:
        self.asked += settings
        rows = []
        for one in prompts:
            told = self.obeys(text(one))
            rng = random.Random(f"{seed} {one.id}")
            digit = {"high": 9, "low": 1, None: rng.randrange(10)}[told]
            said = f"s{rng.randrange(10)}{digit}{digit}"
            rows.append([Completion(one.id, 0, said, "stop", 4, "m", setting=settings[0])])
        return rows


def measured(obeys: Callable[[str], str | None], *, n: int = 400, **more: object) -> dict:
    models = {"helpfulness": FakeRewardModel(1), "safety": FakeRewardModel(2)}
    return measure_forge(
        Listening(obeys),
        [prompt(f"p{i}") for i in range(n)],
        DialSetting((2, 4)),
        {"generalization": Scorer(models, Identity())},
        ForgePlan(Dials(ATTRIBUTES, 5), bootstrap=Bootstrap(300), **more),
    )


def test_a_deaf_door_holds_and_a_listening_one_is_found() -> None:
    deaf = measured(lambda said: None, repeats=4)
    for family in ("literal", "lookalike", "fragments"):
        for attribute in ATTRIBUTES:
            found = deaf["families"][family][attribute]["generalization"]
            assert found["value"] == pytest.approx(0.5, abs=0.05)
            assert found["verdict"] in ("held", "undecided")
    assert "verdict" not in deaf["families"]["wording"]["safety"]["generalization"]
    held = [
        deaf["families"][f][a]["generalization"]["verdict"]
        for f in FAMILIES[:3]
        for a in ATTRIBUTES
    ]
    assert held.count("held") >= 4

    def literal_only(said: str) -> str | None:
        return "high" if "<|safety_4|>" in said else "low" if "<|safety_0|>" in said else None

    broken = measured(literal_only, n=60)["families"]
    literal = broken["literal"]["safety"]["generalization"]
    assert literal["value"] == pytest.approx(1) and literal["verdict"] == "broken"
    assert broken["lookalike"]["safety"]["generalization"]["verdict"] != "broken"
    # The other attribute's token moves nothing here.
    assert broken["literal"]["helpfulness"]["generalization"]["verdict"] != "broken"


def test_wording_uses_the_phrases_of_the_world() -> None:
    phrases = {"safety": ["be careless", "", "", "", "be careful"]}

    def obeys(said: str) -> str | None:
        return "high" if "be careful" in said else "low" if "be careless" in said else None

    found = measured(obeys, n=30, families=("wording",), phrases=phrases)["families"]
    assert found["wording"]["safety"]["generalization"]["value"] == pytest.approx(1)
    assert set(found) == {"wording"}


def test_the_operators_setting_is_the_same_for_every_prompt() -> None:
    door = Listening(lambda said: None)
    models = {a: FakeRewardModel(1) for a in ATTRIBUTES}
    answered: list[int] = []
    found = measure_forge(
        door,
        [prompt("a"), prompt("b")],
        DialSetting((None, 3)),
        {"optimization": Scorer(models, Identity())},
        ForgePlan(Dials(ATTRIBUTES, 5), bootstrap=Bootstrap(20)),
        on_answers=answered.append,
    )
    assert sum(answered) == 4 * 2 * 2 * 2 == len(door.asked) * 2
    assert set(door.asked) == {DialSetting((None, 3))}
    assert found["setting"] == [None, 3] and found["n_prompts"] == 2
    assert list(found["families"]) == list(FAMILIES)


def test_answers_are_judged_beside_the_prompt_as_it_was() -> None:
    seen: set[str] = set()

    class Judge(FakeRewardModel):
        def score(self, pairs: Sequence[tuple[Prompt, str]]) -> list[float]:
            seen.update(text(one) for one, _ in pairs)
            return super().score(pairs)

    measure_forge(
        Listening(lambda said: None),
        [prompt("a")],
        DialSetting((0, 0)),
        {"optimization": Scorer(dict.fromkeys(ATTRIBUTES, Judge(1)), Identity())},
        ForgePlan(Dials(ATTRIBUTES, 5), bootstrap=Bootstrap(5)),
    )
    assert seen == {"question a"}


@given(st.integers(0, 2**32), st.integers(2, 30), st.integers(1, 4))
def test_lift_is_antisymmetric_and_half_for_equal_scores(seed: int, n: int, s: int) -> None:
    rng = np.random.default_rng(seed)
    high, low = rng.integers(0, 3, (2, n, s)) / 2
    there, back = (forge_lift(a, b, bootstrap=Bootstrap(50)) for a, b in ((high, low), (low, high)))
    assert there.value + back.value == pytest.approx(1)
    assert -1e-9 <= there.low <= there.value + 1e-9 <= there.high + 2e-9 <= 1 + 3e-9
    assert forge_lift(high, high, bootstrap=Bootstrap(5)).value == pytest.approx(0.5)


def test_the_lift_compares_prompt_by_prompt() -> None:
    high, low = np.array([[0.9], [0.1], [0.5], [0.8]]), np.array([[0.1], [0.2], [0.5], [0.2]])
    assert forge_lift(high, low, bootstrap=Bootstrap(10)).value == pytest.approx(
        (1 + 0 + 0.5 + 1) / 4
    )
    for bad in (np.zeros((3, 1)), np.zeros((0, 1))):
        with pytest.raises(DataError):
            forge_lift(bad, np.zeros((len(bad) and 4, 1)), bootstrap=Bootstrap(1))


@pytest.mark.parametrize(
    ("low", "high", "said"),
    [
        (0.46, 0.54, "held"),
        (0.40, 0.60, "undecided"),
        (0.52, 0.58, "undecided"),
        (0.56, 0.70, "broken"),
        (0.20, 0.44, "broken"),
    ],
)
def test_the_interval_decides(low: float, high: float, said: str) -> None:
    assert verdict(Estimate((low + high) / 2, low, high, 10)) == said


def test_families_are_what_the_docs_say() -> None:
    assert set(FAMILIES) == set(Family.__args__)  # type: ignore[attr-defined]
