"""What a benchmark prints: a table for people, then one JSON object on the last line for programs. Pure."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

FIELDS = (
    "tok_s", "resident_tok_s", "bound_tok_s", "serial_tok_s", "peer_tok_s", "ratio", "hit_ratio",
    "transferred_bytes_per_token", "peak_bytes", "device",
)  # fmt: skip
"""In every report; null where it has no meaning or was not measured."""


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as they need be; the first to the left, all others to the right."""
    widths = [max(len(row[column]) for row in [header, *rows]) for column in range(len(header))]

    def line(row: Sequence[str]) -> str:
        cells = [
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join([line(header), line(["-" * width for width in widths]), *map(line, rows)])


def finish(
    title: str, header: Sequence[str], rows: Sequence[Sequence[str]], notes: Sequence[str], values: Mapping[str, Any]
) -> str:
    """The whole report; `values` may leave out any of `FIELDS`."""
    result = {**dict.fromkeys(FIELDS), **values}
    return "\n".join([title, "", table(header, rows), "", *notes, json.dumps(_rounded(result))])


def number(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{value:,.{digits}f}"


def mebibytes(value: float | None) -> str:
    return "–" if value is None else f"{value / 2**20:,.1f} MiB"


def percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def spread(low: float | None, high: float | None, digits: int = 2) -> str:
    """An interval, as it stands beside its median."""
    return "–" if low is None or high is None else f"{low:,.{digits}f}–{high:,.{digits}f}"


def _rounded(value: Any) -> Any:
    """Six significant digits: more would be noise."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, Mapping):
        return {name: _rounded(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_rounded(one) for one in value]
    return value
