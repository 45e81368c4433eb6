"""The tables of request fields in server/README.md say what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from expertd_server.chat_schemas import ChatRequest
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


@pytest.mark.parametrize(
    ("endpoint", "request_type"),
    [("completions", CompletionRequest), ("chat/completions", ChatRequest), ("responses", ResponsesRequest)],
)
def test_the_table_of_fields_matches_the_code(endpoint: str, request_type: type[GenerationRequest]) -> None:
    code = dict.fromkeys(request_type.known_fields(), "honoured")
    if "stream_options" in code and "stream_options" not in request_type.without_effect:
        code |= {f"stream_options.{name}": "honoured" for name in StreamOptions.model_fields}
    code |= dict.fromkeys(request_type.without_effect, "accepted without effect")
    code |= dict.fromkeys(request_type.unsupported, "refused")
    assert rows(f"Fields of /v1/{endpoint}") == code
