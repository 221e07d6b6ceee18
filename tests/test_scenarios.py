"""Scenarios: settings by the server's own function, paired figures, one drawing, the command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from equipoise.cli.main import main
from equipoise.dials.dials import Dials
from equipoise.errors import ConfigError, DataError
from equipoise.evaluate.forge import BOUNDED, verdict
from equipoise.evaluate.scenarios import (
    ScenariosReport,
    measure_scenarios,
    scenario_settings,
)
from equipoise.policy.file import load_policy
from equipoise.stages.scenarios import scenario_table
from equipoise.stats import Bootstrap, Estimate
from equipoise.store.shards import from_plain, to_plain
from equipoise.types import DialSetting
from eval_kit import ATTRIBUTES, deliveries_from, noisy_policy
from pipeline_kit import blank_pictures, save_assets, tiny_recipe, write_recipe

POLICY = {
    "version": 1,
    "default_scenario": "kids",
    "scenarios": {
        "kids": {
            "why": "children",
            "ranges": {"safety": {"min": 1.0}, "helpfulness": {}},
            "default": {"safety": 1.0, "helpfulness": 0.5},
        },
        "lab": {
            "why": "trained people",
            "ranges": {"safety": {}, "helpfulness": {}},
            "default": {"safety": 0.0, "helpfulness": "auto"},
        },
    },
}


def write_policy(folder: Path, **changes: object) -> Path:
    file = folder / "policy.yaml"
    file.write_text(yaml.safe_dump({**POLICY, **changes}), "utf-8")
    return file


def test_settings_are_what_the_server_would_give(tmp_path: Path) -> None:
    policy = load_policy(write_policy(tmp_path), Dials(ATTRIBUTES, 5))
    assert scenario_settings(policy, Dials(ATTRIBUTES, 5)) == {
        "kids": {"default": DialSetting((2, 4)), "loosest": DialSetting((4, 4))},
        "lab": {"default": DialSetting((None, 0)), "loosest": DialSetting((4, 0))},
    }
    example = load_policy("example", Dials(ATTRIBUTES, 5))
    for stands in scenario_settings(example, Dials(ATTRIBUTES, 5)).values():
        safety = [stands[stand].levels[1] for stand in ("default", "loosest")]
        assert None not in safety and safety[0] >= safety[1]  # type: ignore[operator]


def test_a_scenario_without_a_setting_is_named(tmp_path: Path) -> None:
    policy = load_policy(write_policy(tmp_path), Dials(ATTRIBUTES, 5))
    with pytest.raises(ConfigError, match="kids"):
        scenario_settings(policy, Dials((*ATTRIBUTES, "tone"), 5))


GOOD = {
    "kids": {"default": DialSetting((2, 4)), "loosest": DialSetting((4, 4))},
    "lab": {"default": DialSetting((2, 0)), "loosest": DialSetting((4, 0))},
}


def test_means_and_differences_are_those_of_the_same_prompts() -> None:
    unit = noisy_policy(repeats=2, prompts=50, levels=5, gain=(0.9, 0.9), noise=0.1, seed=1)
    measured = measure_scenarios(
        GOOD, deliveries_from(unit, levels=5), dials=Dials(ATTRIBUTES, 5), bootstrap=Bootstrap(200)
    )
    kids = measured.scenarios["kids"]
    column = {(2, 4): 14, (4, 4): 24, (2, 0): 10, (4, 0): 20}
    safety = kids.default.delivered["generalization"]["safety"]
    assert safety.value == pytest.approx(unit[:, :, column[2, 4], 1].mean())
    assert safety.low < safety.value < safety.high and safety.n == 50
    assert kids.default.target == {"helpfulness": 0.5, "safety": 0.9}
    opened = kids.opened["optimization"]["helpfulness"]
    wanted = unit[:, :, column[4, 4], 0] - unit[:, :, column[2, 4], 0]
    assert opened.value == pytest.approx(wanted.mean())
    lab = measured.scenarios["lab"].default.delivered["generalization"]["safety"]
    assert lab.high < safety.low
    assert (measured.n_prompts, measured.judges) == (50, ("generalization", "optimization"))


def test_a_missing_setting_is_an_error_not_a_hole() -> None:
    rows = deliveries_from(np.zeros((1, 3, 25, 2)), levels=5)
    rows = [row for row in rows if (row.prompt_id, row.setting) != ("p001", DialSetting((4, 0)))]
    with pytest.raises(DataError, match="missing"):
        measure_scenarios(GOOD, rows, dials=Dials(ATTRIBUTES, 5), bootstrap=Bootstrap(5))


def test_the_table_has_a_row_per_setting_and_says_what_was_asked_for() -> None:
    unit = noisy_policy(repeats=1, prompts=30, levels=5, gain=(0.9, 0.9), noise=0.1, seed=1)
    auto = {**GOOD, "lab": {**GOOD["lab"], "default": DialSetting((None, 0))}}
    rows = deliveries_from(unit, levels=5)
    rows += [replace(r, setting=DialSetting((None, 0))) for r in rows if r.setting.levels == (0, 0)]
    measured = measure_scenarios(auto, rows, dials=Dials(ATTRIBUTES, 5), bootstrap=Bootstrap(50))
    assert from_plain(ScenariosReport, json.loads(json.dumps(to_plain(measured)))) == measured
    head, _, kids, opened, lab, _ = scenario_table(measured).splitlines()
    assert "helpfulness, asked | helpfulness, delivered | safety, asked" in head
    found = measured.scenarios["kids"].default.delivered["generalization"]["safety"]
    said = f"{found.value:.2f} ({found.low:.2f} to {found.high:.2f})"
    assert kids.startswith("| kids | default | 0.50 |") and kids.endswith(f"| 0.90 | {said} |")
    assert opened.startswith("| kids | least safe | 0.90 |")
    assert lab.startswith("| lab | default | auto |")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run in miniature up to evaluate."""
    root = tmp_path_factory.mktemp("scenarios")
    recipe = tiny_recipe(save_assets(root / "assets"))
    file = write_recipe(root / "recipe.yaml", recipe)
    with pytest.raises(SystemExit) as ended, blank_pictures():
        main(["run", str(file), "--dir", str(root / "run")])
    assert not ended.value.code
    yield root


def command(*arguments: str | Path) -> int:
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return int(ended.value.code or 0)


def test_the_command_takes_what_is_there_and_samples_the_rest(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy = write_policy(tmp_path)  # lab's default has an auto, which this run did not sweep
    assert command("stage", "scenarios", finished / "run", "--policy", policy) == 0
    place = finished / "run" / "scenarios" / "policy"
    assert str(place) in capsys.readouterr().out
    assert {item.name for item in place.iterdir()} == {
        "scenarios.json",
        "scenarios.md",
    }
    found = json.loads((place / "scenarios.json").read_text("utf-8"))
    assert found["scenarios"]["lab"]["default"]["levels"] == [None, 0]
    assert found["scenarios"]["kids"]["why"] == "children"
    assert found["n_prompts"] == 4 and len(found["policy_hash"]) == 64
    first = (place / "scenarios.json").read_bytes()
    assert command("stage", "scenarios", finished / "run", "--policy", policy) == 0
    assert (place / "scenarios.json").read_bytes() == first
    assert command("report", finished / "run") == 0  # the run is still whole


def test_a_swept_setting_is_not_sampled_again(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import equipoise.stages.scenarios as stage

    def never(*arguments: object) -> None:
        raise AssertionError("sampled again")

    monkeypatch.setattr(stage, "_sampled", never)
    scenarios = {"kids": POLICY["scenarios"]["kids"]}  # type: ignore[index]
    policy = write_policy(tmp_path, scenarios=scenarios)
    assert command("stage", "scenarios", finished / "run", "--policy", policy) == 0


def test_forge_lift_is_measured_through_the_door(finished: Path, tmp_path: Path) -> None:
    policy = write_policy(tmp_path)
    assert command("stage", "forge", finished / "run", "--policy", policy, "--answers", "2") == 0
    found = json.loads((finished / "run/scenarios/policy/forge.json").read_text("utf-8"))
    assert found["scenario"] == "lab" and found["setting"] == [1, 1]  # the widest, its middle
    assert (found["n_prompts"], found["repeats"]) == (4, 2)
    assert set(found["families"]) == {"literal", "lookalike", "fragments", "wording"}
    for family, dials in found["families"].items():
        assert set(dials) == set(ATTRIBUTES)
        for judges in dials.values():
            assert set(judges) == {"optimization", "generalization"}
            for lift in judges.values():
                said = lift.pop("verdict", None)
                assert said == (verdict(Estimate(**lift)) if family in BOUNDED else None)
                assert 0 <= lift["low"] <= lift["value"] <= lift["high"] <= 1 and lift["n"] == 4


def test_a_broken_policy_changes_nothing(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.rmtree(finished / "run" / "scenarios", ignore_errors=True)
    policy = write_policy(tmp_path, default_scenario="nobody")
    assert command("stage", "scenarios", finished / "run", "--policy", policy) == 1
    assert "nobody" in capsys.readouterr().err
    assert not (finished / "run" / "scenarios").exists()
