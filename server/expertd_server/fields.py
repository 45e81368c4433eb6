"""What the bodies of all routes have in common: strict types, null as absence, and errors that name a field.

Known fields with bad values are refused with the field's name; unknown fields are accepted. Types are strict (no "5"
for 5, no true for 1); null means "as if absent" everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any, ClassVar, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from expertd_server.errors import InvalidRequest, UnsupportedParameter, clip


def _allow_null(schema: dict[str, Any]) -> None:
    """Say in the published schema what `Body._null_is_absent` does: null is fine wherever a default exists."""
    for name, prop in schema.get("properties", {}).items():
        if name not in schema.get("required", ()):
            schema["properties"][name] = {"anyOf": [prop, {"type": "null"}]}


class Body(BaseModel):
    """Base of everything a client may send."""

    unsupported: ClassVar[Mapping[str, str]] = {}
    """Fields that promise something about the answer which we cannot give, and why. Absent, null and false are fine."""
    without_effect: ClassVar[Set[str]] = frozenset()
    """Known fields that are accepted and change nothing."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False, json_schema_extra=_allow_null)

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, data: object) -> object:
        return {k: v for k, v in data.items() if v is not None} if isinstance(data, dict) else data

    @classmethod
    def known_fields(cls) -> Set[str]:
        """Every name that means something, be it that it is refused."""
        return {field.alias or name for name, field in cls.model_fields.items()} | cls.unsupported.keys()


def body_of(kind: type[Body]) -> dict[str, Any]:
    """`openapi_extra=` of a route that reads a body of this kind itself."""
    schema = {"$ref": f"#/components/schemas/{kind.__name__}"}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


AnyBody = TypeVar("AnyBody", bound=Body)


def parse_fields(kind: type[AnyBody], body: object) -> AnyBody:
    """The checked fields of a decoded body. Raises InvalidRequest naming the first field at fault."""
    if not isinstance(body, dict):
        raise InvalidRequest(f"the body must be a JSON object, not {clip(type(body).__name__)}", code="invalid_json")
    for name in kind.unsupported.keys() & body.keys():
        if body[name] is not None and body[name] is not False:
            raise UnsupportedParameter(name, kind.unsupported[name])
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise _invalid(error) from None


_FORMS = ("constrained-", "list[", "dict[", "function-")
"""How pydantic's names of forms begin."""


def _invalid(error: ValidationError) -> InvalidRequest:
    """The first field's problem in words; where it has several forms, that of the form which came nearest: deepest in,
    and of the right type. `loc` may hold the name of a form: only the path that the client knows is told."""
    problems = error.errors(include_url=False, include_context=False)
    first = max(
        (p for p in problems if p["loc"][:1] == problems[0]["loc"][:1]),
        key=lambda p: (len(p["loc"]), not p["type"].endswith("_type")),
    )
    path = [str(part) for part in first["loc"] if not str(part).startswith(_FORMS)]
    name = ".".join(path) or "body"
    if first["type"] == "missing":
        return InvalidRequest(f"{name}: this field is required", param=name)
    return InvalidRequest(f"{clip(name)}: {first['msg']}, got {clip(repr(first['input']))}", param=clip(path[0]))
