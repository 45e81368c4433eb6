"""The forms that an answer may be held to, as clients ask for them: `response_format` and `structured_outputs`.

Only the request's own shape is checked here; whether a grammar can be kept is `GrammarChecker`'s to say.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from pydantic import Field

from expertd_engine.messages import Constraint
from expertd_server.errors import InvalidRequest
from expertd_server.fields import Body

MAX_ALTERNATIVES = 1024


class SchemaFormat(Body):
    """`json_schema` of a response format. The schema is always kept to, whatever `strict` says."""

    name: str = Field("answer", pattern=r"^[A-Za-z0-9_-]{1,64}$")
    description: str = ""
    schema_: dict[str, Any] = Field({}, alias="schema")
    strict: bool = False


class ResponseFormat(Body):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: SchemaFormat | None = Field(None, description="Only with type json_schema, and required there.")


class StructuredOutputs(Body):
    """Exactly one of the fields."""

    json_: dict[str, Any] | str | None = Field(None, alias="json", description="A JSON schema, or its text.")
    regex: str | None = Field(None, min_length=1, description="Matches the whole answer.")
    choice: list[Annotated[str, Field(min_length=1)]] | None = Field(
        None, min_length=1, max_length=MAX_ALTERNATIVES, description="The answer is one of these."
    )
    grammar: str | None = Field(None, min_length=1, description="In Lark's notation.")
    json_object: Literal[True] | None = None


class Demand(NamedTuple):
    """A constraint and the name of the field that it came from."""

    constraint: Constraint
    param: str


def demanded(response_format: ResponseFormat | None, structured: StructuredOutputs | None) -> Demand | None:
    """What the two fields ask for together. Raises InvalidRequest when they ask for more than one thing, or for
    nothing where they must."""
    demands = [d for d in (_of_format(response_format), _of_structured(structured)) if d is not None]
    if len(demands) > 1:
        raise InvalidRequest("structured_outputs: not together with response_format", param="structured_outputs")
    return demands[0] if demands else None


def schema_constraint(schema: dict[str, Any]) -> Constraint:
    """Hold the answer to a JSON schema."""
    return Constraint("json_schema", json.dumps(schema, ensure_ascii=False))


def _of_format(given: ResponseFormat | None) -> Demand | None:
    if given is None or given.type == "text":
        return None
    if given.type == "json_object":
        return Demand(Constraint("json_object"), "response_format")
    if given.json_schema is None:
        raise InvalidRequest("response_format.json_schema: required by type json_schema", param="response_format")
    return Demand(schema_constraint(given.json_schema.schema_), "response_format")


def _of_structured(given: StructuredOutputs | None) -> Demand | None:
    if given is None:
        return None
    found = []
    if given.json_ is not None:
        found.append(_of_schema(given.json_))
    if given.json_object:
        found.append(Constraint("json_object"))
    if given.regex is not None:
        found.append(Constraint("regex", given.regex))
    if given.choice is not None:
        found.append(Constraint("choice", json.dumps(given.choice, ensure_ascii=False)))
    if given.grammar is not None:
        found.append(Constraint("lark", given.grammar))
    if len(found) != 1:
        allowed = "exactly one of json, json_object, regex, choice and grammar"
        raise InvalidRequest(
            f"structured_outputs: {len(found)} constraints; give {allowed}", param="structured_outputs"
        )
    return Demand(found[0], "structured_outputs")


def _of_schema(given: dict[str, Any] | str) -> Constraint:
    if isinstance(given, dict):
        return schema_constraint(given)
    try:
        schema = msgspec.json.decode(given)  # stricter than json.loads: no NaN, no lone surrogates
    except (msgspec.DecodeError, RecursionError) as error:
        raise InvalidRequest(f"structured_outputs.json: not JSON: {error}", param="structured_outputs") from None
    if not isinstance(schema, dict):
        raise InvalidRequest("structured_outputs.json: a schema is a JSON object", param="structured_outputs")
    return schema_constraint(schema)
