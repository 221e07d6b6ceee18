"""A chat request, from bytes to checked generations: no side door leads around this function.

Order: JSON, fields, model and scenario, dials, knobs, ids. Only the parsed body and the key decide;
headers and query are never looked at.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from equipoise.config import Sampling
from equipoise.dials.dials import Dials
from equipoise.encoding.template import check_prompt
from equipoise.engine.seam import Generation
from equipoise.errors import DataError, EncodingError, ModelError
from equipoise.policy.decide import Key, Limits, Refusal, effective_setting, scenario_for
from equipoise.policy.reload import Rules
from equipoise.protocol.failures import RefusedError, as_name, bad_request
from equipoise.protocol.strict_json import parse
from equipoise.protocol.wire import Applied, ChatRequest, Envelope, in_words, parse_chat
from equipoise.seeds import derive_seed
from equipoise.types import DialSetting, Message

if TYPE_CHECKING:
    from equipoise.encoding.encode import Encoder

_GREEDY_BELOW = 0.01
"""Temperatures below this take the likeliest token: dividing by them would overflow."""
_TOP_K = Sampling().top_k
_CHARACTERS_PER_TOKEN = 16
"""A longer prompt is refused without counting its tokens, which takes seconds per megabyte."""


@dataclass(frozen=True)
class ServedModel:
    """The model behind the door, as far as the door needs it."""

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


@dataclass(frozen=True)
class Job:
    """A request that passed all checks."""

    key_id: str
    messages: tuple[Message, ...]
    setting: DialSetting
    generations: tuple[Generation, ...]
    """One per choice that is sampled."""
    keep: int
    """Choices that are given: the nearest to the setting."""
    stops: tuple[str, ...]
    envelope: Envelope
    stream: bool
    include_usage: bool
    limits: Limits

    @property
    def tokens(self) -> int:
        """Prompt and completion tokens that it may take in all."""
        return sum(
            len(g.prompt_ids) + g.sampling.max_tokens + g.sampling.max_thought_tokens
            for g in self.generations
        )


def prepare(
    body: bytes,
    key: Key,
    rules: Rules,
    model: ServedModel,
    *,
    request_id: str,
    created: int,
    fresh_seed: int,
    salt_key: bytes,
) -> Job:
    """Check a request and turn it into generations.

    Args:
        body: As received.
        key: Of the caller.
        rules: In force when the request came.
        model: The model behind the door.
        request_id: Echoed as ``id``.
        created: Unix seconds.
        fresh_seed: Used where the request names no seed.
        salt_key: Secret of this process, from which prefix salts are derived.

    Raises:
        RefusedError: 400 or 404; says what is allowed.
    """
    request = parse_chat(parse(body))
    scenario_name = _scenario_name(request.model, key, rules, model)
    scenario = rules.policy.scenarios[scenario_name]
    setting = effective_setting(request.dials, key.ranges, scenario, rules.server)
    if isinstance(setting, Refusal):
        raise bad_request(
            f"dials.{as_name(setting.attribute)}: {setting.message}",
            param="dials",
            code="invalid_dial",
        )
    limits = rules.policy.limits
    if request.stream_options is not None and not request.stream:
        raise bad_request("stream_options is for streams", param="stream_options")
    n_sampled = _n_sampled(request, limits, model)
    _check_text(request.stops)
    bias = _bias(request.logit_bias or {}, model)
    messages = tuple(message.plain() for message in request.messages)
    encoder = model.encoder.with_rendering(rules.policy.rendering)
    prompt_ids = _prompt_ids(messages, encoder, limits)
    control_ids = encoder.control_ids(setting)
    room = model.context - len(prompt_ids) - len(control_ids)
    # At most half of the room, so that an answer fits behind the thought.
    thought_tokens = min(limits.max_thought_tokens, room // 2) if encoder.thinks else 0
    sampling = _sampling(request, limits, room, thought_tokens)
    seed = fresh_seed if request.seed is None else request.seed
    salt = hmac.new(salt_key, key.id.encode(), hashlib.sha256).hexdigest()
    applied = Applied(
        requested=request.dials,
        effective=in_words(setting, model.dials),
        scenario=scenario_name,
        policy_hash=rules.policy_hash,
        model_hash=model.hash,
    )
    return Job(
        key_id=key.id,
        messages=messages,
        setting=setting,
        generations=tuple(
            Generation(
                prompt_ids=prompt_ids,
                control_ids=control_ids,
                sampling=sampling,
                seed=derive_seed(seed, "choice", index),
                prefix_salt=salt,
                logit_bias=bias,
            )
            for index in range(n_sampled)
        ),
        keep=request.n,
        stops=request.stops,
        envelope=Envelope(
            request_id, created, f"{model.name}@{scenario_name}", applied, len(prompt_ids)
        ),
        stream=request.stream,
        include_usage=bool(request.stream_options and request.stream_options.include_usage),
        limits=limits,
    )


def _scenario_name(asked: str, key: Key, rules: Rules, model: ServedModel) -> str:
    name, at, scenario = asked.partition("@")
    found = scenario_for(rules.policy, key, scenario if at else None)
    if name != model.name or found is None:
        # One message for all: a key learns of no scenario that it may not use.
        raise RefusedError(
            404,
            "this key has no such model; GET /v1/models lists what it has",
            code="model_not_found",
            param="model",
        )
    return found


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


def _check_text(stops: tuple[str, ...]) -> None:
    try:
        "".join(stops).encode("utf-8")
    except UnicodeEncodeError:
        raise bad_request("a stop string holds half a character", param="stop") from None
