"""Schemathesis against our own OpenAPI document: valid and invalid requests, NUL on."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import positive_data_acceptance
from schemathesis.config import SchemathesisConfig

from equipoise.dials.dials import Dials
from equipoise.protocol.openapi import document
from serve_kit import ATTRIBUTES, LEVELS, Server, make_server, running

LEAK = re.compile(r"0x[0-9a-f]{4}|Traceback|site-packages|\.py\b|/(home|work|tmp|usr)/|equipoise\.")
WITH_NUL = SchemathesisConfig.from_dict({"generation": {"allow-x00": True}})
CHAT, NAMED = "/v1/chat/completions", "/v1/models/{name}"
OPERATIONS = [
    (CHAT, "post"),
    ("/v1/models", "get"),
    (NAMED, "get"),
    ("/openapi.json", "get"),
    ("/readyz", "get"),
    ("/metrics", "get"),
    ("/healthz", "get"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Server:
    return make_server(tmp_path_factory.mktemp("fuzz"))


@pytest.fixture(scope="module")
def port(server: Server) -> Iterator[int]:
    with running(server) as port:
        yield port


def reachable(mode: GenerationMode) -> dict[str, Any]:
    """Return our document; for valid data narrowed, so that requests get past the server."""
    plain = document("toy", Dials(ATTRIBUTES, LEVELS))
    properties = plain["components"]["schemas"]["ChatRequest"]["properties"]
    properties["model"] = {"enum": ["toy", "toy@kids", "toy@security-lab"]}
    if mode is GenerationMode.POSITIVE:
        text = {"type": "string", "pattern": "[a-z]", "maxLength": 200}
        turn = {
            "type": "object",
            "properties": {
                "role": {"const": "user"},
                "content": text,
                "name": {"type": ["string", "null"], "maxLength": 256},
                "type": {"enum": ["text", None]},
            },
            "required": ["role", "content"],
            "additionalProperties": False,
        }
        properties["messages"] = {"type": "array", "items": turn, "minItems": 1, "maxItems": 3}
        properties["n"] = {"type": "integer", "minimum": 1, "maximum": 4}
        for name in ("max_tokens", "max_completion_tokens"):
            properties[name] = {"enum": [1, 20, 512]}
    return plain


def fuzz(server: Server, port: int, path: str, method: str, mode: GenerationMode, n: int) -> None:
    schema = schemathesis.openapi.from_dict(reachable(mode), config=WITH_NUL)
    operation = schema[path][method.upper()]
    statuses: Counter[int] = Counter()
    headers = {"Authorization": f"Bearer {server.secrets['lab']}"}

    @settings(
        max_examples=n, deadline=None, derandomize=True, database=None,
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(operation.as_strategy(generation_mode=mode))
    def one(case: Any) -> None:
        response = case.call(base_url=f"http://127.0.0.1:{port}", headers=headers, timeout=20)
        statuses[response.status_code] += 1
        assert not LEAK.search(response.text)
        # Rules over several fields (the last turn is the user's, a scenario's range, ids that a
        # bias may name) cannot be said in JSON Schema, so valid data may be refused.
        case.validate_response(
            response, excluded_checks=[positive_data_acceptance], headers=headers
        )

    one()
    assert not any(status >= 500 for status in statuses), statuses
    if mode is GenerationMode.POSITIVE and path != NAMED:
        # Of what was sent: a route without parameters has a single example. A name is any text.
        assert statuses[200] > statuses.total() // 10, statuses
    assert server.engine.load().running == 0


VALID, INVALID = GenerationMode.POSITIVE, GenerationMode.NEGATIVE
CASES = [(*operation, VALID) for operation in OPERATIONS]
CASES += [(CHAT, "post", INVALID), (NAMED, "get", INVALID)]  # the others take nothing
TAKES_ANYTHING = {CHAT, NAMED}


def test_all_operations_are_fuzzed() -> None:
    paths = document("toy", Dials(ATTRIBUTES, LEVELS))["paths"]
    assert {(path, method) for path, item in paths.items() for method in item} == set(OPERATIONS)


@pytest.mark.parametrize(("path", "method", "mode"), CASES)
def test_no_5xx_and_no_surprise(
    server: Server, port: int, path: str, method: str, mode: GenerationMode
) -> None:
    fuzz(server, port, path, method, mode, 100 if path in TAKES_ANYTHING else 5)


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("path", "method", "mode"), [case for case in CASES if case[0] in TAKES_ANYTHING]
)
def test_a_thousand_examples(
    server: Server, port: int, path: str, method: str, mode: GenerationMode
) -> None:
    fuzz(server, port, path, method, mode, 1000)
