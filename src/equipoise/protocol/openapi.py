"""The OpenAPI document, from the wire models and the route table."""

from __future__ import annotations

from typing import Any, get_args

from equipoise.dials.dials import Dials
from equipoise.protocol.wire import ChatRequest
from equipoise.types import Finish

_REF = "#/components/schemas/{model}"


def document(model: str, dials: Dials) -> dict[str, Any]:
    """Return the OpenAPI 3.1 document.

    Args:
        model: Name of the served model.
        dials: The model's.
    """
    request = ChatRequest.model_json_schema(ref_template=_REF)
    schemas = request.pop("$defs", {})
    dial = {
        "anyOf": [
            {"type": "number", "minimum": 0, "maximum": 1},
            {
                "type": "object",
                "properties": {
                    "level": {"type": "integer", "minimum": 0, "maximum": dials.levels - 1}
                },
                "required": ["level"],
                "additionalProperties": False,
            },
            {"const": "auto"},
        ]
    }
    request["properties"]["dials"] = {
        "type": "object",
        "properties": dict.fromkeys(dials.attributes, dial),
        "additionalProperties": False,
    }
    request["properties"]["model"]["examples"] = [model]
    chat = {
        "operationId": "chat",
        "summary": "Answer a chat at a dial setting.",
        "requestBody": {
            "required": True,
            "content": {"application/json": {"schema": _ref("ChatRequest")}},
        },
        "responses": {
            "200": {
                "description": "The answer, or its events.",
                "content": {
                    "application/json": {"schema": _ref("ChatCompletion")},
                    "text/event-stream": {"schema": _ref("Event")},
                },
            },
            **_errors(400, 401, 404, 408, 413, 415, 421, 429, 431, 503, 504),
        },
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "Equipoise", "version": "1"},
        "security": [{"key": []}],
        "paths": {
            "/v1/chat/completions": {"post": chat},
            "/v1/models": {"get": _get("models", "Models and scenarios of this key.", "Models")},
            "/v1/models/{name}": {
                "get": {
                    **_get("model", "One of them.", "Model", 404),
                    "parameters": [
                        {
                            "name": "name",
                            "in": "path",
                            "required": True,
                            "schema": {"type": "string", "minLength": 1},
                        }
                    ],
                }
            },
            "/readyz": {"get": _get("readyz", "Whether answers can be given.", "Status")},
            "/metrics": {"get": _text("metrics", "Counters for Prometheus.")},
            "/openapi.json": {"get": _get("openapi", "This document.", "Anything")},
            "/healthz": {"get": {**_get("healthz", "Whether it runs.", "Status"), "security": []}},
        },
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": {**schemas, "ChatRequest": request, **_ANSWERS},
        },
    }


def _ref(name: str) -> dict[str, str]:
    return {"$ref": _REF.format(model=name)}


def _errors(*statuses: int) -> dict[str, Any]:
    content = {"application/json": {"schema": _ref("Error")}}
    return {str(status): {"description": "Refused.", "content": content} for status in statuses}


def _get(name: str, summary: str, schema: str, *more: int) -> dict[str, Any]:
    return {
        "operationId": name,
        "summary": summary,
        "responses": {
            "200": {
                "description": "Done.",
                "content": {"application/json": {"schema": _ref(schema)}},
            },
            **_errors(401, 408, 413, 415, 421, 429, 431, 503, *more),
        },
    }


def _text(name: str, summary: str) -> dict[str, Any]:
    operation = _get(name, summary, "Anything")
    operation["responses"]["200"]["content"] = {"text/plain": {"schema": {"type": "string"}}}
    return operation


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": sorted(properties)}


_STRING, _COUNT = {"type": "string"}, {"type": "integer", "minimum": 0}
_NULLABLE = {"type": ["string", "null"]}
_FINISH = {"enum": list(get_args(Finish))}
_ANSWERS: dict[str, Any] = {
    "Anything": {"type": "object"},
    "Event": _object(data=_STRING),
    "Status": _object(status=_STRING),
    "Error": _object(error=_object(message=_STRING, type=_STRING, param=_NULLABLE, code=_STRING)),
    "Model": _object(id=_STRING, object={"const": "model"}, created=_COUNT, owned_by=_STRING),
    "Models": _object(object={"const": "list"}, data={"type": "array", "items": _ref("Model")}),
    "ChatCompletion": _object(
        id=_STRING,
        object={"const": "chat.completion"},
        created=_COUNT,
        model=_STRING,
        system_fingerprint=_STRING,
        policy_hash=_STRING,
        model_hash=_STRING,
        dials=_object(requested={"type": "object"}, effective={"type": "object"}, scenario=_STRING),
        usage=_object(prompt_tokens=_COUNT, completion_tokens=_COUNT, total_tokens=_COUNT),
        choices={
            "type": "array",
            "items": _object(
                index=_COUNT,
                finish_reason=_FINISH,
                message=_object(role={"const": "assistant"}, content=_STRING),
            ),
        },
    ),
}
