"""Recipes: all errors at once, each with its line, the nearest name, and overrides."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from equipoise.config import Config
from equipoise.errors import ConfigError
from equipoise.recipes.check import field_names
from equipoise.recipes.load import describe_shipped, find_recipe, load_recipe, shipped

GOOD = """\
name: good
description: none
model: somewhere
prompts:
  train:
    - source: a
  test:
    - source: b
reward_models:
  helpfulness: {model: h}
  safety: {model: s}
judges:
  helpfulness: {model: h}
  safety: {model: s}
tune:
  steps: 10
"""


def write(folder: Path, text: str) -> str:
    file = folder / "recipe.yaml"
    file.write_text(text, "utf-8")
    return str(file)


def why(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_recipe(write(folder, text), overrides=overrides)
    return caught.value.why


@pytest.mark.parametrize("name", sorted(shipped()))
def test_every_shipped_recipe_parses_and_says_what_it_is(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.name == name
    text = describe_shipped()[name]
    assert text
    assert "\n" not in text
    assert "/work" not in shipped()[name].read_text("utf-8")


def test_an_unknown_key_gets_its_line_and_the_nearest_name(tmp_path: Path) -> None:
    text = GOOD.replace("  steps: 10\n", "  objectve: clm\n  steps: 10\n")
    assert "recipe.yaml:16: unknown key `objectve`; did you mean `objective`?" in why(
        tmp_path, text
    )


def test_an_unknown_key_far_from_all_names_lists_them(tmp_path: Path) -> None:
    message = why(tmp_path, GOOD + "  qqq: 1\n")
    assert "known here: objective, weight" in message


def test_all_errors_come_at_once(tmp_path: Path) -> None:
    text = GOOD.replace("steps: 10", "steps: -3\n  objective: exmte\nseeed: 1")
    text = text.replace("    - source: a", "    - {source: a, limt: 3}")
    message = why(tmp_path, text)
    for line in (
        "recipe.yaml:16: `tune.steps` is -3",
        "recipe.yaml:17: `tune.objective` is 'exmte'",
        "did you mean `exmate`?",
        "recipe.yaml:18: unknown key `seeed`; did you mean `seed`?",
        "recipe.yaml:6: unknown key `limt`; did you mean `limit`?",
    ):
        assert line in message


def test_a_missing_field_is_named(tmp_path: Path) -> None:
    assert "`model` is missing" in why(tmp_path, GOOD.replace("model: somewhere\n", ""))


def test_contradictions_between_fields_are_errors_with_lines(tmp_path: Path) -> None:
    text = GOOD.replace(
        "reward_models:\n  helpfulness: {model: h}", "reward_models:\n  helpfulnes: {model: h}"
    )
    text += "evaluate:\n  responders: [start, strt, rerank0]\ndistil: {min_cells: 26}\n"
    text = text.replace(
        "judges:\n  helpfulness: {model: h}", "judges:\n  helpfulness: {model: 'fitted://x'}"
    )
    message = why(tmp_path, text)
    for line in (
        "`reward_models.helpfulness` is missing",
        "recipe.yaml:10: `reward_models.helpfulnes`: did you mean `helpfulness`?",
        "recipe.yaml:13: `fitted://x`: fit_reward trains nothing",
        "recipe.yaml:18: unknown responder `strt`; did you mean `start`?",
        "unknown responder `rerank0`",
        "recipe.yaml:19: `distil.min_cells` exceeds the number of cells (25)",
    ):
        assert line in message


def test_a_policy_is_no_judge_and_a_stock_holds_every_sample(tmp_path: Path) -> None:
    text = GOOD.replace(
        "judges:\n  helpfulness: {model: h}", "judges:\n  helpfulness: {model: 'made://align'}"
    )
    message = why(
        tmp_path, text + "evaluate: {responders: [rerank8, rerank16], rerank_stock: 12}\n"
    )
    assert "recipe.yaml:13: `made://align` is a policy" in message
    assert "`evaluate.rerank_stock` is less than the 16 samples of rerank16" in message


def test_overrides_are_typed_by_yaml_and_checked_like_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, GOOD)
    recipe = load_recipe(
        file,
        overrides=[
            "tune.objective=clm",
            "tune.learning_rate=2e-4",
            "evaluate.responders=[start]",
            "prompts.train.0.limit=5",
            "prompts.train.1.source=c",
            "generate.sampling.max_tokens=7",
        ],
    )
    assert (recipe.tune.objective, recipe.tune.learning_rate) == ("clm", 2e-4)
    assert recipe.evaluate.responders == ["start"]
    assert [source.source for source in recipe.prompts.train] == ["a", "c"]
    assert recipe.prompts.train[0].limit == 5
    assert recipe.generate.sampling.max_tokens == 7
    message = why(tmp_path, GOOD, "tune.wieght=3", "generate.batch_size=x")
    assert "--set tune.wieght=3: unknown key `wieght`; did you mean `weight`?" in message
    assert "--set generate.batch_size=x: `generate.batch_size` is 'x'" in message


@pytest.mark.parametrize(
    ("flag", "said"),
    [
        ("tune.weight_relative=true", "unknown key `weight_relative`; it went: leave it out"),
        ("tune.n_counterfactuals=1", "unknown key `n_counterfactuals`; it went: leave it out"),
        ("tune.counterfactual=far", "it went; use `uniform` or `one_attribute`"),
    ],
)
def test_an_option_that_went_is_refused_with_what_to_do(
    tmp_path: Path, flag: str, said: str
) -> None:
    assert said in why(tmp_path, GOOD, flag)


@pytest.mark.parametrize(
    "item",
    [
        "tune.steps",
        "=3",
        "tune..steps=3",
        "tune.steps=[",
        "seed.9.x=1",
        "prompts.train.²=x",
        f"prompts.train.{'9' * 5000}=x",
        "tune.steps=&x [*x]",
        "tune.steps=!!int x",
        "tune.steps=" + "[" * 5000,
    ],
)
def test_overrides_that_cannot_be_read(tmp_path: Path, item: str) -> None:
    with pytest.raises(ConfigError, match="--set"):
        load_recipe(write(tmp_path, GOOD), overrides=[item])


def test_what_a_flag_began_is_blamed_on_the_flag(tmp_path: Path) -> None:
    flag = "reward_models.brevity.model=x"
    assert f"--set {flag}: `reward_models.brevity`: no such" in why(tmp_path, GOOD, flag)
    flag = "judges.brevity.sign=-1"
    assert f"--set {flag}: `judges.brevity.model` is missing" in why(tmp_path, GOOD, flag)


def test_a_description_is_optional(tmp_path: Path) -> None:
    text = GOOD.replace("description: none\n", "")
    assert load_recipe(write(tmp_path, text)).description == ""


@pytest.mark.parametrize(
    ("path", "value", "wanted"),
    [
        ("seed", "010", 10),
        ("seed", "0x1F", 31),
        ("tune.learning_rate", "1e-4", 1e-4),
        ("tune.learning_rate", "1", 1.0),
        ("name", "on", "on"),
        ("description", "12:30", "12:30"),
        ("data", "~", None),
    ],
)
def test_values_are_what_they_look_like(
    tmp_path: Path, path: str, value: str, wanted: object
) -> None:
    for recipe in (
        load_recipe(write(tmp_path, GOOD), overrides=[f"{path}={value}"]),
        load_recipe(_with(tmp_path, path, value)),
    ):
        plain = recipe.model_dump()
        for part in path.split("."):
            plain = plain[part]
        assert plain == wanted


@pytest.mark.parametrize(
    ("path", "value"),
    [
        *((path, word) for path in ("seed", "tune.learning_rate") for word in ("yes", "true")),
        ("tune.lora_rank", "yes"),
        ("tune.steps", "on"),
        ("seed", "12:30"),
        ("seed", "1_000"),
        ("seed", "'3'"),
        ("seed", "1.0"),
        ("tune.learning_rate", ".inf"),
        ("tune.learning_rate", "1e999"),
        ("tune.weight", ".nan"),
        ("evaluate.auto_sweep", "yes"),
        ("evaluate.auto_sweep", "1"),
        ("judges.safety.sign", "true"),
        ("distil.balance_cap", ".inf"),
    ],
)
def test_what_is_no_number_is_not_taken_for_one(tmp_path: Path, path: str, value: str) -> None:
    flag = f"{path}={value}"
    assert f"--set {flag}: `{path}` is" in why(tmp_path, GOOD, flag)
    with pytest.raises(ConfigError, match=f"`{path}` is"):
        load_recipe(_with(tmp_path, path, value))


def _with(folder: Path, path: str, value: str) -> str:
    """Write the recipe with one value as the text that it is in YAML."""
    marked = yaml.safe_load(GOOD)
    place = marked
    *parts, last = path.split(".")
    for part in parts:
        place = place.setdefault(part, {})
    place[last] = "MARK"
    return write(folder, yaml.safe_dump(marked).replace("MARK", value))


@pytest.mark.parametrize(
    "text", ["a: &x [*x]", "a: &x {b: *x}", "a: !!int x", "a: !!bool maybe", "a: " + "[" * 5000]
)
def test_yaml_that_no_recipe_can_hold_is_a_clear_error(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match="is not valid YAML"):
        load_recipe(write(tmp_path, GOOD + text + "\n"))


def test_the_batch_of_completions_is_made_of_groups(tmp_path: Path) -> None:
    file = write(tmp_path, GOOD)
    rlhf = ["tune.objective=rlhf", "tune.rlhf.group=8"]
    with pytest.raises(ConfigError) as caught:
        load_recipe(file, overrides=[*rlhf, "tune.batch_size=12"])
    assert "`tune.batch_size` is no multiple of `tune.rlhf.group` (8)" in caught.value.why
    with pytest.raises(ConfigError) as caught:
        load_recipe(file, overrides=[*rlhf, "tune.batch_size=16", "tune.rlhf.batch_size=12"])
    assert "`tune.rlhf.batch_size` is no multiple" in caught.value.why
    # That of the warm start may be any.
    load_recipe(file, overrides=[*rlhf, "tune.batch_size=12", "tune.rlhf.batch_size=16"])


def test_data_folder_comes_from_the_flag(tmp_path: Path) -> None:
    assert load_recipe(write(tmp_path, GOOD), data=str(tmp_path)).data == str(tmp_path)


def test_yaml_that_is_broken_twice_or_no_recipe(tmp_path: Path) -> None:
    for text, what in (
        ("name: [", "is not valid YAML"),
        ("- 1\n", "holds no recipe"),
        ("", "holds no recipe"),
        (GOOD + "name: again\n", "the same key twice"),
    ):
        with pytest.raises(ConfigError, match=what):
            load_recipe(write(tmp_path, text))


def test_an_unknown_recipe_names_the_nearest() -> None:
    with pytest.raises(ConfigError) as caught:
        find_recipe("workshp")
    assert "did you mean `workshop`?" in caught.value.fix


def test_a_resolved_recipe_reads_back_the_same(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, GOOD))
    dumped = yaml.safe_dump(recipe.model_dump(mode="json"))
    assert load_recipe(write(tmp_path, dumped)) == recipe


def test_field_names_follow_lists_and_mappings() -> None:
    assert "limit" in field_names(("prompts", "train", 0))
    assert "sign" in field_names(("judges", "safety"))
    assert field_names(("judges",)) == []


def test_no_config_outgrows_its_budget() -> None:
    def fields(kind: type[Config]) -> list[type[Config]]:
        return [kind, *(below for child in kind.__subclasses__() for below in fields(child))]

    large = {"Recipe": 23, "TuneConfig": 16, "EvaluateConfig": 13}  # to shrink, never to grow
    for kind in fields(Config):
        assert len(kind.model_fields) <= large.get(kind.__name__, 12), kind
