"""Control tokens: their manifest, how they are installed, saved and found again.

One token per attribute and level, and one auto token per attribute (DESIGN section 1). The manifest
travels with the model as ``dials.json``; :func:`verify` holds the two against each other.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from equipoise.dials.dials import Dials
from equipoise.dials.files import file_hashes
from equipoise.dials.manifest import (
    MANIFEST_NAME,
    control_tokens,
    installed_tokens,
    tokenizer_hash,
    write_manifest,
)
from equipoise.dials.manifest import DialManifest as DialManifest
from equipoise.dials.manifest import read_manifest as read_manifest
from equipoise.dials.verify import refuse_lost_manifest as refuse_lost_manifest
from equipoise.dials.verify import verify as verify
from equipoise.dials.verify import verify_files as verify_files
from equipoise.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_ATTRIBUTE = re.compile(r"[a-z][a-z0-9_]*")


def install(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dials: Dials,
    base_model: str = "",
    base_model_hash: str = "",
) -> DialManifest:
    """Add the control tokens to a tokenizer and their rows to a model, both in place.

    Deterministic: the same model and arguments give the same rows. If the same dials are already
    installed their rows stay as they are.

    Args:
        model: A causal LM, tied or untied head.
        tokenizer: Its fast tokenizer.
        dials: Attributes and levels.
        base_model: Name of the model, for the manifest.
        base_model_hash: Its hash, for the manifest.

    Raises:
        ConfigError: If an attribute name or the number of levels is not usable.
        ModelError: If dials of another shape are already installed.
    """
    from tokenizers import AddedToken

    from equipoise.dials import embeddings as rows

    _check_names(dials)
    texts = control_tokens(dials)
    before = tokenizer.get_vocab()
    present = installed_tokens(before) | (before.keys() & set(texts))
    if present and present != set(texts):
        raise ModelError(
            "other dials are already installed on this tokenizer",
            why=f"it holds {len(present)} control tokens, e.g. {min(present)}, where "
            f"{', '.join(dials.attributes)} with {dials.levels} levels need {len(texts)}",
            fix="start from the untouched model, or use the attributes and levels of that tuning",
        )
    if not present:
        tokens = [AddedToken(text, special=True, normalized=False) for text in texts]
        tokenizer.add_tokens(tokens, special_tokens=True)
    vocabulary = tokenizer.get_vocab()
    ids = [vocabulary[text] for text in texts]
    table = [ids[i : i + dials.levels + 1] for i in range(0, len(ids), dials.levels + 1)]
    has_rows = rows.row_count(model) > max(ids)
    if not (present and has_rows):
        rows.add_rows(model, table)
    return DialManifest(
        attributes=tuple(dials.attributes),
        levels=dials.levels,
        token_ids={a: tuple(row[:-1]) for a, row in zip(dials.attributes, table, strict=True)},
        auto_ids={a: row[-1] for a, row in zip(dials.attributes, table, strict=True)},
        tokenizer_hash=tokenizer_hash(tokenizer),
        row_hashes=rows.row_hashes(model, ids),
        tied=rows.is_tied(model),
        base_model=base_model,
        base_model_hash=base_model_hash,
    )


def make_room(model: PreTrainedModel, manifest: DialManifest) -> None:
    """Give a base the rows that it lacks for its control tokens, as :func:`install` had them."""
    from equipoise.dials import embeddings as rows

    if rows.row_count(model) <= max(manifest.all_ids):
        rows.add_rows(
            model, [(*manifest.token_ids[a], manifest.auto_ids[a]) for a in manifest.attributes]
        )


def save_dial_model(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    manifest: DialManifest,
    directory: Path,
) -> DialManifest:
    """Write model, tokenizer and ``dials.json``; return the manifest as written.

    The hashes in the manifest are taken afresh, as tuning moves the control rows. ``dials.json`` is
    written last: a directory without it is not a finished one.
    """
    from equipoise.dials import embeddings as rows

    directory.mkdir(parents=True, exist_ok=True)
    # peft would add the whole embedding table, as it was resized; the control rows are in the
    # adapter already.
    lean: dict[str, Any] = {"save_embedding_layers": False} if hasattr(model, "peft_config") else {}
    model.save_pretrained(directory, **lean)
    tokenizer.save_pretrained(directory)
    files = file_hashes(directory)
    files.pop(MANIFEST_NAME, None)
    written = manifest.model_copy(
        update={
            "row_hashes": rows.row_hashes(model, manifest.all_ids),
            "tokenizer_hash": tokenizer_hash(tokenizer),
            "tied": rows.is_tied(model),
            "files": files,
        }
    )
    return write_manifest(written, directory)


def _check_names(dials: Dials) -> None:
    bad = [name for name in dials.attributes if not _ATTRIBUTE.fullmatch(name)]
    if (
        bad
        or not dials.attributes
        or len(set(dials.attributes)) != len(dials.attributes)
        or dials.levels < 2
    ):
        raise ConfigError(
            f"cannot install dials {list(dials.attributes)} with {dials.levels} levels",
            why="attributes are distinct names of a-z, 0-9 and _ (a letter first); levels >= 2",
            fix="correct attributes or levels in the recipe",
        )
