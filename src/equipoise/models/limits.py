"""What a model can hold: ids that have a row in its embedding, and so many tokens at a time.

Behind its last position a model with learnt positions fails, and a rotary one goes on in a way that
it was never trained for. So nothing is sampled that would not fit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from equipoise.errors import DataError, ModelError
from equipoise.types import GenerationRequest, Message, Prompt

if TYPE_CHECKING:
    import torch

    from equipoise.encoding.encode import Encoder


def positions(config: Any) -> int | None:
    """Return how many tokens a model of this config can hold, or None if the config does not say.

    Older names (``n_positions`` of GPT-2) are found as well. Rotary embeddings that change with the
    longest row of a batch (``longrope``) hold as many as before the change: beyond it an answer
    would depend on its neighbours.
    """
    text = config.get_text_config()
    found = [getattr(text, "max_position_embeddings", None)]
    ropes = getattr(text, "rope_parameters", None) or {}
    for rope in (ropes, *ropes.values()):
        if isinstance(rope, dict) and rope.get("rope_type") == "longrope":
            found += [rope.get("original_max_position_embeddings")]
            found += [getattr(text, "original_max_position_embeddings", None)]
    return min((n for n in found if isinstance(n, int) and n > 0), default=None)


def check_room(n_given: int, n_sampled: int, limit: int | None) -> None:
    """Refuse a request that does not fit.

    Args:
        n_given: Tokens of prompt and controls.
        n_sampled: Tokens that may be sampled behind them.
        limit: See :func:`positions`.

    Raises:
        DataError: Together they are more than the model's positions.
    """
    if limit is not None and n_given + n_sampled > limit:
        raise DataError(
            "a request does not fit into the model's context",
            why=f"{n_given} tokens of prompt and {n_sampled} to sample are more than {limit}",
            fix="shorten the conversation or ask for fewer tokens (max_tokens, and "
            "max_thought_tokens where the model thinks)",
        )


def check_requests(
    requests: Sequence[GenerationRequest], max_tokens: int, limit: int | None
) -> None:
    """Refuse requests of which one does not fit, before any of them is sampled.

    Raises:
        DataError: As :func:`check_room`.
    """
    given = (
        len(request.prompt_ids) + len(branch.control_ids)
        for request in requests
        for branch in request.branches
    )
    check_room(max(given, default=0), max_tokens, limit)


def check_prompts(
    prompts: Sequence[Prompt],
    encoder: Encoder,
    limit: int | None,
    *,
    n_controls: int,
    max_tokens: int,
    setting: str,
    fix: str = "",
) -> None:
    """Refuse prompts of which the longest does not fit.

    Args:
        prompts: To be answered.
        encoder: Of the model that answers.
        limit: See :func:`positions`.
        n_controls: Control tokens behind each prompt.
        max_tokens: To sample.
        setting: Where ``max_tokens`` stands in the recipe, for the message.
        fix: What else can be done.

    Raises:
        DataError: It names the longest prompt and the numbers.
    """
    if limit is None or not prompts:
        return
    lengths = [len(encoder.prompt_ids(prompt.messages)) for prompt in prompts]
    longest = max(lengths)
    if longest + n_controls + max_tokens > limit:
        prompt = prompts[lengths.index(longest)]
        room = limit - n_controls - longest
        lower = f"Lower {setting} to {room}" if room > 0 else "Leave long prompts out"
        raise DataError(
            f"The model's context of {limit} tokens is too short for these prompts",
            why=f"The longest, {prompt.id} of {prompt.source}, has {longest} tokens; {n_controls} "
            f"control tokens follow it, and {setting} is {max_tokens}.",
            fix=f"{lower}{fix}.",
        )


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
        chat = encoder.has_chat_template
        written.update(encoder.prompt_ids(asked) if chat else encoder.pair("a", "b").ids)
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
