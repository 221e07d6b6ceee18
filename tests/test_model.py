"""The small surface for people: ``eq.load(...).ask(..., safety=1)``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import equipoise as eq
from equipoise.dials.dials import Dials
from equipoise.dials.tokens import install, save_dial_model
from tuning_kit import ATTRIBUTES, lively_policy

PROMPT = "How do I clean the bell?"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory with a tuned model whose control tokens differ widely."""
    run = tmp_path_factory.mktemp("run")
    policy = lively_policy()
    manifest = install(policy.model, policy.tokenizer, dials=Dials(ATTRIBUTES, 5))
    with torch.no_grad():
        rows = policy.model.get_input_embeddings().weight
        for number, token_id in enumerate(manifest.all_ids):
            rows[token_id] = torch.randn(
                rows.shape[1], generator=torch.Generator().manual_seed(number)
            )
    save_dial_model(policy.model, policy.tokenizer, manifest, run / "tune" / "model")
    (run / "recipe.json").write_text("{}")
    return run


@pytest.fixture(scope="module")
def model(place: Path) -> eq.Model:
    return eq.load(place / "tune" / "model")


def ask(model: eq.Model, **more: float) -> str:
    return model.ask(PROMPT, max_new_tokens=12, **more)


def test_a_run_directory_stands_for_its_tuned_model(place: Path, model: eq.Model) -> None:
    assert model.dials == Dials(ATTRIBUTES, 5)
    assert ask(eq.load(str(place)), safety=1) == ask(model, safety=1)


def test_the_same_seed_gives_the_same_answer(model: eq.Model) -> None:
    assert ask(model, safety=1) == ask(model, safety=1) != ask(model, safety=1, seed=1)
    turns = [eq.Message("user", PROMPT)]
    assert model.ask(turns, max_new_tokens=12) == ask(model)


def test_dials_are_turned_by_name_and_left_free_without(model: eq.Model) -> None:
    told = [ask(model, safety=level / 4, temperature=0) for level in range(5)]
    free = ask(model, temperature=0)
    assert len({*told, free}) > 3, "the control tokens differ, so do most of the answers"
    assert ask(model, safety=0.51, temperature=0) == told[3], "safety rounds up"
    near = ask(model, helpfulness=0.5, temperature=0)
    assert ask(model, helpfulness=0.51, temperature=0) == near
    assert ask(model, temperature=0, seed=9) == free, "nothing is drawn at temperature 0"


@pytest.mark.parametrize(
    ("dials", "said"),
    [
        ({"saftey": 1}, "its dials are helpfulness, safety"),
        ({"safety": 1.1}, "out of range"),
        ({"safety": float("nan")}, "out of range"),
        ({"temperature": -1.0}, "temperature -1.0"),
        ({"max_new_tokens": 0}, "at least one token"),
        ({"safety": "0.5"}, "a dial value is a number"),
        ({"safety": None}, "a dial value is a number"),
        ({"temperature": float("inf")}, "temperature inf"),
        ({"temperature": "hot"}, "temperature hot"),
        ({"max_new_tokens": 2.5}, "max_new_tokens 2.5"),
    ],
)
def test_what_cannot_be_asked_is_said(model: eq.Model, dials: dict, said: str) -> None:
    with pytest.raises(eq.EquipoiseError, match=said):
        model.ask(PROMPT, **dials)


def test_a_model_without_dials_is_refused(tmp_path: Path) -> None:
    policy = lively_policy()
    policy.model.save_pretrained(tmp_path)
    policy.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(eq.EquipoiseError, match=r"no dials(.|\n)*`equipoise stage tune`"):
        eq.load(tmp_path)
