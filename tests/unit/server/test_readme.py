"""The tables of request fields in server/README.md say what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from expertd_server.chat_schemas import ChatRequest
from expertd_server.fields import Body
from expertd_server.responses_schemas import ResponsesRequest
from expertd_server.schemas import CompletionRequest, GenerationRequest, StreamOptions

README = Path(__file__).parents[3] / "server" / "README.md"


def rows(heading: str) -> dict[str, str]:
    """Field → treatment, of the table under `heading`."""
    section = README.read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
    found = {}
    for names, treatment in re.findall(r"^\| (`.+?) \| (honoured|accepted without effect|refused) \|", section, re.M):
        found.update(dict.fromkeys(re.findall(r"`([^`]+)`", names), treatment))
    return found


def treatments(request_type: type[Body]) -> dict[str, str]:
    """Field → treatment, as the code has it."""
    code = dict.fromkeys(request_type.known_fields(), "honoured")
    code |= {f"stream_options.{name}": "honoured" for name in StreamOptions.model_fields}
    code |= dict.fromkeys(request_type.without_effect, "accepted without effect")
    return code | dict.fromkeys(request_type.unsupported, "refused")


def test_the_table_of_shared_fields_matches_the_code() -> None:
    assert rows("Fields of every endpoint") == treatments(GenerationRequest)


@pytest.mark.parametrize(
    ("endpoint", "request_type"),
    [("completions", CompletionRequest), ("chat/completions", ChatRequest), ("responses", ResponsesRequest)],
)
def test_the_table_of_an_endpoints_own_fields_matches_the_code(
    endpoint: str, request_type: type[GenerationRequest]
) -> None:
    shared = treatments(GenerationRequest)
    own = {name: treatment for name, treatment in treatments(request_type).items() if shared.get(name) != treatment}
    assert rows(f"Fields of /v1/{endpoint}") == own
