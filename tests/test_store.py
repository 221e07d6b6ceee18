"""The run directory and its shards: whole or not at all, the same bytes for the same rows."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from equipoise.config import Recipe
from equipoise.errors import RunError
from equipoise.pipeline.rundir import RunDir
from equipoise.pipeline.stored import stored_recipe, with_new_defaults
from equipoise.pipeline.table import ORDER, STAGES, affected_by, needed_by, reads_of
from equipoise.store.publish import publish_bytes, publish_directory
from equipoise.store.rundir import diff
from equipoise.store.shards import (
    rows_from_jsonl,
    rows_from_parquet,
    rows_to_jsonl,
    rows_to_parquet,
)
from equipoise.store.stagefiles import StageFiles
from equipoise.types import Completion, ControlledExample, Delivery, DialSetting, Message, Prompt


def recipe(**changes: Any) -> Recipe:
    plain: dict[str, Any] = {
        "name": "store-test",
        "description": "none",
        "model": "nowhere",
        "prompts": {"train": [{"source": "a"}], "test": [{"source": "b"}]},
        "reward_models": {"helpfulness": {"model": "h"}, "safety": {"model": "s"}},
        "judges": {"helpfulness": {"model": "h"}, "safety": {"model": "s"}},
    }
    return Recipe.model_validate({**plain, **changes})


def completions(count: int, start: int = 0) -> list[Completion]:
    return [
        Completion(f"p{i}", 0, f"text {i}", "stop", i, "hash", 0, DialSetting((i % 5, None)))
        for i in range(start, start + count)
    ]


def finished_prompts(run: RunDir) -> None:
    stage = run.begin("prompts")
    stage.publish_bytes("prompts.jsonl", b"{}\n")
    stage.finish()


words = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
cell = st.builds(DialSetting, st.tuples(st.none() | st.integers(0, 4), st.integers(0, 4)))
units = st.dictionaries(words, st.floats(0, 1), max_size=3)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.builds(
            ControlledExample,
            prompt=st.builds(
                Prompt,
                words,
                st.lists(st.builds(Message, st.sampled_from(["system", "user"]), words)).map(tuple),
                st.just("train"),
            ),
            setting=cell,
            text=words,
            finished=st.booleans(),
            unit=units,
            weight=st.floats(0, 9),
        ),
        max_size=4,
    )
)
def test_rows_survive_both_formats(rows: list[ControlledExample]) -> None:
    assert rows_from_parquet(rows_to_parquet(rows, ControlledExample), ControlledExample) == rows
    assert rows_from_jsonl(rows_to_jsonl(rows), ControlledExample) == rows


def test_nested_mappings_and_absent_settings_survive() -> None:
    unit = {"optimization": {"helpfulness": 0.5}, "generalization": {}}
    delivery = Delivery("p", DialSetting((1, None)), 0, "t", "length", 3, unit)  # type: ignore[arg-type]
    assert rows_from_parquet(rows_to_parquet([delivery], Delivery), Delivery) == [delivery]
    plain = Completion("p", 0, "", "stop", 1, "h")
    assert rows_from_parquet(rows_to_parquet([plain], Completion), Completion) == [plain]


def test_the_same_rows_give_the_same_bytes() -> None:
    assert rows_to_parquet(completions(50), Completion) == rows_to_parquet(
        completions(50), Completion
    )


def test_rows_of_another_type_are_refused() -> None:
    with pytest.raises(ValueError, match="not of type Delivery"):
        rows_from_parquet(rows_to_parquet(completions(2), Completion), Delivery)


def test_every_bit_flip_and_cut_of_a_shard_is_detected(tmp_path: Path) -> None:
    with RunDir.open(tmp_path / "run", recipe()) as run:
        finished_prompts(run)
        stage = run.begin("generate")
        stage.publish_rows("shard-00000.parquet", completions(3), Completion)
        file = stage.path / "shard-00000.parquet"
        good = file.read_bytes()
        for position in range(0, len(good), 7):
            bad = bytearray(good)
            bad[position] ^= 1 << (position % 8)
            for data in (bytes(bad), good[:position]):
                file.write_bytes(data)
                with pytest.raises(RunError, match=r"shard-00000\.parquet is damaged") as caught:
                    list(stage.read_rows(Completion))
                assert "delete that file and run again" in caught.value.fix
        file.write_bytes(good)
        assert list(stage.read_rows(Completion)) == [completions(3)]


def test_a_deleted_shard_alone_is_made_again(tmp_path: Path) -> None:
    with RunDir.open(tmp_path / "run", recipe()) as run:
        finished_prompts(run)
        stage = run.begin("generate")
        for index in range(3):
            stage.publish_rows(f"shard-{index}.parquet", completions(2, index), Completion)
        stage.publish_json("facts.json", {"n": 6})
        stage.finish(rows=6)
        before = run.done("generate").outputs_hash
    (tmp_path / "run/generate/shard-1.parquet").unlink()
    with RunDir.open(tmp_path / "run", recipe()) as run:
        assert not run.is_done("generate")
        stage = run.begin("generate")
        assert stage.shards == ["shard-0.parquet", "shard-2.parquet"]
        stage.publish_rows("shard-1.parquet", completions(2, 1), Completion)
        stage.publish_json("facts.json", {"n": 6})
        stage.finish(rows=6)
        assert run.done("generate").outputs_hash == before


def test_a_complete_stage_has_nothing_to_do(tmp_path: Path) -> None:
    with RunDir.open(tmp_path / "run", recipe()) as run:
        finished_prompts(run)
        assert run.begin("prompts").complete
        assert run.done("prompts").facts()["outputs"].keys() == {"prompts.jsonl"}
        assert "prompts" in run.minutes()
        with pytest.raises(RunError, match=r"stage generate .* is not complete"):
            run.done("generate")


def test_orphans_and_unlisted_shards_are_removed_on_open(tmp_path: Path) -> None:
    with RunDir.open(tmp_path / "run", recipe()) as run:
        finished_prompts(run)
        stage = run.begin("generate")
        stage.publish_rows("shard-0.parquet", completions(1), Completion)
    (tmp_path / "run/generate/.tmp-shard-1.parquet").write_bytes(b"half")
    (tmp_path / "run/generate/.tmp-model").mkdir()
    (tmp_path / "run/generate/shard-1.parquet").write_bytes(b"renamed but not listed")
    with RunDir.open(tmp_path / "run", recipe()) as run:
        stage = run.begin("generate")
        names = {item.name for item in stage.path.iterdir()}
    assert names == {"started.json", "published.json", "shard-0.parquet"}


def test_a_changed_recipe_is_refused_with_a_diff_and_fresh_keeps_the_rest(tmp_path: Path) -> None:
    with RunDir.open(tmp_path / "run", recipe()) as run:
        finished_prompts(run)
        run.begin("generate").finish()
        run.begin("score").finish()
    changed = recipe(score={"calibration": "within_prompt"})
    with (
        pytest.raises(RunError) as caught,
        RunDir.open(tmp_path / "run", changed),
    ):
        pass
    assert "score.calibration: pooled -> within_prompt" in caught.value.why
    assert "--fresh" in caught.value.fix
    assert stored_recipe(tmp_path / "run") == recipe()
    with RunDir.open(tmp_path / "run", changed, fresh=True) as run:
        assert run.is_done("generate")
        assert not run.is_done("score")
    assert stored_recipe(tmp_path / "run") == changed


def test_a_run_that_made_nothing_takes_the_corrected_recipe(tmp_path: Path) -> None:
    with RunDir.open(tmp_path, recipe()) as run:
        run.begin("prompts")
    changed = recipe(seed=5)
    with RunDir.open(tmp_path, changed) as run:
        stage = run.begin("prompts")
        assert stored_recipe(tmp_path) == changed
        (stage.work / "checkpoint").write_text("of an hour")
    # From here on there is something to lose.
    with pytest.raises(RunError, match="seed: 5 -> 6"), RunDir.open(tmp_path, recipe(seed=6)):
        pass
    assert (tmp_path / "prompts/work/checkpoint").exists()


def test_a_run_outlives_an_option_that_came_after_it(tmp_path: Path) -> None:
    with RunDir.open(tmp_path, recipe()) as run:
        finished_prompts(run)
    for file in (tmp_path / "recipe.json", tmp_path / "prompts/stage.json"):
        plain = json.loads(file.read_text())
        holder = plain["fingerprint"]["config"] if "fingerprint" in plain else plain
        del holder["prompts"]["n_dev"]
        file.write_text(json.dumps(plain))
    with RunDir.open(tmp_path, recipe()) as run:
        assert run.begin("prompts").complete
    new = {"train": [{"source": "a"}], "test": [{"source": "b"}], "n_dev": 3}
    with pytest.raises(RunError, match="n_dev: 0 -> 3"), RunDir.open(tmp_path, recipe(prompts=new)):
        pass


def test_stored_fields_get_the_defaults_of_later_ones() -> None:
    now = recipe(steer={}, evaluate={"rerank_stock": 64})
    full = with_new_defaults({"seed": 7, "evaluate": {"responders": ["start"]}}, now)
    assert (full["seed"], full["evaluate"]["responders"]) == (7, ["start"])
    # What was not there when it was stored is not what the recipe of today says.
    assert full["evaluate"]["rerank_stock"] is None
    assert full["steer"] is full["refusal_judge"] is None
    gone = {"evaluate": {"a_field_that_went": 1}}
    assert with_new_defaults(gone, now) == gone


OLD_TUNE = {"weight_relative": False, "weight_warm_up": 0, "n_counterfactuals": 1}


def test_a_run_outlives_an_option_that_went(tmp_path: Path) -> None:
    """Stored before ExMATE's options went and the default of `steer.directions` changed."""
    now = recipe(steer={"directions": "difference_of_means"}, tune={"steps": 7})
    plain = now.model_dump(mode="json")
    plain["tune"] |= OLD_TUNE
    del plain["steer"]["directions"]
    (tmp_path / "recipe.json").write_text(json.dumps(plain))
    assert stored_recipe(tmp_path) == now
    with RunDir.open(tmp_path, now) as run:
        finished_prompts(run)
        run.begin("generate").finish()
    # So do its stages.
    file = tmp_path / "recipe.json"
    file.write_text(json.dumps(plain))
    old = with_new_defaults({"tune": plain["tune"], "steer": plain["steer"]}, now)
    assert diff(old["tune"], now.tune.model_dump(mode="json")) == []
    assert diff(old["steer"], now.steer.model_dump(mode="json") if now.steer else None) == []
    with RunDir.open(tmp_path, now) as run:
        assert run.is_done("generate")


@pytest.mark.parametrize(
    ("tune", "said"),
    [({"weight_relative": True}, "weight_relative: True"), ({"counterfactual": "far"}, "'far'")],
)
def test_a_run_that_used_what_went_is_refused_with_the_way_to_make_it_anew(
    tmp_path: Path, tune: dict[str, Any], said: str
) -> None:
    plain = recipe().model_dump(mode="json")
    plain["tune"] |= OLD_TUNE | tune
    (tmp_path / "recipe.json").write_text(json.dumps(plain))
    with pytest.raises(RunError) as caught:
        stored_recipe(tmp_path)
    assert said in caught.value.why
    assert f"equipoise run RECIPE --dir {tmp_path} --fresh" in caught.value.fix
    (tmp_path / "tune").mkdir()
    (tmp_path / "tune/half").write_text("of an hour")
    with pytest.raises(RunError, match="--fresh"), RunDir.open(tmp_path, recipe()):
        pass


def test_another_model_under_the_same_name_is_refused(tmp_path: Path) -> None:
    with RunDir.open(tmp_path / "run", recipe()) as run:
        finished_prompts(run)
        run.begin("generate", models={"policy": "one"}).finish()
        with pytest.raises(RunError, match=r"models\.policy: one -> two"):
            run.begin("generate", models={"policy": "two"})
        assert not run.begin("generate", models={"policy": "two"}, fresh=True).complete


def test_fresh_on_an_unchanged_recipe_starts_over(tmp_path: Path) -> None:
    with RunDir.open(tmp_path / "run", recipe()) as run:
        finished_prompts(run)
        run.begin("generate").finish()
    with RunDir.open(tmp_path / "run", recipe(), fresh=True, only_from="generate") as run:
        assert run.is_done("prompts")
        assert not run.is_done("generate")
    with RunDir.open(tmp_path / "run", recipe(), fresh=True) as run:
        assert not run.is_done("prompts")


def test_a_missing_stage_is_named_with_all_that_is_missing_before_it(tmp_path: Path) -> None:
    with RunDir.open(tmp_path, recipe()) as run:
        with pytest.raises(RunError) as caught:
            run.begin("tune")
        assert f"equipoise run {tmp_path}" in caught.value.fix
        assert "(prompts, generate, score, distil)" in caught.value.fix
        finished_prompts(run)
        with pytest.raises(RunError) as caught:
            run.begin("generate") and run.done("generate")
        assert caught.value.fix == f"run it first: equipoise stage generate {tmp_path}"


def test_a_view_without_text_is_remembered(tmp_path: Path) -> None:
    def shown(asked: bool | None) -> bool:
        with RunDir.open(tmp_path, recipe()) as run:
            return run.shows_text(asked)

    asked = (None, False, None, True, None)
    assert [shown(one) for one in asked] == [True, False, False, True, True]
    # A run from before it was remembered has it in its report stage.
    (tmp_path / "view.json").unlink()
    with RunDir.open(tmp_path, recipe()) as run:
        StageFiles(tmp_path / "report").path.mkdir()
        (tmp_path / "report/stage.json").write_text('{"text": false, "outputs": {}}')
        assert run.shows_text(None) is False


def test_every_field_of_the_recipe_is_read_by_a_stage() -> None:
    for field in Recipe.model_fields:
        readers = affected_by([f"{field}: 1 -> 2"], recipe())
        # The report prints them all, so it alone would prove nothing but for what it shows.
        assert set(readers) - {"report"} or field in ("name", "description"), field


@pytest.mark.parametrize("objective", ["exmate", "rlhf"])
def test_what_a_stage_reads_is_a_field_of_the_recipe(objective: str) -> None:
    asked = recipe(tune={"objective": objective})
    for path in (path for name in ORDER for path in reads_of(STAGES[name], asked)):
        value: Any = asked
        for part in path.split("."):
            value = getattr(value, part)


PROBED = {"evaluate": {"sampling": {"max_tokens": 9}}}
TURNED = {"judges": {"helpfulness": {"model": "h"}, "safety": {"model": "s", "sign": -1}}}


@pytest.mark.parametrize("objective", ["clm", "exmate", "rlhf"])
@pytest.mark.parametrize("changed", [PROBED, TURNED, {"evaluate": {"bootstrap": 7}}])
def test_only_rlhf_is_tuned_anew_when_what_its_probes_read_changes(
    tmp_path: Path, objective: str, changed: dict[str, Any]
) -> None:
    tuning = {"tune": {"objective": objective}}
    with RunDir.open(tmp_path / "run", recipe(**tuning)) as run:
        for name in needed_by("tune", run.recipe):
            run.begin(name).finish()
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    read = objective == "rlhf" and changed in (PROBED, TURNED)
    now = recipe(**tuning, **changed)
    with RunDir.open(tmp_path / "run", now, fresh=True) as run:
        assert run.is_done("distil")
        assert run.is_done("tune") is not read
    # Where the recipe does not tell, as in a copied run, the stage itself notices.
    (tmp_path / "copy/recipe.json").write_text(now.model_dump_json())
    with RunDir.open(tmp_path / "copy", now) as run:
        if read:
            field = "evaluate.sampling.max_tokens" if changed == PROBED else "judges.safety.sign"
            with pytest.raises(RunError) as caught:
                run.begin("tune")
            assert f"config.{field}: " in caught.value.why
        else:
            assert run.begin("tune").complete


def test_a_directory_with_other_files_is_not_taken_over(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with (
        pytest.raises(RunError, match="is not a run directory"),
        RunDir.open(tmp_path, recipe(), fresh=True),
    ):
        pass
    assert {item.name for item in tmp_path.iterdir()} == {"thesis.tex"}


def test_two_processes_in_one_directory(tmp_path: Path) -> None:
    program = (
        "import sys; sys.path.insert(0, 'tests'); from pathlib import Path\n"
        "from test_store import recipe; from equipoise.pipeline.rundir import RunDir\n"
        "from equipoise.errors import RunError\n"
        "try:\n"
        "    with RunDir.open(Path(sys.argv[1]), recipe()): print('won')\n"
        "except RunError as error: print(error)\n"
    )
    with RunDir.open(tmp_path / "run", recipe()):
        command = [sys.executable, "-c", program, str(tmp_path / "run")]
        second = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
        assert "another process is at work" in second.stdout
        assert f"pid {os.getpid()} on " in second.stdout
    with RunDir.open(tmp_path / "run", recipe()):
        pass


@pytest.mark.parametrize("call", ["write", "fsync", "replace"])
def test_a_full_disk_publishes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    with RunDir.open(tmp_path / "run", recipe()) as run:
        finished_prompts(run)
        stage = run.begin("generate")
        before = sorted(item.name for item in stage.path.iterdir())

        def full(*_args: Any, **_kwargs: Any) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with monkeypatch.context() as patch:
            patch.setattr(os, call, full)
            with pytest.raises(RunError, match="no space left") as caught:
                stage.publish_rows("shard-0.parquet", completions(3), Completion)
        assert "equipoise run" in caught.value.fix
        assert sorted(item.name for item in stage.path.iterdir()) == before


def test_short_writes_are_completed_or_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: whole(fd, bytes(data)[:3]))
    publish_bytes(tmp_path / "file", b"0123456789")
    assert (tmp_path / "file").read_bytes() == b"0123456789"
    monkeypatch.setattr(os, "write", lambda _fd, _data: 0)
    with pytest.raises(OSError, match="No space left"):
        publish_bytes(tmp_path / "file", b"other")
    assert (tmp_path / "file").read_bytes() == b"0123456789"


def test_a_folder_is_published_whole_or_not_at_all(tmp_path: Path) -> None:
    def good(folder: Path) -> None:
        (folder / "sub").mkdir()
        (folder / "sub/a.json").write_text("{}")

    def bad(folder: Path) -> None:
        (folder / "b.json").write_text("{}")
        raise RuntimeError("killed half-way")

    assert publish_directory(tmp_path / "model", good).keys() == {"sub/a.json"}
    with pytest.raises(RuntimeError, match="half-way"):
        publish_directory(tmp_path / "model", bad)
    assert [item.name for item in tmp_path.iterdir()] == ["model"]
    assert (tmp_path / "model/sub/a.json").exists()


def test_diff_names_every_leaf() -> None:
    old, new = {"a": {"b": 1, "c": [1]}, "d": 1}, {"a": {"b": 2, "c": [1]}, "e": 2}
    assert diff(old, new) == ["a.b: 1 -> 2", "d: 1 -> (absent)", "e: (absent) -> 2"]


def test_a_run_directory_says_its_format(tmp_path: Path) -> None:
    with RunDir.open(tmp_path, recipe()) as run:
        finished_prompts(run)
    file = tmp_path / "format.json"
    assert json.loads(file.read_text()) == {"format": 1}
    file.unlink()  # as from before there was a number
    assert stored_recipe(tmp_path) == recipe()
    with RunDir.open(tmp_path, recipe()) as run:
        assert run.is_done("prompts") and run.begin("prompts").complete
    assert file.exists()
    for text in ('{"format": 2}', '{"format": "1"}', "[1]"):
        file.write_text(text)
        with pytest.raises(RunError, match="has the format") as caught:
            stored_recipe(tmp_path)
        assert f"equipoise run {tmp_path}/recipe.json --dir NEW" in caught.value.fix
        with pytest.raises(RunError, match="has the format"), RunDir.open(tmp_path, recipe()):
            pass
        assert file.read_text() == text and (tmp_path / "prompts/stage.json").exists()


def test_a_run_outlives_a_row_that_names_more(tmp_path: Path) -> None:
    by_rlhf = recipe(tune={"objective": "rlhf"}, score={"batch_size": 3})
    with RunDir.open(tmp_path, by_rlhf) as run:
        for name in needed_by("tune", by_rlhf):
            run.begin(name).finish()
    file = tmp_path / "tune/stage.json"
    record = json.loads(file.read_text())
    for field in ("reward_models", "score"):
        del record["fingerprint"]["config"][field]
    del record["fingerprint"]["inputs"]["judge"]
    file.write_text(json.dumps(record))
    with RunDir.open(tmp_path, by_rlhf) as run:
        assert run.begin("tune").complete
    # What it did name still counts.
    record["fingerprint"]["inputs"]["distil"] = "another"
    file.write_text(json.dumps(record))
    with RunDir.open(tmp_path, by_rlhf) as run, pytest.raises(RunError, match=r"inputs\.distil"):
        run.begin("tune")
