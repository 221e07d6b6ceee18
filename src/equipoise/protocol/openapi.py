"""The OpenAPI document: the request from its model, the answers in outline."""

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
    level = {"type": "integer", "minimum": 0, "maximum": dials.levels - 1}
    value = {"type": "number", "minimum": 0, "maximum": 1}
    dial = {"anyOf": [value, _closed({"level": level}, required=["level"]), {"const": "auto"}]}
    request["properties"]["dials"] = _closed(dict.fromkeys(dials.attributes, dial))
    request["properties"]["model"]["examples"] = [model]
    in_path = {"name": "name", "in": "path", "required": True, "schema": {"minLength": 1} | _STRING}
    chat = _operation("chat", "Answer a chat at a dial setting.", "ChatCompletion", 400, 404, 504)
    chat["responses"]["200"]["content"]["text/event-stream"] = {"schema": _ref("Event")}
    body = {"application/json": {"schema": _ref("ChatRequest")}}
    one_model = _operation("model", "One of them.", "Model", 404)
    health = _operation("healthz", "Whether it runs.", "Status")
    metrics = _operation("metrics", "Counters for Prometheus.", "Anything")
    metrics["responses"]["200"]["content"] = {"text/plain": {"schema": _STRING}}
    operations = {
        "/v1/models": _operation("models", "Models and scenarios of this key.", "Models"),
        "/v1/models/{name}": one_model | {"parameters": [in_path]},
        "/readyz": _operation("readyz", "Whether answers can be given.", "Status"),
        "/metrics": metrics,
        "/openapi.json": _operation("openapi", "This document.", "Anything"),
        "/healthz": health | {"security": []},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "Equipoise", "version": "1"},
        "security": [{"key": []}],
        "paths": {
            "/v1/chat/completions": {
                "post": chat | {"requestBody": {"required": True, "content": body}}
            },
            **{path: {"get": operation} for path, operation in operations.items()},
        },
        "components": {
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
            "schemas": {**schemas, "ChatRequest": request, **_ANSWERS},
        },
    }


def _ref(name: str) -> dict[str, str]:
    return {"$ref": _REF.format(model=name)}


def _operation(name: str, summary: str, schema: str, *statuses: int) -> dict[str, Any]:
    """Return an operation; ``statuses`` are of refusals beside those that every route has."""
    refused = {"application/json": {"schema": _ref("Error")}}
    answered = {"application/json": {"schema": _ref(schema)}}
    return {
        "operationId": name,
        "summary": summary,
        "responses": {
            "200": {"description": "Done.", "content": answered},
            **{
                str(status): {"description": "Refused.", "content": refused}
                for status in (401, 408, 413, 415, 421, 429, 431, 503, *statuses)
            },
        },
    }


def _closed(properties: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "additionalProperties": False, **more}


def _object(**properties: Any) -> dict[str, Any]:
    return {"type": "object", "properties": properties, "required": sorted(properties)}


def _list(items: dict[str, Any]) -> dict[str, Any]:
    return {"type": "array", "items": items}


_STRING, _COUNT = {"type": "string"}, {"type": "integer", "minimum": 0}
_NULLABLE = {"type": ["string", "null"]}
_MESSAGE = _object(role={"const": "assistant"}, content=_STRING)
_FINISH = {"enum": list(get_args(Finish))}
_ANSWERS: dict[str, Any] = {
    "Anything": {"type": "object"},
    "Event": _object(data=_STRING),
    "Status": _object(status=_STRING),
    "Error": _object(error=_object(message=_STRING, type=_STRING, param=_NULLABLE, code=_STRING)),
    "Model": _object(id=_STRING, object={"const": "model"}, created=_COUNT, owned_by=_STRING),
    "Models": _object(object={"const": "list"}, data=_list(_ref("Model"))),
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
        choices=_list(_object(index=_COUNT, finish_reason=_FINISH, message=_MESSAGE)),
    ),
}
