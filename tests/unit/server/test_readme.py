"""The table of request fields in server/README.md says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

from expertd_server.schemas import UNSUPPORTED, WITHOUT_EFFECT, CompletionRequest, StreamOptions

README = Path(__file__).parents[3] / "server" / "README.md"


def rows(heading: str) -> dict[str, str]:
    """Field → treatment, of the table under `heading`."""
    section = README.read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
    found = {}
    for names, treatment in re.findall(r"^\| (`.+?) \| (honoured|accepted without effect|refused) \|", section, re.M):
        found.update(dict.fromkeys(re.findall(r"`([^`]+)`", names), treatment))
    return found


def test_the_table_of_completion_fields_matches_the_code() -> None:
    code = dict.fromkeys(CompletionRequest.model_fields, "honoured")
    code |= {f"stream_options.{name}": "honoured" for name in StreamOptions.model_fields}
    code |= dict.fromkeys(WITHOUT_EFFECT, "accepted without effect")
    code |= dict.fromkeys(UNSUPPORTED, "refused")
    assert rows("Fields of /v1/completions") == code
