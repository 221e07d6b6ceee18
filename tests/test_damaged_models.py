"""Two hundred changes to a model directory: refused with a clear error, or loaded as they stand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from benchmarks import damaged

from equipoise.errors import EquipoiseError
from equipoise.models.load import load_causal


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, damaged.Kept]:
    return damaged.directories(tmp_path_factory.mktemp("damaged"))


@pytest.mark.parametrize("name", damaged.NAMES)
def test_no_change_ends_in_a_raw_error_or_in_other_weights(
    made: dict[str, damaged.Kept], tmp_path: Path, name: str
) -> None:
    place, n, use = made[name]
    assert damaged.verdict(place, use) == "loaded"
    results = damaged.trial(place, damaged.changes(place, n, seed=0), use, tmp_path)
    told = [(change.file, change.what, result) for change, result in results]
    assert [one for one in told if one[2] not in ("refused", "loaded")] == []
    if name.startswith("tuned"):
        # Whatever is not refused stands in a file that loading never reads.
        assert {file for file, _, result in told if result == "loaded"} <= set(damaged.UNUSED)
        assert not set(damaged.UNUSED) & damaged.hashed(place)
    else:
        assert 0.1 < sum(result == "loaded" for *_, result in told) / n < 0.9


def test_changes_are_of_all_kinds_and_files(made: dict[str, damaged.Kept]) -> None:
    for place, n, _ in made.values():
        found = damaged.changes(place, n, seed=0)
        assert len({(one.file, one.what) for one in found}) == n
        assert {one.kind for one in found} == {*damaged.FILE_KINDS, *damaged.JSON_KINDS}
        assert {one.file for one in found} == {file.name for file in place.iterdir()}


def test_dials_are_not_lost_with_their_manifest(
    made: dict[str, damaged.Kept], tmp_path: Path
) -> None:
    place = tmp_path / "copy"
    damaged.shutil.copytree(made["tuned, full weights"][0], place)
    manifest = json.loads((place / "dials.json").read_text())
    (place / "dials.json").write_text(json.dumps({**manifest, "levels": str(manifest["levels"])}))
    with pytest.raises(EquipoiseError, match="it was changed since it was written"):
        load_causal(str(place))
    (place / "dials.json").unlink()
    with pytest.raises(EquipoiseError, match=r"there is no dials\.json"):
        load_causal(str(place))


def test_the_committed_table_is_of_these_trials() -> None:
    table = json.loads(damaged.OUT.read_text())["trials"]
    assert list(table) == list(damaged.NAMES)
    for name, row in table.items():
        assert row["n"] == row["refused"] + row["unused"] + row["loaded"] >= 60
        assert row["raw"] == 0
        assert not name.startswith("tuned") or row["loaded"] == 0


def test_the_page_shows_the_committed_table() -> None:
    page = (Path(__file__).parent.parent / "docs" / "errors.md").read_text("utf-8")
    for row in json.loads(damaged.OUT.read_text())["trials"].values():
        cells = (row[name] for name in ("n", "refused", "unused", "loaded", "raw"))
        assert f" | {' | '.join(map(str, cells))} |" in page
