"""A chat request, from bytes to checked generations: no way to the engine leads around this.

Order: JSON, fields, model and scenario, dials, knobs, ids. Only the parsed body and the key decide;
headers and query are never looked at.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING

from equipoise.config import Sampling
from equipoise.dials.dials import Dials
from equipoise.encoding.template import check_prompt
from equipoise.engine.seam import Generation
from equipoise.errors import DataError, EncodingError, ModelError
from equipoise.policy.decide import Refusal, effective_setting, scenario_for
from equipoise.protocol.replies import (
    Envelope,
    RefusedError,
    as_name,
    bad_request,
    in_words,
    no_such_model,
)
from equipoise.protocol.wire import ChatRequest, parse_chat
from equipoise.seeds import derive_seed
from equipoise.types import DialSetting, Message

if TYPE_CHECKING:
    from equipoise.encoding.encode import Encoder
    from equipoise.policy.rules import Limits
    from equipoise.serve.gate import Visit

_GREEDY_BELOW = 0.01
"""Temperatures below this take the likeliest token: dividing by them would overflow."""
_TOP_K = Sampling().top_k
_CHARACTERS_PER_TOKEN = 16
"""A longer prompt is refused without counting its tokens, which takes seconds per megabyte."""


@dataclass(frozen=True)
class ServedModel:
    """The model behind the server, as far as the server needs it."""

    name: str
    hash: str
    encoder: Encoder
    dials: Dials
    vocab_size: int
    """Ids that exist in tokenizer and model."""
    context: int
    """Positions that the model can hold."""
    scored: bool = False
    """Whether answers are scored; ``best_of`` needs it."""
    salt_key: bytes = field(default_factory=partial(secrets.token_bytes, 32), repr=False)
    """Secret of this process, from which prefix salts are derived."""


@dataclass(frozen=True)
class CheckedChat:
    """A chat request that passed all checks."""

    key_id: str
    request: ChatRequest
    messages: tuple[Message, ...]
    setting: DialSetting
    generations: tuple[Generation, ...]
    """One per choice that is sampled; of these ``request.n`` are given, nearest the setting."""
    envelope: Envelope
    limits: Limits

    @property
    def tokens(self) -> int:
        """Prompt and completion tokens that it may take in all."""
        return sum(
            len(g.prompt_ids) + g.sampling.max_tokens + g.sampling.max_thought_tokens
            for g in self.generations
        )


def prepare(visit: Visit, model: ServedModel) -> CheckedChat:
    """Check the body of a request that passed the gate, and turn it into generations.

    Raises:
        RefusedError: 400 or 404; says what is allowed.
    """
    rules, key, limits = visit.rules, visit.key, visit.rules.policy.limits
    request = parse_chat(visit.body)
    name, at, asked = request.model.partition("@")
    scenario = scenario_for(rules.policy, key, asked if at else None)
    if name != model.name or scenario is None:
        raise no_such_model()
    allowed = rules.policy.scenarios[scenario]
    setting = effective_setting(request.dials, key.ranges, allowed, rules.server)
    if isinstance(setting, Refusal):
        raise bad_request(
            f"dials.{as_name(setting.attribute)}: {setting.message}",
            param="dials",
            code="invalid_dial",
        )
    if request.stream_options is not None and not request.stream:
        raise bad_request("stream_options is for streams", param="stream_options")
    n_sampled = _n_sampled(request, limits, model)
    _check_stops(request.stops)
    bias = _bias(request.logit_bias or {}, model)
    messages = tuple(message.plain() for message in request.messages)
    encoder = model.encoder.with_rendering(rules.rendering)
    prompt_ids = _prompt_ids(messages, encoder, limits)
    control_ids = encoder.control_ids(setting)
    room = model.context - len(prompt_ids) - len(control_ids)
    # At most half of the room, so that an answer fits behind the thought.
    thought_tokens = min(limits.max_thought_tokens, room // 2) if encoder.thinks else 0
    sampling = _sampling(request, limits, room, thought_tokens)
    seed = secrets.randbits(63) if request.seed is None else request.seed
    salt = hmac.new(model.salt_key, key.id.encode(), hashlib.sha256).hexdigest()
    generations = tuple(
        Generation(
            prompt_ids=prompt_ids,
            control_ids=control_ids,
            sampling=sampling,
            seed=derive_seed(seed, "choice", index),
            prefix_salt=salt,
            logit_bias=bias,
        )
        for index in range(n_sampled)
    )
    envelope = Envelope(
        id=visit.id,
        created=int(time.time()),
        model=f"{model.name}@{scenario}",
        requested=request.dials,
        effective=in_words(setting, model.dials),
        scenario=scenario,
        policy_hash=rules.policy_hash,
        model_hash=model.hash,
        prompt_tokens=len(prompt_ids),
    )
    return CheckedChat(key.id, request, messages, setting, generations, envelope, limits)


def _prompt_ids(messages: tuple[Message, ...], encoder: Encoder, limits: Limits) -> tuple[int, ...]:
    if sum(len(m.content) for m in messages) > limits.max_prompt_tokens * _CHARACTERS_PER_TOKEN:
        raise _too_long(f"at most {limits.max_prompt_tokens} tokens are taken")
    try:
        check_prompt(messages)
    except DataError as error:
        raise bad_request(
            f"{error.what}: {error.why}; {error.fix}", param="messages", code="unusable_messages"
        ) from None
    try:
        ids = tuple(encoder.prompt_ids(messages))
    except (DataError, EncodingError, ModelError) as error:
        raise bad_request(error.what, param="messages", code="unusable_messages") from None
    if len(ids) > limits.max_prompt_tokens:
        raise _too_long(f"it has {len(ids)} tokens; at most {limits.max_prompt_tokens} are taken")
    return ids


def _too_long(why: str) -> RefusedError:
    return bad_request(
        f"the prompt is too long, and none is cut off: {why}",
        param="messages",
        code="context_length_exceeded",
    )


def _sampling(request: ChatRequest, limits: Limits, room: int, thought_tokens: int) -> Sampling:
    given = {request.max_tokens, request.max_completion_tokens} - {None}
    if len(given) > 1:
        raise bad_request("max_tokens and max_completion_tokens differ", param="max_tokens")
    asked = request.max_completion_tokens or request.max_tokens
    if asked is not None and asked > limits.max_tokens:
        raise bad_request(f"max_tokens is at most {limits.max_tokens}", param="max_tokens")
    if room < 1:
        raise _too_long("it leaves no room for a completion in the model's context")
    greedy = request.temperature < _GREEDY_BELOW
    return Sampling(
        temperature=1.0 if greedy else request.temperature,
        top_p=1.0 if greedy else request.top_p,
        top_k=1 if greedy else _TOP_K,
        # An upper bound that clients send without knowing the model: the context is another, and a
        # completion that reaches either says `length`.
        max_tokens=min(asked or limits.max_tokens, room - thought_tokens),
        max_thought_tokens=thought_tokens,
    )


def _n_sampled(request: ChatRequest, limits: Limits, model: ServedModel) -> int:
    if request.n > limits.choices:
        raise bad_request(f"n is at most {limits.choices}", param="n")
    if request.best_of is None:
        return request.n
    if not model.scored:
        raise bad_request("best_of needs a server that scores (--score)", param="best_of")
    if request.stream:
        raise bad_request("best_of cannot be streamed: the nearest is known last", param="best_of")
    if not request.n <= request.best_of <= limits.choices:
        raise bad_request(f"best_of is from n to {limits.choices}", param="best_of")
    return request.best_of


def _bias(given: Mapping[str, float], model: ServedModel) -> tuple[tuple[int, float], ...]:
    pairs = tuple(sorted((int(name), value) for name, value in given.items()))
    encoder = model.encoder
    for token_id, _ in pairs:
        if token_id >= model.vocab_size:
            raise bad_request(
                f"ids are below {model.vocab_size}", param="logit_bias", code="unknown_token"
            )
        if token_id in encoder.forbidden or token_id in encoder.masked_ids:
            raise bad_request(
                "logit_bias may not name control tokens or chat markers",
                param="logit_bias",
                code="forbidden_token",
            )
    return pairs


def _check_stops(stops: tuple[str, ...]) -> None:
    try:
        "".join(stops).encode("utf-8")
    except UnicodeEncodeError:
        raise bad_request("a stop string holds half a character", param="stop") from None
