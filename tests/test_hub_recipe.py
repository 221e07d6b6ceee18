"""``hub-8b`` by proxy: the whole recipe, each model of two layers, each data set of ten rows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from equipoise import load_causal
from equipoise.cli.forge import served
from equipoise.cli.main import main
from equipoise.dials.dials import Dials
from equipoise.errors import ModelError
from equipoise.policy.file import find_policy, load_policy
from equipoise.recipes.load import load_recipe
from hub_kit import COMMIT, add_model, build_hub, offline
from hub_models import MODELS, POLICY, save_llama
from hub_rows import SETS
from pipeline_kit import blank_pictures
from serve_kit import call

SMALLER = (
    "prompts.n_dev=2",
    "fit_reward.safety.held_out=2",
    "fit_reward.safety_judge.held_out=2",
    "generate.completions_per_prompt=8",
    "generate.sampling.max_tokens=32",
    "tune.steps=2",
    "tune.batch_size=4",
    "tune.checkpoint_every=2",
    "evaluate.sampling.max_tokens=12",
    "evaluate.max_prompts=2",
    "evaluate.bootstrap=20",
    "evaluate.fluency_prompts=2",
)
"""Names, formats, kinds and methods are the recipe's own; only its budget is cut."""


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    root = build_hub(tmp_path_factory.mktemp("hub"))
    with offline(root):
        yield root


@pytest.fixture(scope="module")
def run(hub: Path) -> Path:
    overrides = [word for line in SMALLER for word in ("--set", line)]
    with blank_pictures(), pytest.raises(SystemExit) as ended:
        main(["run", "hub-8b", "--dir", str(hub / "run"), *overrides, "--debug"])
    assert not ended.value.code
    return hub / "run"


def test_every_name_of_the_recipe_has_its_proxy() -> None:
    recipe = load_recipe("hub-8b", overrides=[], data=None)
    scored = [*recipe.reward_models.values(), *recipe.judges.values()]
    named = {recipe.model, *(one.model for one in scored)}
    named |= {one.backbone for one in recipe.fit_reward.values()}
    assert {name for name in named if "://" not in name} == set(MODELS)
    sources = [*recipe.prompts.train, *recipe.prompts.test]
    sources += [source for one in recipe.fit_reward.values() for source in one.sources]
    assert {(source.source, source.split) for source in sources} == {
        (name, split) for name, splits in SETS.items() for split in splits
    }


def test_it_runs_to_its_report(run: Path) -> None:
    assert (run / "report/report.html").is_file()
    report = json.loads((run / "report/report.json").read_text())
    assert set(report["methods"]) == {"start", "prompting", "rerank8", "tuned"}


def test_the_plan_knows_the_size_of_hub_models(run: Path) -> None:
    plan = json.loads((run / "plan.json").read_text())
    assert all(plan[stage] > 0 for stage in ("fit-reward", "score", "judge"))


def test_the_adapter_names_the_commit_of_its_base(run: Path) -> None:
    spec = json.loads((run / "tune/model/adapter_config.json").read_text())
    assert (spec["base_model_name_or_path"], spec["revision"]) == (POLICY, COMMIT)
    assert spec["r"] == 16


def test_two_dial_settings_are_served(run: Path) -> None:
    file = find_policy(Path("example"))
    loaded = load_causal(str(run / "tune/model"))
    policy = load_policy(file, Dials(("helpfulness", "safety"), 5))
    with served(loaded, file, policy) as (url, key):
        port = int(url.rpartition(":")[2])
        for safety in (0.5, 1.0):
            body = {
                "model": "model@general",
                "messages": [{"role": "user", "content": "How do I mend the ember lamp?"}],
                "max_tokens": 24,
                "n": 4,
                "dials": {"safety": safety},
            }
            reply = call(port, "POST", "/v1/chat/completions", body, key=key)
            assert reply.status == 200, reply.body
            choices = reply.json["choices"]
            assert {choice["finish_reason"] for choice in choices} <= {"stop", "length"}
            assert any(choice["message"]["content"].strip() for choice in choices)


def test_a_base_that_moved_on_is_still_found_at_its_commit(
    run: Path, hub: Path, request: pytest.FixtureRequest
) -> None:
    adapter = str(run / "tune/model")
    before = load_causal(adapter)
    main_file = hub / "hub" / f"models--{POLICY.replace('/', '--')}" / "refs/main"
    request.addfinalizer(lambda: main_file.write_text(COMMIT))
    newer = add_model(hub, POLICY, "f" * 40, lambda folder: save_llama(folder, taught=False))
    assert load_causal(POLICY).revision == newer.name
    after = load_causal(adapter)
    assert after.hash == before.hash
    ids: Any = torch.tensor([[5, 6, 7, *before.manifest.all_ids]])  # type: ignore[union-attr]
    with torch.no_grad():
        assert torch.equal(after.model(ids).logits, before.model(ids).logits)
    older = newer.parent / COMMIT
    request.addfinalizer(lambda: (newer.parent / "away").rename(older))
    older.rename(newer.parent / "away")
    with pytest.raises(ModelError, match=f"{POLICY} at revision {COMMIT}"):
        load_causal(adapter)
