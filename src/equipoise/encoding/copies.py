"""Copies of a tokenizer in which some tokens have other texts, and everything else is the same.

Most tokenizers keep their markers beside the vocabulary, or hold them as pieces that no text gives.
Then a copy can share the model of the original, and costs next to nothing. Where a text could give
one of the pieces the copy is rebuilt from JSON without it, which takes seconds for large ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tokenizers import AddedToken, Tokenizer

from equipoise.errors import ModelError


def can_share(backend: Tokenizer, texts: Mapping[int, str]) -> bool:
    """True if no text gives one of these tokens by the vocabulary alone.

    A piece that the model gives somewhere in a text it also gives for the piece's own text: its
    inner merges (or words) are the same ones.
    """
    model = backend.model
    if getattr(model, "dropout", None) or not all(texts.values()):
        return False
    pieces = [text for text in texts.values() if model.token_to_id(text) is not None]
    return not any(
        model.token_to_id(text) in {token.id for token in model.tokenize(text)} for text in pieces
    )


def shared(
    backend: Tokenizer, renamed: Mapping[int, str], *, keep_normalized: bool
) -> Tokenizer | None:
    """Return a copy with the original's own model, or None if its ids would not be the same.

    Renamed tokens of the vocabulary get new ids behind all others, their texts being new to it.
    """
    copy = Tokenizer(backend.model)
    copy.normalizer, copy.pre_tokenizer = backend.normalizer, backend.pre_tokenizer
    copy.post_processor, copy.decoder = backend.post_processor, backend.decoder
    added: dict[int, AddedToken] = backend.get_added_tokens_decoder()
    vocabulary = {i for i, token in added.items() if copy.token_to_id(token.content) == i}
    vocabulary |= renamed.keys() - added.keys()
    # Those beside the vocabulary first, so that they get the ids that they have in the original.
    order = [*sorted(added.keys() - vocabulary), *sorted(vocabulary)]
    copy.add_special_tokens([_token(added.get(i), renamed.get(i), keep_normalized) for i in order])
    for token_id in order:
        text = renamed.get(token_id) or added[token_id].content
        new = copy.token_to_id(text)
        if new is None:
            return None
        moved = token_id in renamed and token_id in vocabulary
        # A new id must be new: vocabularies may have holes.
        if (backend.id_to_token(new) is not None) if moved else (new != token_id):
            return None
    return copy


def _token(known: AddedToken | None, text: str | None, keep_normalized: bool) -> AddedToken:
    if text is None:
        assert known is not None
        return known
    return AddedToken(
        text,
        lstrip=known is not None and known.lstrip,
        rstrip=known is not None and known.rstrip,
        normalized=known is not None and keep_normalized and known.normalized,
        special=True,
    )


def rebuilt(backend: Tokenizer, renamed: Mapping[int, str], *, keep_normalized: bool) -> Tokenizer:
    """Return a copy made from JSON, whose vocabulary holds the new texts in place of the old.

    Raises:
        ModelError: If the edited JSON is no tokenizer.
    """
    spec: dict[str, Any] = json.loads(backend.to_str())
    texts = {backend.id_to_token(i) or "": text for i, text in renamed.items()}
    listed = {entry["id"] for entry in spec["added_tokens"]}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    unlisted = [
        {"id": token_id, "content": text, "special": True} | flags
        for token_id, text in renamed.items()
        if token_id not in listed
    ]
    entries = [
        entry
        if entry["id"] not in renamed
        else entry
        | {
            "content": renamed[entry["id"]],
            "special": True,
            "single_word": False,
            "normalized": keep_normalized and entry["normalized"],
        }
        for entry in spec["added_tokens"]
    ]
    changed = {
        **spec,
        "truncation": None,
        "padding": None,
        "model": _renamed_model(spec["model"], texts),
        "added_tokens": sorted(unlisted + entries, key=lambda entry: entry["id"]),
    }
    try:
        return Tokenizer.from_str(json.dumps(changed))
    except Exception as error:  # the Rust side raises plain Exception
        raise ModelError(
            "this tokenizer cannot be sealed against untrusted text",
            why=f"its edited copy does not load: {error}",
            fix="use the tokenizer that the model was published with",
        ) from error


def _renamed_model(model: Mapping[str, Any], renamed: Mapping[str, str]) -> dict[str, Any]:
    """Rename pieces of the base vocabulary and drop the merges that would yield them."""
    result = dict(model)
    if model["type"] == "Unigram":
        result["vocab"] = [[renamed.get(piece, piece), score] for piece, score in model["vocab"]]
        return result
    result["vocab"] = {renamed.get(piece, piece): i for piece, i in model["vocab"].items()}
    if model.get("unk_token") in renamed:
        result["unk_token"] = renamed[model["unk_token"]]
    if model["type"] == "BPE":
        skip = len(model.get("continuing_subword_prefix") or "")
        result["dropout"] = None
        pairs = (m.split(" ") if isinstance(m, str) else m for m in model["merges"])
        result["merges"] = [
            [left, right]
            for left, right in pairs
            if not {left, right, left + right[skip:]} & renamed.keys()
        ]
    return result


def vocabulary_moved(backend: Tokenizer, copy: Tokenizer, renamed: Mapping[int, str]) -> bool:
    """True if a rebuilt copy has other ids than the original, beyond the new texts."""
    expected = {renamed.get(i, text): i for text, i in backend.get_vocab().items()}
    return bool(copy.get_vocab() != expected)
