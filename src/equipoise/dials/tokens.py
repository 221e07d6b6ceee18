"""Control tokens: their manifest, how they are installed, saved and found again.

One token per attribute and level, and one auto token per attribute (docs/dials.md). The manifest
travels with the model as ``dials.json``; :func:`verify` holds the two against each other.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from equipoise.dials import embeddings as rows
from equipoise.dials.dials import Dials
from equipoise.dials.manifest import (
    MANIFEST_NAME,
    DialManifest,
    control_tokens,
    file_hashes,
    installed_tokens,
    tokenizer_hash,
    write_manifest,
)
from equipoise.errors import ConfigError, ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_ATTRIBUTE = re.compile(r"[a-z][a-z0-9_]*")
_COPY_TOKENIZER = "copy the tokenizer files and dials.json from the directory that tuning wrote"
_EXPORT_AGAIN = (
    "export again from the directory that tuning wrote, with the embedding rows included"
)


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
    if rows.row_count(model) <= max(manifest.all_ids):
        rows.add_rows(model, manifest.table)


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


def verify(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, manifest: DialManifest
) -> None:
    """Check a model and its tokenizer against their manifest.

    Exports lose control tokens in silent ways (a merge without the new rows, a tokenizer of the
    base model, a head tied again); the model then answers, but to no dial.

    Raises:
        ModelError: At the first thing that differs, with the way to mend it.
    """
    if wrong := _wrong_tokenizer(tokenizer, manifest):
        raise _refuse(wrong, _COPY_TOKENIZER)
    wrong, first = _wrong_rows(model, manifest)
    if wrong:
        raise _refuse(wrong, first + _EXPORT_AGAIN)


def verify_files(directory: Path, manifest: DialManifest) -> None:
    """Check that a directory holds the files that its manifest names, byte for byte, and no others.

    A manifest of before names none.

    Raises:
        ModelError: One is changed, missing, or was added.
    """
    if not manifest.files:
        return
    found = file_hashes(directory)
    del found[MANIFEST_NAME]
    for name in sorted(found.keys() | manifest.files.keys()):
        if found.get(name) != manifest.files.get(name):
            if name not in found:
                state = "is gone"
            else:
                state = "was changed" if name in manifest.files else "was added"
            raise _refuse(
                f"{name} {state} since dials.json was written",
                "copy the whole directory that tuning wrote; to change a model, save it anew with "
                "`save_dial_model`",
            )


def refuse_lost_manifest(place: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a model whose tokenizer holds dials, but whose directory holds no ``dials.json``.

    Raises:
        ModelError: With the way to mend it.
    """
    found = installed_tokens(tokenizer.get_vocab())
    if found:
        raise _refuse(
            f"the tokenizer of {place} holds the control token {min(found)}, and there is no "
            f"{MANIFEST_NAME}",
            _COPY_TOKENIZER,
        )


def _refuse(why: str, fix: str) -> ModelError:
    return ModelError("the dials of this model are broken", why=why, fix=fix)


def _wrong_tokenizer(tokenizer: PreTrainedTokenizerBase, manifest: DialManifest) -> str:
    vocabulary, added = tokenizer.get_vocab(), tokenizer.added_tokens_decoder
    for text, token_id in manifest.tokens.items():
        if text not in vocabulary:
            return f"the tokenizer lacks the control token {text}"
        if vocabulary[text] != token_id:
            return f"{text} has id {vocabulary[text]} in the tokenizer, {token_id} in dials.json"
    if extra := installed_tokens(vocabulary) - manifest.tokens.keys():
        return f"the tokenizer holds the control token {min(extra)}, which dials.json does not name"
    for text, token_id in manifest.tokens.items():
        token = added.get(token_id)
        if token is None or not token.special or token.normalized:
            return f"{text} is no longer flagged as a special token"
    if tokenizer_hash(tokenizer) != manifest.tokenizer_hash:
        return (
            "the tokenizer is not the one that the model was tuned with (other pieces, added "
            "tokens or chat template)"
        )
    return ""


def _wrong_rows(model: PreTrainedModel, manifest: DialManifest) -> tuple[str, str]:
    """Return what is wrong, and what to do before the model is exported again."""
    count, last = rows.row_count(model), max(manifest.all_ids)
    if count <= last:
        return f"the embedding has {count} rows, but the last control token has id {last}", ""
    size = model.config.get_text_config().vocab_size
    if size != count:
        wrong = f"config.json says vocab_size {size}, but the embedding has {count} rows"
        return wrong, f"set vocab_size to {count} in config.json, or "
    output = rows.head(model)
    if output is not None and output.shape[0] != count:
        return f"the output head has {output.shape[0]} rows, the embedding {count}", ""
    tied = rows.is_tied(model)
    # An adapter's head is its base's, whose hash is compared; before, it counted as untied.
    if tied != manifest.tied and not hasattr(model, "peft_config"):
        was, now = ("untied", "tied") if tied else ("tied", "untied")
        wrong = f"the output head was {was} when the model was tuned and is {now} now"
        return wrong, f"set tie_word_embeddings to {str(manifest.tied).lower()} in config.json and "
    found = rows.row_hashes(model, manifest.all_ids)
    dtype = str(rows.embedding(model).dtype).removeprefix("torch.")
    for part, name in (("input", "embedding"), ("output", "output head"))[: 1 if tied else 2]:
        key = f"{part}/{dtype}"
        if found.get(key) != manifest.row_hashes.get(key):
            return f"the control rows of the {name} are not those that were tuned", ""
    return "", ""
