"""Whether every id that the encoder writes has a row in the embedding."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from equipoise.errors import DataError, ModelError
from equipoise.types import Message

if TYPE_CHECKING:
    import torch

    from equipoise.encoding.encode import Encoder


def masked_ids(encoder: Encoder, model: Any) -> torch.Tensor:
    """Return the ids (M,) that must never be sampled, of those that have a logit."""
    import torch

    n_logits = int(model.config.get_text_config().vocab_size)
    return torch.tensor([i for i in encoder.masked_ids if i < n_logits], dtype=torch.long)


def check_vocabulary(place: str, model: Any, encoder: Encoder) -> None:
    """Refuse a tokenizer that writes ids for which the model has no row.

    Ids that neither a text nor the template gives may lie beyond: a padding token that only the
    tokenizer knows, say.

    Raises:
        ModelError: It names the token.
    """
    n_rows = int(model.get_input_embeddings().weight.shape[0])
    vocabulary: dict[str, int] = encoder.tokenizer.get_vocab()
    beyond = {text: i for text, i in vocabulary.items() if i >= n_rows}
    if not beyond:
        return
    written = set(beyond.values()) - encoder.forbidden | set(encoder.eos_ids)
    try:
        asked = (Message("user", "a"),)
        if encoder.has_chat_template:
            written.update(encoder.prompt_ids(asked))
        else:
            written.update(encoder.pair("a", "b").ids)
    except DataError:  # a template that wants other turns; those are checked as they come
        pass
    for text, token_id in beyond.items():
        if token_id in written:
            raise ModelError(
                f"The tokenizer of {place} does not belong to its weights",
                why=f"It writes {text!r} as id {token_id}, and the embedding has {n_rows} rows.",
                fix="Take tokenizer and weights from one place, or resize the embedding and train "
                "the new rows.",
            )
