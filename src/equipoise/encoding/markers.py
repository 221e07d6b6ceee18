"""Which ids are forbidden to untrusted text (docs/threat-model.md)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import TYPE_CHECKING

from equipoise.encoding import sealing
from equipoise.errors import ModelError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from equipoise.dials.manifest import DialManifest
    from equipoise.encoding.template import ChatTemplate


def fast_backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Return the Rust tokenizer behind a fast one; ModelError if there is none."""
    backend: Tokenizer | None = (
        getattr(tokenizer, "backend_tokenizer", None) if tokenizer.is_fast else None
    )
    if backend is None:
        raise ModelError(
            f"{type(tokenizer).__name__} is not a fast tokenizer",
            why="the encoder seals the markers of a tokenizer.json, which this one does not have",
            fix="load it with AutoTokenizer.from_pretrained(..., use_fast=True) or convert it",
        )
    return backend


def control_ids(backend: Tokenizer, manifest: DialManifest | None) -> frozenset[int]:
    """Return the manifest's control ids; ModelError if the tokenizer holds other ids for them."""
    if manifest is None:
        return frozenset()
    for text, token_id in manifest.tokens.items():
        if backend.token_to_id(text) != token_id:
            raise ModelError(
                f"the tokenizer does not hold the control token {text} at id {token_id}",
                why="the dials were installed on another tokenizer, or an export lost them",
                fix="load model, tokenizer and dials.json from one directory",
            )
    return frozenset(manifest.all_ids)


def marker_ids(
    tokenizer: PreTrainedTokenizerBase, backend: Tokenizer, template: ChatTemplate
) -> frozenset[int]:
    """Return ids flagged special and added ids that the template writes (docs/threat-model.md)."""
    added = backend.get_added_tokens_decoder()
    flagged = {token_id for token_id, token in added.items() if token.special}
    flagged |= set(tokenizer.all_special_ids)
    if template.exists:
        # Gemma's line break is an added token that its template writes, and plain text.
        marks = {i: t.content for i, t in added.items() if t.content.strip()}
        literals = template.literals()
        flagged |= {token_id for token_id, text in marks.items() if text in literals}
        for render in template.common_renders():
            ids = set(backend.encode(render, add_special_tokens=False).ids)
            flagged |= ids & marks.keys()
    unknown = tokenizer.unk_token_id
    if unknown is not None and _is_written_for_unknown_text(tokenizer, backend):
        flagged.discard(unknown)
    return frozenset(i for i in flagged if not sealing.is_byte_piece(backend.id_to_token(i) or ""))


def given_ends(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Return the ends that ``generation_config`` lists: one id or several, known to the tokenizer.

    Where that file is missing its place is taken by ``config.json``, whose ids may be mere defaults
    of the model's class: of these only markers count.
    """
    config = getattr(model, "generation_config", None)
    listed = getattr(config, "eos_token_id", None)
    ids = listed if isinstance(listed, (list, tuple)) else [listed]
    backend = fast_backend(tokenizer)
    known = [i for i in ids if type(i) is int and i >= 0 and backend.id_to_token(i) is not None]
    if getattr(config, "_from_model_config", False):
        marks = backend.get_added_tokens_decoder().keys() | set(tokenizer.all_special_ids)
        known = [i for i in known if i in marks]
    return tuple(known)


def _is_written_for_unknown_text(tokenizer: PreTrainedTokenizerBase, backend: Tokenizer) -> bool:
    """True if ordinary text can give the unknown token, and it has no second role."""
    token, model = str(tokenizer.unk_token), backend.model
    if type(model).__name__ == "Unigram":  # it shows these two in its JSON only
        spec = json.loads(backend.to_str())["model"]
        can_happen = spec["unk_id"] is not None and not spec["byte_fallback"]
    else:
        bytes_cover_all = getattr(model, "byte_fallback", False)
        can_happen = getattr(model, "unk_token", None) == token and not bytes_cover_all
    if not can_happen:
        return False
    roles = {name: t for name, t in tokenizer.special_tokens_map.items() if name != "unk_token"}
    others = {str(t) for entry in roles.values() for t in _as_list(entry)}
    return token not in others and token not in str(tokenizer.chat_template or "")


def _as_list(entry: object) -> Iterable[object]:
    return entry if isinstance(entry, (list, tuple)) else [entry]
