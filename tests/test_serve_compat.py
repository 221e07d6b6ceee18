"""OpenAI's chat schema: null is "not given", what changes nothing is taken, the rest refused."""

from __future__ import annotations

import asyncio
import json
import random
import re
from pathlib import Path
from typing import Any, get_type_hints

import pytest
from openai.types.chat import (
    ChatCompletionAssistantMessageParam,
    ChatCompletionContentPartTextParam,
    ChatCompletionDeveloperMessageParam,
    ChatCompletionStreamOptionsParam,
)
from openai.types.chat.completion_create_params import (
    CompletionCreateParamsNonStreaming,
    CompletionCreateParamsStreaming,
)

from equipoise.protocol.compat import ANSWER_FIELDS, NeutralFields
from equipoise.protocol.wire import ChatMessage, ChatRequest, StreamOptions, TextPart
from serve_kit import Reply, Server, ask, chat_body, dialled, make_server, served_model
from tokenizer_kit import FAMILIES, MARKERS, hostile

PAGE = Path(__file__).parent.parent / "docs" / "serving.md"
REQUIRED = {"model", "messages"}
OPENAI = set(get_type_hints(CompletionCreateParamsNonStreaming)) | set(
    get_type_hints(CompletionCreateParamsStreaming)
)

NEUTRAL: dict[str, list[Any]] = {
    "frequency_penalty": [0, 0.0],
    "function_call": ["none", "auto"],
    "functions": [[]],
    "logprobs": [False],
    "metadata": [{}],
    "modalities": [["text"]],
    "n": [1],
    "parallel_tool_calls": [True, False],
    "presence_penalty": [0],
    "prompt_cache_key": ["k"],
    "prompt_cache_retention": ["in_memory"],
    "response_format": [{"type": "text"}],
    "safety_identifier": ["s"],
    "service_tier": ["auto", "default"],
    "store": [False],
    "temperature": [1],
    "tool_choice": ["none", "auto"],
    "tools": [[]],
    "top_p": [1],
    "user": ["u"],
    "verbosity": ["medium"],
}
ASKS: dict[str, list[Any]] = {
    "audio": [{"voice": "alloy", "format": "wav"}],
    "frequency_penalty": [0.1, -1, float("inf")],
    "function_call": [{"name": "f"}],
    "functions": [[{"name": "f"}]],
    "logprobs": [True, 0],
    "metadata": [{"a": "b"}],
    "modalities": [["text", "audio"], ["audio"], []],
    "moderation": [{"model": "omni-moderation-latest"}],
    "n": [5, 1.0],
    "parallel_tool_calls": [1],
    "prediction": [{"type": "content", "content": "x"}],
    "presence_penalty": [0.1],
    "prompt_cache_options": [{"mode": "explicit"}],
    "prompt_cache_retention": ["24h"],
    "reasoning_effort": ["low"],
    "response_format": [{"type": "json_object"}, {"type": "text", "x": 1}],
    "service_tier": ["flex", "priority"],
    "store": [True],
    "tool_choice": ["required", {"type": "function", "function": {"name": "f"}}],
    "tools": [[{"type": "function", "function": {"name": "f"}}], {}],
    "top_logprobs": [5],
    "user": ["x" * 257, 1],
    "prompt_cache_key": ["x" * 257],
    "safety_identifier": ["x" * 257],
    "verbosity": ["low"],
    "web_search_options": [{}],
}
TURNS: list[tuple[str, dict[str, Any]]] = [
    ("user", {"name": "Bob"}),
    ("user", {"name": None}),
    ("user", {"type": "text"}),
    ("user", {"type": None}),
    ("system", {"name": "x", "type": "text"}),
    ("developer", {"name": "x"}),
    ("assistant", {"tool_calls": []}),
    ("assistant", {"name": None, "annotations": [], "refusal": None}),
    ("assistant", {"audio": None, "function_call": None, "tool_calls": None, "annotations": None}),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Server:
    return make_server(tmp_path_factory.mktemp("compat"))


def send(server: Server, body: dict[str, Any]) -> Reply:
    async def one() -> Reply:
        await server.engine.start()
        return await ask(server.app, json.dumps(body).encode(), key=server.secrets["lab"])

    return asyncio.run(one())


def same_as_without(server: Server, body: dict[str, Any], plain: dict[str, Any]) -> None:
    """The engine gets what it gets without the additions, and the client too."""
    replies = [send(server, {**one, "seed": 3}) for one in (plain, body)]
    assert [reply.status for reply in replies] == [200, 200], replies[1].body
    assert server.engine.seen[-1] == server.engine.seen[-2]
    kept = [
        {name: value for name, value in reply.json.items() if name not in ("id", "created")}
        for reply in replies
    ]
    assert kept[0] == kept[1]


def test_every_field_of_the_schema_is_decided() -> None:
    assert set(ChatRequest.model_fields) >= OPENAI
    assert set(ChatRequest.model_fields) - OPENAI == {"dials", "best_of"}
    assert set(NeutralFields.model_fields) <= OPENAI
    assert set(get_type_hints(ChatCompletionStreamOptionsParam)) == set(StreamOptions.model_fields)
    assert set(get_type_hints(ChatCompletionContentPartTextParam)) == set(TextPart.model_fields)
    turn = set(ChatMessage.model_fields)
    assert set(get_type_hints(ChatCompletionDeveloperMessageParam)) <= turn
    assert set(get_type_hints(ChatCompletionAssistantMessageParam)) <= turn | set(ANSWER_FIELDS)


def test_every_field_of_the_schema_is_in_the_docs() -> None:
    text = PAGE.read_text("utf-8")
    for name in {*ChatRequest.model_fields, *ANSWER_FIELDS}:
        assert re.search(rf"`{name}`", text), name
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", text, re.MULTILINE))
    for name, field in NeutralFields.model_fields.items():
        for only in field.metadata:
            if hasattr(only, "schema"):
                values = [json.dumps(one) for one in only.schema()["enum"] if one is not None]
                assert re.findall(r"`([^`]+)`", rows[name]) == values, name


@pytest.mark.parametrize("name", sorted(OPENAI - REQUIRED))
def test_null_is_not_given(server: Server, name: str) -> None:
    same_as_without(server, chat_body() | {name: None}, chat_body())


def test_null_in_all_fields_at_once(server: Server) -> None:
    body = chat_body() | dict.fromkeys(OPENAI - REQUIRED)
    same_as_without(server, body, chat_body())
    streamed = {"stream": True, "stream_options": {"include_usage": None}}
    assert b"[DONE]" in send(server, chat_body() | streamed).body


@pytest.mark.parametrize("name", sorted(REQUIRED | {"dials"}))
def test_what_must_be_there_may_not_be_null(server: Server, name: str) -> None:
    assert send(server, chat_body() | {name: None}).json["error"]["param"] == name


def pairs(table: dict[str, list[Any]]) -> list[tuple[str, Any]]:
    return [(name, value) for name, values in table.items() for value in values]


@pytest.mark.parametrize(("name", "value"), pairs(NEUTRAL))
def test_values_that_change_nothing_are_taken(server: Server, name: str, value: object) -> None:
    same_as_without(server, chat_body() | {name: value}, chat_body())


@pytest.mark.parametrize(("name", "value"), pairs(ASKS))
def test_values_that_ask_for_what_is_not_here_are_refused(
    server: Server, name: str, value: object
) -> None:
    before = len(server.engine.seen)
    error = send(server, chat_body() | {name: value}).json["error"]
    assert error["param"] == name and error["message"].startswith(name)
    assert len(server.engine.seen) == before


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"frequency_penalty": 0.1}, "frequency_penalty: only 0 is taken"),
        ({"tools": [1]}, "tools: only null or [] is taken"),
        ({"tool_choice": "required"}, 'tool_choice: only null, "none" or "auto" is taken'),
        ({"audio": {}}, "audio: only null is taken"),
        ({"chat_template": "x"}, "chat_template: unknown field"),
        (
            {
                "messages": [
                    {"role": "assistant", "content": None},
                    {"role": "user", "content": "a"},
                ]
            },
            "messages.0.content: is missing",
        ),
        (
            {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
            "this is not a prompt: its last turn is the assistant's, not the user's; "
            "give chat messages up to and including a user turn with text",
        ),
    ],
)
def test_a_refusal_says_what_is_taken(server: Server, body: dict[str, Any], message: str) -> None:
    assert send(server, chat_body() | body).json["error"]["message"] == message


@pytest.mark.parametrize(("role", "beside"), TURNS)
def test_turns_may_hold_what_changes_nothing(
    server: Server, role: str, beside: dict[str, Any]
) -> None:
    turn, last = {"role": role, "content": "be brief"}, {"role": "user", "content": "hi"}
    body, plain = (chat_body() | {"messages": [one, last]} for one in ({**turn, **beside}, turn))
    same_as_without(server, body, plain)


@pytest.mark.parametrize(
    "beside",
    [{"name": "x" * 257}, {"name": 1}, {"type": "message"}, {"tool_calls": [{"id": "x"}]},
     {"refusal": "no"}, {"annotations": [{}]}, {"audio": {"id": "x"}}, {"weight": 0}],
)  # fmt: skip
def test_turns_may_hold_nothing_else(server: Server, beside: dict[str, Any]) -> None:
    turn = {"role": "assistant", "content": "x", **beside}
    reply = send(server, chat_body() | {"messages": [turn, {"role": "user", "content": "a"}]})
    assert reply.status == 400
    assert f"messages.0.{next(iter(beside))}: " in reply.json["error"]["message"]


# --- developer ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_developer_turn_is_a_system_turn_and_no_marker(tmp_path: Path, family: str) -> None:
    encoder = dialled(FAMILIES[family]())
    assert encoder.manifest is not None
    server, rng = make_server(tmp_path, model=served_model(encoder)), random.Random("developer")
    controls = [encoder.tokenizer.convert_ids_to_tokens(i) for i in encoder.manifest.all_ids]
    for text in ["be brief", *controls, *(hostile(rng, MARKERS[family]) for _ in range(20))]:
        replies = []
        for role in ("system", "developer"):
            turns = [{"role": role, "content": text}, {"role": "user", "content": "hi"}]
            replies.append(send(server, chat_body() | {"messages": turns, "seed": 3}))
        system, developer = replies
        assert system.status == developer.status
        if system.status == 200:
            assert developer.json["choices"] == system.json["choices"]
            assert server.engine.seen[-1] == server.engine.seen[-2]
            assert not set(server.engine.seen[-1].prompt_ids) & set(encoder.manifest.all_ids)
        else:
            assert system.json == developer.json


def test_a_developer_turn_has_the_limits_of_a_system_turn(tmp_path: Path) -> None:
    server = make_server(tmp_path, limits={"max_prompt_tokens": 60})
    turns = [{"role": "developer", "content": "a b " * 100}, {"role": "user", "content": "hi"}]
    error = send(server, chat_body() | {"messages": turns}).json["error"]
    assert error["code"] == "context_length_exceeded"
