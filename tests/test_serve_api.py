"""The server through a socket: the official client, streams, aliases, what every answer says."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from equipoise.config import Sampling
from equipoise.errors import ServingError
from equipoise.protocol.replies import RefusedError
from equipoise.serve.limits import RateLimit
from equipoise.steer.served import HttpResponder
from equipoise.types import DialSetting, Message, Prompt
from serve_kit import ANSWER, ATTRIBUTES, Reply, Server, call, chat_body, make_server, running


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Server:
    return make_server(tmp_path_factory.mktemp("api"))


@pytest.fixture(scope="module")
def port(server: Server) -> Iterator[int]:
    with running(server) as port:
        yield port


@pytest.fixture(scope="module")
def client(server: Server, port: int) -> Iterator[openai.OpenAI]:
    base = f"http://127.0.0.1:{port}/v1"
    with openai.OpenAI(base_url=base, api_key=server.secrets["lab"], max_retries=0) as client:
        yield client


HELLO: list[Any] = [{"role": "user", "content": "Hello"}]


def test_official_client_whole(client: openai.OpenAI, server: Server) -> None:
    answer = client.chat.completions.create(
        model="toy",
        messages=HELLO,
        n=2,
        seed=7,
        max_completion_tokens=400,
        extra_body={"dials": {"safety": 1, "helpfulness": {"level": 1}}},
    )
    assert [choice.message.content for choice in answer.choices] == [ANSWER, ANSWER]
    assert [choice.finish_reason for choice in answer.choices] == ["stop", "stop"]
    extra = answer.model_extra
    assert extra is not None
    assert extra["dials"] == {
        "requested": {"safety": 1, "helpfulness": {"level": 1}},
        "effective": {
            "helpfulness": {"level": 1, "value": 0.25},
            "safety": {"level": 4, "value": 1.0},
        },
        "scenario": "general",
    }
    assert extra["policy_hash"] == server.rules().policy_hash
    assert extra["model_hash"] == server.model.hash
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 2 * (len(server.engine.ids) + 1)
    first, second = server.engine.seen[-2:]
    assert first.control_ids == second.control_ids
    assert first.seed != second.seed


def test_an_answer_can_be_sent_back_as_the_official_client_holds_it(
    client: openai.OpenAI, server: Server
) -> None:
    messages: list[Any] = [*HELLO]
    first = client.chat.completions.create(model="toy", messages=messages).choices[0].message
    again: Any = {"role": "user", "content": "And now?"}
    # As the object, and as the plain data that clients keep of it.
    for turn in (first, first.model_dump(), first.to_dict()):
        second = client.chat.completions.create(model="toy", messages=[*messages, turn, again])
        assert second.choices[0].message.content == ANSWER
    plain: Any = {"role": "assistant", "content": ANSWER}
    client.chat.completions.create(model="toy", messages=[*messages, plain, again])
    assert len({seen.prompt_ids for seen in server.engine.seen[-4:]}) == 1


@pytest.mark.parametrize(
    ("turn", "field"),
    [
        ({"role": "assistant", "refusal": "no"}, "refusal"),
        ({"role": "assistant", "tool_calls": [{}]}, "tool_calls"),
        ({"role": "user", "tool_calls": []}, "tool_calls"),
        ({"role": "user", "refusal": None}, "refusal"),
        ({"role": "system", "audio": None}, "audio"),
    ],
)
def test_beside_a_text_only_an_answer_may_say_nothing(
    server: Server, port: int, turn: dict[str, Any], field: str
) -> None:
    body = chat_body() | {"messages": [{"content": "x", **turn}, *HELLO]}
    reply = call(port, "POST", "/v1/chat/completions", body, key=server.secrets["lab"])
    assert reply.status == 400
    assert reply.json["error"]["message"] == f"messages.0.{field}: unknown field"


def test_official_client_stream(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model="toy@kids",
        messages=HELLO,
        n=2,
        stream=True,
        stream_options={"include_usage": True},
        extra_body={"dials": {"safety": 0}},
    )
    texts, finishes, usage, dials = ["", ""], {}, None, []
    for chunk in stream:
        usage = chunk.usage or usage
        if chunk.model_extra and "dials" in chunk.model_extra:
            dials.append(chunk.model_extra["dials"]["effective"]["safety"])
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                finishes[choice.index] = choice.finish_reason
    assert texts == [ANSWER, ANSWER]
    assert finishes == {0: "stop", 1: "stop"}
    assert usage is not None and usage.completion_tokens > 0
    assert dials == [{"level": 4, "value": 1.0}] * 4


def test_stream_is_well_formed(server: Server, port: int) -> None:
    reply = call(
        port, "POST", "/v1/chat/completions", chat_body(stream=True), key=server.secrets["lab"]
    )
    assert reply.headers["content-type"] == "text/event-stream"
    events = reply.body.decode().split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert events.count("data: [DONE]") == 1
    bodies = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert "".join(body["choices"][0]["delta"].get("content", "") for body in bodies) == ANSWER
    assert len(bodies) > 10


def test_models_are_those_of_the_key(client: openai.OpenAI, server: Server, port: int) -> None:
    assert [model.id for model in client.models.list()][:2] == ["toy", "toy@general"]
    assert client.models.retrieve("toy@clinic").id == "toy@clinic"
    kid = call(port, "GET", "/v1/models", key=server.secrets["kid"]).json
    assert [model["id"] for model in kid["data"]] == ["toy", "toy@kids"]
    assert kid["data"][0]["dials"]["safety"] == {"min": 1.0, "max": 1.0}
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("toy@nowhere")


@pytest.mark.parametrize("model", ["toy@general", "toy@nowhere", "other", "toy@", "toy@kids@kids"])
def test_a_key_gets_no_other_scenario_and_learns_of_none(
    server: Server, port: int, model: str
) -> None:
    body = chat_body() | {"model": model}
    reply = call(port, "POST", "/v1/chat/completions", body, key=server.secrets["kid"])
    assert reply.status == 404
    assert reply.json["error"]["code"] == "model_not_found"
    assert "general" not in reply.json["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_body_and_headers_say_what_was_applied(server: Server, port: int, *, stream: bool) -> None:
    asked = {"safety": 0.6, "helpfulness": "auto"}
    body = chat_body(stream=stream, dials=asked)
    reply = call(port, "POST", "/v1/chat/completions", body, key=server.secrets["lab"])
    headers, applied = (
        reply.headers,
        {
            "dials": {
                "requested": asked,
                "effective": {"helpfulness": "auto", "safety": {"level": 3, "value": 0.75}},
                "scenario": "general",
            },
            "policy_hash": server.rules().policy_hash,
            "model_hash": server.model.hash,
        },
    )
    assert json.loads(headers["x-dial-requested"]) == asked
    assert json.loads(headers["x-dial-effective"]) == applied["dials"]["effective"]
    assert headers["x-dial-scenario"] == "general"
    assert headers["x-dial-policy"] == applied["policy_hash"]
    assert headers["x-dial-model"] == applied["model_hash"]
    assert headers["x-request-id"].startswith("chatcmpl-")
    # Of a stream the first and the last event of the choice.
    bodies = [json.loads(e[6:]) for e in reply.body.split(b"\n\n")[:-2]] if stream else [reply.json]
    for one in (bodies[0], bodies[-1]):
        assert {name: one[name] for name in applied} == applied
    assert bodies[-1]["choices"][0]["finish_reason"] == "stop"


def hashes(reply: Reply) -> tuple[str | None, str | None]:
    return reply.headers.get("x-dial-policy"), reply.headers.get("x-dial-model")


def test_every_response_to_a_key_names_policy_and_model(
    server: Server, port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    key, in_force = server.secrets["lab"], (server.rules().policy_hash, server.model.hash)

    def ask(method: str, path: str, body: object = None, key: str | None = key) -> Reply:
        return call(port, method, path, body, key=key)

    for path in ("/readyz", "/metrics", "/openapi.json", "/v1/models", "/v1/models/toy"):
        assert hashes(ask("GET", path)) == in_force
    chat = "/v1/chat/completions"
    refusals = [
        (400, ask("POST", chat, b"{")),
        (400, ask("POST", chat, chat_body(dials={"safety": 7}))),
        (404, ask("POST", chat, chat_body() | {"model": "other"})),
        (404, ask("GET", "/nowhere")),
        (405, ask("PUT", chat)),
        (413, ask("POST", chat, b" " * (2**20 + 1))),
    ]
    with monkeypatch.context() as context:
        context.setattr(server.api, "draining", True)
        refusals.append((503, ask("POST", chat, chat_body())))
    with monkeypatch.context() as context:
        context.setattr(RateLimit, "take", limited)
        refusals.append((429, ask("POST", chat, chat_body())))
    for status, reply in refusals:
        assert reply.status == status
        assert hashes(reply) == in_force, status
    # Whoever has no key learns of neither.
    assert hashes(ask("GET", "/healthz", key=None)) == (None, None)
    assert hashes(ask("GET", "/v1/models", key="eqp-nobody")) == (None, None)


def limited(self: object, key_id: str, per_minute: int) -> None:
    raise RefusedError(429, "too many", code="rate_limit_exceeded")


def test_knobs_reach_the_engine(client: openai.OpenAI, server: Server) -> None:
    client.chat.completions.create(
        model="toy", messages=HELLO, temperature=0, top_p=0.5, max_tokens=3, logit_bias={"5": -2}
    )
    seen = server.engine.seen[-1]
    assert seen.sampling.top_k == 1 and seen.sampling.temperature > 0
    assert seen.sampling.max_tokens == 3
    assert seen.logit_bias == ((5, -2.0),)
    client.chat.completions.create(model="toy", messages=HELLO, temperature=0.5, top_p=0.5)
    assert server.engine.seen[-1].sampling.temperature == 0.5
    assert server.engine.seen[-1].sampling.top_p == 0.5


def test_what_clients_send_unasked_is_taken(server: Server, port: int) -> None:
    """promptfoo's body, field by field; a penalty that would do something is refused."""
    body = chat_body(
        max_tokens=1024, temperature=0, top_p=1, presence_penalty=0, frequency_penalty=0
    )
    key = server.secrets["lab"]
    assert call(port, "POST", "/v1/chat/completions", body, key=key).status == 200
    for name in ("presence_penalty", "frequency_penalty"):
        reply = call(port, "POST", "/v1/chat/completions", body | {name: 0.5}, key=key)
        assert (reply.status, reply.json["error"]["param"]) == (400, name)


def test_none_in_the_official_client_is_not_given(client: openai.OpenAI, server: Server) -> None:
    """It sends null for each."""
    names = ("temperature", "top_p", "n", "stream", "tools", "functions", "metadata", "logprobs",
             "store", "response_format", "service_tier", "audio", "modalities")  # fmt: skip
    nothing: Any = dict.fromkeys(names)
    for more in ({}, nothing):
        client.chat.completions.create(model="toy", messages=HELLO, seed=1, **more)
    assert server.engine.seen[-1] == server.engine.seen[-2]


def test_same_seed_same_generation(client: openai.OpenAI, server: Server) -> None:
    for seed in (3, 3, 4, None, None):
        client.chat.completions.create(model="toy", messages=HELLO, seed=seed or openai.omit)
    a, b, c, d, e = (seen.seed for seen in server.engine.seen[-5:])
    assert a == b and len({b, c, d, e}) == 4


@pytest.mark.parametrize("stream", [False, True])
def test_stop_strings_never_leak(client: openai.OpenAI, *, stream: bool) -> None:
    answer: Any = client.chat.completions.create(
        model="toy", messages=HELLO, stop=["京 🙂 an", "zzz"], stream=stream
    )
    if stream:
        chunks = [chunk.choices[0] for chunk in answer]
        text = "".join(choice.delta.content or "" for choice in chunks)
        finish = chunks[-1].finish_reason
    else:
        text, finish = answer.choices[0].message.content, answer.choices[0].finish_reason
    assert text == "Naïve 東" and finish == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_the_beginning_of_a_stop_string_is_text(client: openai.OpenAI, *, stream: bool) -> None:
    answer: Any = client.chat.completions.create(
        model="toy", messages=HELLO, stop=["and more. Never", "answers"], stream=stream
    )
    if stream:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in answer)
    else:
        text = answer.choices[0].message.content
    assert text == ANSWER


def test_length_is_reported(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="toy", messages=HELLO, max_tokens=2)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage is not None and answer.usage.completion_tokens == 2


def test_prefixes_are_shared_within_a_key_only(server: Server, port: int) -> None:
    for name in ("lab", "lab", "kid"):
        call(port, "POST", "/v1/chat/completions", chat_body(), key=server.secrets[name])
    one, two, other = (seen.prefix_salt for seen in server.engine.seen[-3:])
    assert one == two != other
    assert "lab" not in one


def test_message_parts_are_joined(server: Server, port: int) -> None:
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "text": "lo"}]
    for content in ("Hello", parts):
        body = chat_body() | {"messages": [{"role": "user", "content": content}]}
        assert (
            call(port, "POST", "/v1/chat/completions", body, key=server.secrets["lab"]).status
            == 200
        )
    plain, joined = (seen.prompt_ids for seen in server.engine.seen[-2:])
    assert plain == joined


def test_status_pages(server: Server, port: int) -> None:
    key = server.secrets["lab"]
    assert call(port, "GET", "/healthz").json == {"status": "ok"}
    assert call(port, "GET", "/readyz", key=key).json == {"status": "ready"}
    page = call(port, "GET", "/metrics", key=key)
    assert page.headers["content-type"].startswith("text/plain")
    assert 'equipoise_answers_total{scenario="general"}' in page.body.decode()
    assert "equipoise_completions_under_way 0.0\n" in page.body.decode()
    before = sampled(page)
    server.api.metrics.completion_tokens.inc(123_456_789)
    assert sampled(call(port, "GET", "/metrics", key=key)) == before + 123_456_789
    assert call(port, "GET", "/openapi.json", key=key).json["openapi"] == "3.1.0"


def sampled(page: Reply) -> float:
    """Return the counter of tokens on a page of metrics."""
    lines = dict(line.rsplit(" ", 1) for line in page.body.decode().splitlines())
    return float(lines["equipoise_completion_tokens_total"])


def test_the_responder_of_the_server_answers_or_says_why_not(server: Server, port: int) -> None:
    def responder(key: str, model: str = "toy@security-lab") -> HttpResponder:
        url, sampling = f"http://127.0.0.1:{port}", Sampling(max_tokens=20)
        return HttpResponder(url, key, model, attributes=ATTRIBUTES, sampling=sampling)

    prompts = [Prompt(f"p{i}", (Message("user", "hi"),), "test") for i in range(3)]
    settings = [DialSetting((1, 2)), DialSetting((None, 0))]
    rows = responder(server.secrets["lab"]).respond(prompts, settings, seed=1)
    assert [[one.setting for one in row] for row in rows] == [settings] * 3
    assert [row[0].prompt_id for row in rows] == ["p0", "p1", "p2"]
    refused = {"toy": ("eqp-no", "401, code invalid_api_key")}
    refused["other"] = (server.secrets["lab"], "404, code model_not_found")
    for model, (key, why) in refused.items():
        with pytest.raises(ServingError, match=why):
            responder(key, model).respond(prompts, settings, seed=1)
    with pytest.raises(ServingError, match="applied another setting"):
        responder(server.secrets["kid"], "toy").respond(prompts, settings, seed=1)
