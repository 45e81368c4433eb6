"""What operators look at and turn: /status, /experts, the live page /ui, and the budget under /admin."""

from __future__ import annotations

import base64
import hashlib
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import HTMLResponse
from pydantic import BaseModel, Field

from expertd_engine.config import parse_size
from expertd_engine.errors import ConfigError
from expertd_server.body import read_json
from expertd_server.errors import InvalidRequest, declared
from expertd_server.fields import Body, body_of, parse_fields
from expertd_server.service import Service
from expertd_server.status import status

PAGE_POLICY = (
    "default-src 'none'; script-src '{script}'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:; "
    "frame-ancestors 'none'; form-action 'none'; base-uri 'none'"
)
"""The page runs its own script alone, and asks nobody but this server for anything."""


_PAGE = {"content": {"text/html": {"schema": {"type": "string"}}}}


class BudgetRequest(Body):
    """Body of PUT /admin/budget."""

    expert_budget: int | str | None = Field(
        None, description="Bytes, a size such as 512MiB, or a share of all experts such as 25%."
    )
    memory_budget: int | str | None = Field(
        None, description="Bytes or a size, for server and engine together; expert_budget is a ceiling inside it."
    )


class BudgetAnswer(BaseModel):
    """Answer of PUT /admin/budget, in bytes."""

    expert_budget_bytes: int
    """The target now in force."""
    expert_limit_bytes: int
    """Above the target only until running requests let go of what a lowered one takes back."""
    memory_budget_bytes: int | None = None
    """Of server and engine together; null where there is none."""
    minimum_bytes: int
    maximum_bytes: int


def router(service: Service) -> APIRouter:
    """The routes of this module, bound to `service`."""
    routes = APIRouter()

    async def read_status() -> dict[str, Any]:
        """State, budgets, work and experts at one glance."""
        return status(service)

    async def read_experts() -> dict[str, Any]:
        """Where every expert is, a letter each: `.` absent, `o` loading, `x` given up, `r` resident, `L` leased."""
        console = service.console
        console.look()
        if console.experts is None:
            return {"age_s": None, "layers": []}
        return {"age_s": round(console.map_age_s(), 3), "layers": console.experts.layers}

    async def set_budget(request: Request) -> BudgetAnswer:
        """Change the expert budget while requests run."""
        return await _set_budget(service, request)

    routes.add_api_route("/status", read_status, response_model=None, responses=dict(declared(401)))
    routes.add_api_route("/experts", read_experts, response_model=None, responses=dict(declared(401)))
    routes.add_api_route(
        "/admin/budget", set_budget, methods=["PUT"], responses=dict(declared(400, 401, 403, 413, 415, 500, 503)),
        openapi_extra=body_of(BudgetRequest),
    )  # fmt: skip
    if service.config.ui:
        _add_page(routes)
    return routes


def _add_page(routes: APIRouter) -> None:
    page = files("expertd_server").joinpath("pages/ui.html").read_text(encoding="utf-8")
    script = page.partition("<script>")[2].partition("</script>")[0]
    digest = "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    headers = {"content-security-policy": PAGE_POLICY.format(script=digest), "cache-control": "no-cache"}

    async def ui() -> Response:
        """The live page."""
        return HTMLResponse(page, headers=headers)

    routes.add_api_route("/ui", ui, response_model=None, responses={200: _PAGE, **declared(401)})


async def _set_budget(service: Service, request: Request) -> BudgetAnswer:
    info = service.serving().info
    with service.bodies.share() as share:
        asked = parse_fields(BudgetRequest, await read_json(request, service.config.max_body.resolve(0), share))
    if asked.expert_budget is None and asked.memory_budget is None:
        raise InvalidRequest("expert_budget: give it, or memory_budget, or both", param="expert_budget")
    experts = _size("expert_budget", asked.expert_budget, info.expert_bytes_total)
    memory = _size("memory_budget", asked.memory_budget, None)
    answer = await service.console.set_budget(experts, memory)
    if answer.error is not None:
        raise InvalidRequest(answer.error, param="expert_budget" if memory is None else "memory_budget")
    return BudgetAnswer(
        expert_budget_bytes=answer.expert_budget_bytes,
        expert_limit_bytes=answer.expert_limit_bytes,
        memory_budget_bytes=answer.memory_budget_bytes,
        minimum_bytes=info.minimum_expert_budget_bytes,
        maximum_bytes=info.maximum_expert_budget_bytes,
    )


def _size(name: str, given: int | str | None, total_bytes: int | None) -> int | None:
    """Bytes; a share counts against `total_bytes`, and is refused where there is none. Raises InvalidRequest."""
    if given is None:
        return None
    try:
        return parse_size(str(given), share_allowed=total_bytes is not None).resolve(total_bytes or 0)
    except ConfigError as error:
        raise InvalidRequest(f"{name}: {error}", param=name) from None
