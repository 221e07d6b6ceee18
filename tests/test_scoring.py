"""Live scores fail closed, keep their order, and come from the models that the manifest names."""

from __future__ import annotations

import asyncio
import json
import math
import shutil
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from equipoise.config import RewardModelConfig
from equipoise.dials.manifest import DialManifest
from equipoise.engine.seam import Sampled
from equipoise.errors import ConfigError, ServingError
from equipoise.models.hub import model_hash
from equipoise.rewards.load import reward_hash
from equipoise.rewards.scorer import Scorer
from equipoise.serve.scorer import LiveScorer, ScorerUnavailableError, load_scorer
from equipoise.types import DialSetting, Finish, Message, Prompt
from eval_kit import Identity
from pipeline_kit import ATTRIBUTES, save_reward_model, tiny_recipe

ASKED = (Message("user", "how do i mend the kettle ?"),)


@dataclass
class Scripted:
    """Scores an answer with the number written in it."""

    place: int
    name: str = "scripted"
    hash: str = "hash"
    seen: list[str] = field(default_factory=list)

    def score(self, pairs: Sequence[tuple[Prompt, str]]) -> list[float]:
        self.seen += [text for _, text in pairs]
        return [float(text.split()[self.place]) for _, text in pairs]


def scorer(**models: Any) -> LiveScorer:
    found = models or {"helpfulness": Scripted(0), "safety": Scripted(1)}
    return LiveScorer(Scorer(found, Identity()), levels=5, timeout=5.0)


def run(live: LiveScorer, answers: Sequence[tuple[str, Finish]]) -> list[dict[str, float]]:
    return asyncio.run(live.score(ASKED, [Sampled((), *answer) for answer in answers]))


def test_scores_come_in_order_and_once_per_text() -> None:
    models = {"helpfulness": Scripted(0), "safety": Scripted(1)}
    answers = [(f"{i / 10} {1 - i / 10}", "stop") for i in (3, 9, 3, 0)]
    units = run(scorer(**models), answers)
    assert [unit["helpfulness"] for unit in units] == pytest.approx([0.3, 0.9, 0.3, 0.0])
    assert [unit["safety"] for unit in units] == pytest.approx([0.7, 0.1, 0.7, 1.0])
    assert list(units[0]) == ["helpfulness", "safety"]
    assert len(models["safety"].seen) == 3


def test_a_cut_answer_is_scored_to_its_last_sentence() -> None:
    model = Scripted(0)
    live = LiveScorer(Scorer({"safety": model}, Identity()), levels=5)
    run(live, [("0.5 it is. And then", "length"), ("0.5 it is. And then", "stop"), ("1", "length")])
    assert model.seen == ["0.5 it is.", "0.5 it is. And then", "1"]


def test_the_nearest_answer_is_kept() -> None:
    live = scorer()
    units = [{"helpfulness": h, "safety": s} for h, s in ((0.1, 0.9), (0.9, 0.9), (0.9, 0.1))]
    assert live.ranked(units, DialSetting((4, 4)))[0] == 1
    assert live.ranked(units, DialSetting((None, 0)))[0] == 2
    assert live.ranked(units, DialSetting((None, 4)))[0] == 0  # a tie goes to the first
    assert live.ranked(units, DialSetting((None, None)))[0] == 0


class Broken:
    """A reward model that breaks its contract in one of many ways."""

    name = hash = "broken"

    def __init__(self, how: Any) -> None:
        self.how = how

    def score(self, pairs: Sequence[tuple[Prompt, str]]) -> list[float]:
        if isinstance(self.how, Exception):
            raise self.how
        return self.how  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "how",
    [
        OSError("reset"),
        TimeoutError(),
        ValueError("bad JSON"),
        MemoryError(),
        [],
        [0.1, 0.2],
        [math.nan],
        [math.inf],
        [None],
        ["0.5"],
        None,
        0.5,
    ],
    ids=repr,
)
def test_every_fault_of_a_scorer_is_one_error_and_no_score(how: Any) -> None:
    live = scorer(helpfulness=Scripted(0), safety=Broken(how))
    with pytest.raises(ScorerUnavailableError) as caught:
        run(live, [("0.5 0.5", "stop")])
    assert isinstance(caught.value, ServingError)
    assert "reset" not in str(caught.value) and "0.5" not in str(caught.value)


def test_a_scale_that_leaves_its_range_is_a_fault_too() -> None:
    class Wild:
        def unit(self, attribute: str, raw: float) -> float:
            return 1.5

    live = LiveScorer(Scorer({"safety": Scripted(0)}, Wild()), levels=5)
    with pytest.raises(ScorerUnavailableError):
        run(live, [("0.5", "stop")])


def test_a_scorer_that_hangs_is_given_up_and_holds_nobody_up() -> None:
    free = threading.Event()

    class Hanging(Scripted):
        def score(self, pairs: Sequence[tuple[Prompt, str]]) -> list[float]:
            free.wait(30)
            return super().score(pairs)

    live = LiveScorer(Scorer({"safety": Hanging(0)}, Identity()), levels=5, timeout=0.05)
    try:
        with pytest.raises(ScorerUnavailableError):
            asyncio.run(live.score(ASKED, [Sampled((), "0.5", "stop")]))
    finally:
        free.set()
        live.close()


def manifest(hashes: dict[str, str] | None, **changes: Any) -> DialManifest:
    scale = {
        "mode": "pooled",
        "pool_hash": "p",
        "scores": {a: [-1.0, 0.0, 1.0] for a in ATTRIBUTES},
    }
    fields: dict[str, Any] = {
        "attributes": ATTRIBUTES,
        "levels": 3,
        "token_ids": {"helpfulness": (1, 2, 3), "safety": (5, 6, 7)},
        "auto_ids": {"helpfulness": 4, "safety": 8},
        "tokenizer_hash": "t",
        "tied": True,
        "calibration": scale,
        "reward_models": hashes,
        **changes,
    }
    return DialManifest(**fields)


@pytest.fixture
def run_dir(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A run directory with a recipe and two reward models, and their hashes."""
    assets = tmp_path / "assets"
    assets.mkdir()
    hashes = {}
    for name, attribute, seed in (("rm_hp", "helpfulness", 1), ("rm_sf", "safety", 2)):
        config = RewardModelConfig(model=str(save_reward_model(assets / name, seed=seed)))
        hashes[attribute] = reward_hash(config, fitted_root=None)
    place = tmp_path / "run"
    (place / "tune" / "model").mkdir(parents=True)
    (place / "recipe.json").write_text(json.dumps(tiny_recipe(assets)), "utf-8")
    return place, hashes


def test_the_models_of_the_manifest_are_found_in_its_run(
    run_dir: tuple[Path, dict[str, str]], tmp_path: Path
) -> None:
    place, hashes = run_dir
    live = load_scorer(place / "tune" / "model", manifest(hashes))
    (unit,) = run(live, [("mend the kettle .", "stop")])
    assert set(unit) == set(ATTRIBUTES) and all(0 <= value <= 1 for value in unit.values())
    elsewhere = tmp_path / "copied"
    shutil.copytree(place / "tune" / "model", elsewhere)
    again = load_scorer(elsewhere, manifest(hashes), run=place)
    assert run(again, [("mend the kettle .", "stop")]) == [unit]
    with pytest.raises(ConfigError, match="lies in no run directory"):
        load_scorer(elsewhere, manifest(hashes))


@pytest.mark.parametrize(
    "changed",
    [{"sign": -1}, {"max_length": 64}, {"format": "pair"}],
    ids=lambda one: next(iter(one)),
)
def test_a_reward_model_read_otherwise_is_refused(
    run_dir: tuple[Path, dict[str, str]], changed: dict[str, Any]
) -> None:
    place, hashes = run_dir
    recipe = json.loads((place / "recipe.json").read_text("utf-8"))
    recipe["reward_models"]["safety"].update(changed)
    (place / "recipe.json").write_text(json.dumps(recipe), "utf-8")
    with pytest.raises(ConfigError, match="cannot be scored live") as caught:
        load_scorer(place / "tune" / "model", manifest(hashes))
    assert "reward model for safety" in caught.value.why


def test_a_manifest_of_before_is_refused_with_the_command_that_writes_it_anew(
    run_dir: tuple[Path, dict[str, str]],
) -> None:
    place, _ = run_dir
    files = {name: model_hash(str(place.parent / "assets" / folder))
             for name, folder in (("helpfulness", "rm_hp"), ("safety", "rm_sf"))}  # fmt: skip
    with pytest.raises(ConfigError, match="cannot be scored live") as caught:
        load_scorer(place / "tune" / "model", manifest(files))
    assert "names the files of the reward model for helpfulness" in caught.value.why
    assert caught.value.fix == f"write it anew: `equipoise stage tune {place} --fresh`"


@pytest.mark.parametrize("fault", ["none", "no scale", "swapped", "missing"])
def test_other_models_than_the_named_ones_are_refused(
    run_dir: tuple[Path, dict[str, str]], fault: str
) -> None:
    place, hashes = run_dir
    given = {
        "none": manifest(None),
        "no scale": manifest(hashes, calibration=None),
        "swapped": manifest({"helpfulness": hashes["safety"], "safety": hashes["helpfulness"]}),
        "missing": manifest({"helpfulness": hashes["helpfulness"]}),
    }[fault]
    with pytest.raises(ConfigError, match="cannot be scored live"):
        load_scorer(place / "tune" / "model", given)
