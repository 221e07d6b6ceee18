"""Does a loaded model still carry the dials that its manifest promises?

Exports lose control tokens in silent ways (a merge without the new rows, a tokenizer of the base
model, a head tied again); the model then answers, but to no dial.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from equipoise.dials.files import file_hashes
from equipoise.dials.manifest import (
    MANIFEST_NAME,
    DialManifest,
    installed_tokens,
    tokenizer_hash,
)
from equipoise.errors import ModelError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_COPY_TOKENIZER = "copy the tokenizer files and dials.json from the directory that tuning wrote"
_EXPORT_AGAIN = (
    "export again from the directory that tuning wrote, with the embedding rows included"
)


def verify(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, manifest: DialManifest
) -> None:
    """Check a model and its tokenizer against their manifest.

    Raises:
        ModelError: At the first thing that differs, with the way to mend it.
    """
    _verify_tokenizer(tokenizer, manifest)
    _verify_rows(model, manifest)


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


def _verify_tokenizer(tokenizer: PreTrainedTokenizerBase, manifest: DialManifest) -> None:
    vocabulary = tokenizer.get_vocab()
    for text, token_id in manifest.tokens.items():
        if text not in vocabulary:
            raise _refuse(f"the tokenizer lacks the control token {text}", _COPY_TOKENIZER)
        if vocabulary[text] != token_id:
            raise _refuse(
                f"{text} has id {vocabulary[text]} in the tokenizer, {token_id} in dials.json",
                _COPY_TOKENIZER,
            )
    extra = installed_tokens(vocabulary) - manifest.tokens.keys()
    if extra:
        raise _refuse(
            f"the tokenizer holds the control token {min(extra)}, which dials.json does not name",
            _COPY_TOKENIZER,
        )
    for text, token_id in manifest.tokens.items():
        added = tokenizer.added_tokens_decoder.get(token_id)
        if added is None or not added.special or added.normalized:
            raise _refuse(f"{text} is no longer flagged as a special token", _COPY_TOKENIZER)
    if tokenizer_hash(tokenizer) != manifest.tokenizer_hash:
        raise _refuse(
            "the tokenizer is not the one that the model was tuned with (other pieces, added "
            "tokens or chat template)",
            _COPY_TOKENIZER,
        )


def _verify_rows(model: PreTrainedModel, manifest: DialManifest) -> None:
    from equipoise.dials import embeddings as rows

    count, last = rows.row_count(model), max(manifest.all_ids)
    if count <= last:
        raise _refuse(
            f"the embedding has {count} rows, but the last control token has id {last}",
            _EXPORT_AGAIN,
        )
    size = model.config.get_text_config().vocab_size
    if size != count:
        raise _refuse(
            f"config.json says vocab_size {size}, but the embedding has {count} rows",
            f"set vocab_size to {count} in config.json, or " + _EXPORT_AGAIN,
        )
    output = rows.head(model)
    if output is not None and output.shape[0] != count:
        raise _refuse(
            f"the output head has {output.shape[0]} rows, the embedding {count}", _EXPORT_AGAIN
        )
    tied = rows.is_tied(model)
    # An adapter's head is its base's, whose hash is compared; before, it counted as untied.
    if tied != manifest.tied and not hasattr(model, "peft_config"):
        was, now = ("untied", "tied") if not manifest.tied else ("tied", "untied")
        raise _refuse(
            f"the output head was {was} when the model was tuned and is {now} now",
            f"set tie_word_embeddings to {str(manifest.tied).lower()} in config.json and "
            + _EXPORT_AGAIN,
        )
    found = rows.row_hashes(model, manifest.all_ids)
    dtype = str(rows.embedding(model).dtype).removeprefix("torch.")
    for part in ("input",) if tied else ("input", "output"):
        key = f"{part}/{dtype}"
        if found.get(key) != manifest.row_hashes.get(key):
            name = "embedding" if part == "input" else "output head"
            raise _refuse(
                f"the control rows of the {name} are not those that were tuned", _EXPORT_AGAIN
            )
