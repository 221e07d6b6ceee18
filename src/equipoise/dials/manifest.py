"""The dial manifest: what a model directory says of its dials and files, kept in ``dials.json``."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Mapping
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from equipoise.dials.dials import Dials
from equipoise.errors import ConfigError
from equipoise.store.publish import publish_bytes
from equipoise.types import DialSetting

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MANIFEST_NAME = "dials.json"
FORMAT = 1
"""Of the ``dials.json`` that is written here. Those of before have no number, and are read."""
_PATTERNS = (
    *("*.safetensors", "*.safetensors.index.json", "*config.json", "tokenizer*", "vocab*"),
    *("merges.txt", "*.model", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "additional_chat_templates/*.jinja", "dials.json"),
)
_CONTROL_TOKEN = re.compile(r"<\|([a-z][a-z0-9_]*)_(auto|\d+)\|>")
_HASH_PROBE = "Two dials: 3 x 4 = 12!\n  naïve ﬁgures, 漢字 and 🙂\t'end'"


class DialManifest(BaseModel):
    """What a model directory says of its dials."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: int | None = None
    """See :data:`FORMAT`; ``None`` in a directory of before, and until it is written."""
    attributes: tuple[str, ...] = Field(min_length=1)
    levels: int = Field(ge=2)
    token_ids: dict[str, tuple[int, ...]]
    """Attribute to the id of each level, level 0 first."""
    auto_ids: dict[str, int]
    """Attribute to the id of its null level."""
    tokenizer_hash: str
    row_hashes: dict[str, str] = {}
    """``input/DTYPE`` and, if untied, ``output/DTYPE``: hash of the control rows in that dtype."""
    tied: bool
    """Whether the output head shares the embedding."""
    base_model: str = ""
    base_model_hash: str = ""
    calibration: dict[str, Any] | None = None
    reward_models: dict[str, str] | None = None
    """Attribute to reward-model hash."""
    files: dict[str, str] = {}
    """Name to SHA-256 of every other file that decides what the model does; empty in a directory
    of before."""
    digest: str = ""
    """SHA-256 of all other fields, so that a damaged manifest is noticed."""

    @model_validator(mode="after")
    def _consistent(self) -> DialManifest:
        if not set(self.token_ids) == set(self.auto_ids) == set(self.attributes):
            raise ValueError("token_ids and auto_ids must name exactly the attributes")
        if any(len(ids) != self.levels for ids in self.token_ids.values()):
            raise ValueError("every attribute needs one token id per level")
        if len(set(self.all_ids)) != len(self.attributes) * (self.levels + 1):
            raise ValueError("token ids must be distinct")
        return self

    @property
    def dials(self) -> Dials:
        """Its attributes and levels."""
        return Dials(self.attributes, self.levels)

    @property
    def table(self) -> list[tuple[int, ...]]:
        """Per attribute the ids of its levels, then its auto id."""
        return [(*self.token_ids[name], self.auto_ids[name]) for name in self.attributes]

    @property
    def all_ids(self) -> tuple[int, ...]:
        """All control ids: per attribute its levels, then its auto id."""
        return tuple(chain.from_iterable(self.table))

    @property
    def tokens(self) -> dict[str, int]:
        """Control token text to id, in the order of :attr:`all_ids`."""
        return dict(zip(control_tokens(self.dials), self.all_ids, strict=True))

    def control_ids(self, setting: DialSetting) -> tuple[int, ...]:
        """Return one id per attribute, in the manifest's order.

        Raises:
            ConfigError: If the setting has another number of attributes, or a level outside
                [0, levels).
        """
        if len(setting.levels) != len(self.attributes):
            raise ConfigError(
                f"a setting of {len(setting.levels)} levels for {len(self.attributes)} attributes",
                why=f"the dials of this model are {', '.join(self.attributes)}",
                fix="give one level (or auto) per attribute",
            )
        for attribute, level in zip(self.attributes, setting.levels, strict=True):
            if level is not None and not 0 <= level < self.levels:
                raise ConfigError(
                    f"{attribute} has no level {level}",
                    why=f"its levels are 0 to {self.levels - 1}",
                    fix="ask for one of these, or for auto",
                )
        auto = self.levels  # the place of a row's last id
        places = [auto if level is None else level for level in setting.levels]
        return tuple(row[place] for row, place in zip(self.table, places, strict=True))


def control_tokens(dials: Dials) -> list[str]:
    """Return the texts of all control tokens: per attribute its levels, then auto."""
    names = [*map(str, range(dials.levels)), "auto"]
    return [f"<|{attribute}_{name}|>" for attribute in dials.attributes for name in names]


def installed_tokens(vocabulary: Collection[str]) -> set[str]:
    """Return the control tokens in a vocabulary: of every attribute that has an auto token.

    Numbered tokens alone are none: Llama 3 holds ``<|reserved_special_token_0|>`` and so on.
    """
    found = {text: m for text in vocabulary if (m := _CONTROL_TOKEN.fullmatch(text))}
    attributes = {m[1] for m in found.values() if m[2] == "auto"}
    return {text for text, m in found.items() if m[1] in attributes}


def write_manifest(manifest: DialManifest, directory: Path) -> DialManifest:
    """Write ``dials.json``; a crash leaves the old file or the new one. Return what is in it."""
    whole = manifest.model_copy(update={"format": FORMAT})
    whole = whole.model_copy(update={"digest": manifest_digest(whole)})
    text = json.dumps(whole.model_dump(mode="json"), indent=1) + "\n"
    publish_bytes(directory / MANIFEST_NAME, text.encode())
    return whole


def manifest_digest(manifest: DialManifest) -> str:
    """Return the SHA-256 of all fields but the digest itself."""
    fields = _fields(manifest)
    del fields["digest"]
    return hashlib.sha256(_canonical(fields).encode()).hexdigest()


def _fields(manifest: DialManifest) -> dict[str, Any]:
    """Return what stands in ``dials.json``, which is without a format in one of before."""
    return manifest.model_dump(mode="json", exclude={"format"} if manifest.format is None else None)


def _canonical(fields: object) -> str:
    return json.dumps(fields, sort_keys=True)


def read_manifest(directory: Path) -> DialManifest | None:
    """Return the manifest of a model directory, or None if it has no ``dials.json``.

    Raises:
        ConfigError: If the file is damaged, or of a format that this version does not know.
    """
    path = directory / MANIFEST_NAME
    if not path.is_file():
        return None
    try:
        content = path.read_bytes()
        manifest = DialManifest.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        why = f"{'.'.join(map(str, first['loc'])) or 'file'}: {first['msg']}"
        raise _unusable(path, why) from error
    if manifest.format not in (None, FORMAT):
        raise ConfigError(
            f"{path} has format {manifest.format}",
            why=f"this version of Equipoise knows format {FORMAT} and what was written before it",
            fix="use the version that wrote it, or tune anew: `equipoise run RECIPE --dir NEW_RUN`",
        )
    # Before there was a digest there was no list of files either.
    if (manifest.files or manifest.digest) and (
        manifest.digest != manifest_digest(manifest)
        # A field left out, or a number as a text, would be read as if it were not.
        or _canonical(json.loads(content)) != _canonical(_fields(manifest))
    ):
        raise _unusable(path, "it was changed since it was written")
    return manifest


def _unusable(path: Path, why: str) -> ConfigError:
    return ConfigError(
        f"{path} is not a usable manifest",
        why=why,
        fix="copy dials.json from the directory that `equipoise stage tune` wrote",
    )


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the SHA-256 of what decides ids: pieces, added tokens, chat template, and a probe.

    Not of ``tokenizer.json`` itself: loading and saving may rewrite it without changing an id.
    """
    added = {
        token_id: [t.content, t.special, t.normalized, t.lstrip, t.rstrip, t.single_word]
        for token_id, t in tokenizer.added_tokens_decoder.items()
    }
    parts: Mapping[str, object] = {
        "vocab": tokenizer.get_vocab(),
        "added": added,
        "template": tokenizer.chat_template,
        "probe": tokenizer.encode(_HASH_PROBE, add_special_tokens=False),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


@lru_cache(maxsize=512)
def _file_hash(path: str, size: int, mtime_ns: int) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def file_sha256(path: Path) -> str:
    """SHA-256 of a file; asked again for an unchanged file, it is not read again."""
    stat = path.stat()
    return _file_hash(str(path.resolve()), stat.st_size, stat.st_mtime_ns)


def file_hashes(directory: Path) -> dict[str, str]:
    """Return the name and SHA-256 of every file that decides what a model does, sorted by name.

    They are weights, configs, tokenizer files, chat templates and ``dials.json``. Nothing else in
    the folder is read (a README, say).
    """
    files = {file for pattern in _PATTERNS for file in directory.glob(pattern) if file.is_file()}
    return {
        file.relative_to(directory).as_posix(): file_sha256(file)
        for file in sorted(files, key=lambda file: (file.name, file))
    }
