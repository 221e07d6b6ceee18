"""A hub on this disk: caches laid out as the hub's own libraries lay them out, and no network."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from hub_models import MODELS
from hub_rows import SETS

COMMIT = "0123456789abcdef0123456789abcdef01234567"
_NOT_FETCHED = ("README.md", "original/params.json", "original/consolidated.00.pth")
"""What stands in a repository and is of no use here."""


def build_hub(root: Path) -> Path:
    """Write caches with the models and data sets of ``hub-8b``; see :func:`offline`."""
    for name, save in MODELS.items():
        add_model(root, name, COMMIT, save)
    for name, splits in SETS.items():
        for split in splits:
            _add_split(root / "datasets", name, split)
        _add_info(root / "datasets", name)
    return root


def add_model(root: Path, name: str, commit: str, save: Callable[[Path], None]) -> Path:
    """Add a commit of a repository, which is its newest from then on; return its snapshot."""
    folder = root / "hub" / f"models--{name.replace('/', '--')}"
    made = folder / "made"
    save(made)
    snapshot = folder / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (folder / "blobs").mkdir(exist_ok=True)
    for file in sorted(made.iterdir()):
        blob = folder / "blobs" / f"{commit[:8]}-{file.name}"
        file.rename(blob)
        (snapshot / file.name).symlink_to(os.path.relpath(blob, snapshot))
    made.rmdir()
    _list_files(folder, commit, [file.name for file in sorted(snapshot.iterdir())])
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs" / "main").write_text(commit)
    return snapshot


def _list_files(folder: Path, commit: str, fetched: list[str]) -> None:
    """Keep the list of the repository's files, as a download of some of them does."""
    blob = {"size": 1, "blob_id": "0" * 40}
    files = dict.fromkeys([*fetched, *_NOT_FETCHED], blob)
    (folder / "trees").mkdir(exist_ok=True)
    tree = {"format_version": 1, "files": files}
    (folder / "trees" / f"{commit}.json").write_text(json.dumps(tree))


@contextmanager
def offline(root: Path) -> Iterator[None]:
    """Let the hub's libraries look into these caches, and nowhere else.

    They read their environment once, when they are imported; so their constants are set.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(root / "hub"))
        patch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        patch.setattr("datasets.config.HF_DATASETS_CACHE", root / "datasets")
        yield


def _prepared(root: Path, name: str) -> tuple[Path, str]:
    """Return the folder of a data set that ``datasets`` has prepared, and its files' stem."""
    from datasets.naming import camelcase_to_snakecase

    owner, _, short = name.partition("/")
    stem = camelcase_to_snakecase(short)
    return root / f"{owner}___{stem}" / "default" / "0.0.0" / COMMIT, stem


def _add_split(root: Path, name: str, split: str) -> None:
    from datasets import Dataset
    from datasets.arrow_writer import ArrowWriter

    folder, stem = _prepared(root, name)
    folder.mkdir(parents=True, exist_ok=True)
    rows = SETS[name][split]
    features = Dataset.from_list(rows).features
    with ArrowWriter(features=features, path=str(folder / f"{stem}-{split}.arrow")) as writer:
        for row in rows:
            writer.write(row)
        writer.finalize()


def _add_info(root: Path, name: str) -> None:
    from datasets import Dataset, DatasetInfo, SplitDict, SplitInfo

    folder, stem = _prepared(root, name)
    splits = SplitDict(dataset_name=stem)
    for split, rows in SETS[name].items():
        splits.add(SplitInfo(split, num_examples=len(rows), dataset_name=stem))
    features = Dataset.from_list(next(iter(SETS[name].values()))).features
    DatasetInfo(
        features=features, splits=splits, config_name="default", dataset_name=stem, version="0.0.0"
    ).write_to_directory(str(folder))
