"""Fields of OpenAI's chat schema that do nothing here, and the values that change nothing.

``null`` is "not given" in every field of that schema. Any other value that is not listed asks for
something that does not exist here, so it is refused by the field's name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    StringConstraints,
)
from pydantic_core import CoreSchema, PydanticCustomError, PydanticUseDefault, core_schema

NOT_HERE = "not_here"
"""Type of the fault of a value that asks for what does not exist."""

Label = Annotated[str, StringConstraints(max_length=256)] | None
"""A name that clients give to a person, a request or a turn: neither used nor logged."""


def _zero(value: float) -> float:
    if value != 0:
        raise PydanticCustomError("not_zero", "only 0 is taken")
    return value


Zero = Annotated[float, AfterValidator(_zero), Field(json_schema_extra={"const": 0})] | None
"""A knob that some clients send always: taken where it changes nothing, refused elsewhere."""


class Wire(BaseModel):
    """What a request consists of: strict, and what is not named does not exist."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Only:
    """The type of a field that takes null and the given JSON values; read as ``None``."""

    def __init__(self, *values: Any) -> None:
        self._values = (None, *values)

    def takes(self, value: object) -> bool:
        """Whether a value changes nothing."""
        # Of one type as well: to Python 0 is False.
        return any(type(value) is type(one) and value == one for one in self._values)

    def schema(self) -> dict[str, Any]:
        """Return the JSON Schema."""
        return {"enum": list(self._values)}

    def __get_pydantic_core_schema__(self, _: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._check)

    def __get_pydantic_json_schema__(
        self, _: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return self.schema()

    def _check(self, value: object) -> None:
        if not self.takes(value):
            names = [json.dumps(one) for one in self._values]
            text = " or ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)
            raise PydanticCustomError(NOT_HERE, "only {values} is taken", {"values": text})


class NullIsDefault:
    """Lets null stand for the default of a field, as if the field were not there."""

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        return core_schema.no_info_before_validator_function(_given, handler(source))

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        return {"anyOf": [handler(schema), {"type": "null"}]}


def _given(value: object) -> object:
    if value is None:
        raise PydanticUseDefault
    return value


class NeutralFields(Wire):
    """The table: all fields of a request to OpenAI that do nothing here."""

    audio: Annotated[None, Only()] = None
    function_call: Annotated[None, Only("none", "auto")] = None
    functions: Annotated[None, Only([])] = None
    logprobs: Annotated[None, Only(False)] = None
    metadata: Annotated[None, Only({})] = None
    modalities: Annotated[None, Only(["text"])] = None
    moderation: Annotated[None, Only()] = None
    parallel_tool_calls: Annotated[None, Only(True, False)] = None
    prediction: Annotated[None, Only()] = None
    prompt_cache_key: Label = None
    prompt_cache_options: Annotated[None, Only()] = None
    prompt_cache_retention: Annotated[None, Only("in_memory")] = None
    reasoning_effort: Annotated[None, Only()] = None
    response_format: Annotated[None, Only({"type": "text"})] = None
    safety_identifier: Label = None
    service_tier: Annotated[None, Only("auto", "default")] = None
    store: Annotated[None, Only(False)] = None
    tool_choice: Annotated[None, Only("none", "auto")] = None
    tools: Annotated[None, Only([])] = None
    top_logprobs: Annotated[None, Only()] = None
    user: Label = None
    verbosity: Annotated[None, Only("medium")] = None
    web_search_options: Annotated[None, Only()] = None


ANSWER_FIELDS: Mapping[str, Only] = {
    "annotations": Only([]),
    "audio": Only(),
    "function_call": Only(),
    "refusal": Only(),
    "tool_calls": Only([]),
}
"""What clients lay beside the text of an answer that they send back."""
