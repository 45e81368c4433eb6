"""The form of a routing trace: which experts each token chose, when, and in which step. Owns files of routes.

A trace is a folder of `.npz` parts, or one part; numpy reads them without us. No part holds text or tokens. Arrays of a
part, a row for each token of each recorded step, in the order of computation:

`header` JSON as bytes · `routes` [rows, layers, top_k] expert ids, ascending · `steps` [rows] number of the row's step,
which follow each other where the numbers do · `streams` [rows] number of the row's sequence · `decode` [rows] false for
prompt tokens · `times_us` [rows] when the step began, µs since recording did · `hidden` [rows, layers, width], only
where asked for: what each MoE layer's router saw, float16.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import msgspec
import numpy as np
from numpy.typing import NDArray

from expertd_engine.errors import UsageError
from expertd_engine.experts.store_format import StoreIndex

TRACE_VERSION = 1
SUFFIX = ".trace.npz"

Ids: TypeAlias = NDArray[np.int64]
Bools: TypeAlias = NDArray[np.bool_]


class TraceHeader(msgspec.Struct, frozen=True):
    """What routes mean."""

    store_id: str
    experts: list[int]
    """Of each MoE layer."""
    top_k: int
    record_bytes: list[int]
    """Of a record of each MoE layer."""
    version: int = TRACE_VERSION
    share: float = 1.0
    """Of all steps, that was recorded."""

    @property
    def width(self) -> int:
        """The most experts of a layer: what positions count in."""
        return max(self.experts)


def header_of(index: StoreIndex, share: float = 1.0) -> TraceHeader:
    """For traces of a store's model."""
    layers = range(len(index.layers))
    return TraceHeader(
        index.store_id,
        [layer.num_experts for layer in index.layers],
        index.top_k,
        [index.record_bytes(layer) for layer in layers],
        share=share,
    )


@dataclass(frozen=True, slots=True, eq=False)
class Trace:
    """Rows as the module's head describes them."""

    header: TraceHeader
    routes: Ids
    steps: Ids
    streams: Ids
    decode: Bools
    times_us: Ids
    hidden: NDArray[np.float16] | None = None

    def __len__(self) -> int:
        return len(self.routes)

    def decoding(self) -> Trace:
        """Its rows that decode."""
        return self.rows(self.decode)

    def rows(self, which: Bools | slice) -> Trace:
        """Some of its rows."""
        hidden = None if self.hidden is None else self.hidden[which]
        return Trace(
            *(self.header, self.routes[which], self.steps[which], self.streams[which]),
            *(self.decode[which], self.times_us[which], hidden),
        )


def write_part(path: Path, trace: Trace) -> int:
    """Write one part, whole or not at all; its bytes. Raises OSError."""
    partial = path.with_name(f".{path.name}.partial")
    small = np.uint8 if trace.header.width <= 256 else np.uint16
    arrays: dict[str, NDArray[Any]] = {
        "header": np.frombuffer(msgspec.json.encode(trace.header), np.uint8),
        "routes": trace.routes.astype(small),
        "steps": trace.steps.astype(np.uint32),
        "streams": trace.streams.astype(np.uint32),
        "decode": trace.decode,
        "times_us": trace.times_us,
    }
    if trace.hidden is not None:
        arrays["hidden"] = trace.hidden
    with partial.open("wb") as file:
        # Hidden states hardly compress.
        (np.savez_compressed if trace.hidden is None else np.savez)(file, allow_pickle=False, **arrays)
    os.replace(partial, path)
    return path.stat().st_size


def read_part(path: Path, *, hidden: bool = False) -> Trace:
    """Read one part; `hidden` states only if asked for. Raises UsageError for what is no trace of this version."""
    try:
        with np.load(path) as file:
            header = msgspec.json.decode(file["header"].tobytes(), type=TraceHeader)
            if header.version != TRACE_VERSION:
                raise UsageError(f"trace {path} has version {header.version}; this expertd reads {TRACE_VERSION}")
            states = file["hidden"] if hidden and "hidden" in file.files else None
            columns = [file[name].astype(np.int64) for name in ("routes", "steps", "streams", "times_us")]
            decode = file["decode"].astype(bool)
    except (OSError, KeyError, ValueError, msgspec.DecodeError, zipfile.BadZipFile) as error:
        raise UsageError(f"{path} is no routing trace: {error}") from None
    routes, steps, streams, times = columns
    return _checked(Trace(header, routes, steps, streams, decode, times, states), path)


def read_traces(paths: Sequence[Path], *, hidden: bool = False) -> Trace:
    """All parts of all `paths` (files or folders) as one trace, in order. Raises UsageError, also where stores differ.

    Steps of different parts never follow each other unless their numbers do.
    """
    parts = [read_part(part, hidden=hidden) for path in paths for part in _parts(path)]
    if not parts:
        raise UsageError(f"no trace in {', '.join(map(str, paths))}: record one with `expertd trace record`")
    first = parts[0].header
    for part in parts:
        if (part.header.store_id, part.header.experts) != (first.store_id, first.experts):
            raise UsageError(f"traces of different stores: {first.store_id[:12]} and {part.header.store_id[:12]}")
    if hidden and any(part.hidden is None for part in parts):
        raise UsageError("the trace has no hidden states: record one with `expertd trace record --hidden`")
    return _joined(parts)


def _parts(path: Path) -> Iterable[Path]:
    return sorted(path.glob(f"*{SUFFIX}")) if path.is_dir() else [path]


def _joined(parts: Sequence[Trace]) -> Trace:
    if len(parts) == 1:
        return parts[0]
    states = [part.hidden for part in parts if part.hidden is not None]
    return Trace(
        parts[0].header,
        np.concatenate([part.routes for part in parts]),
        _apart([part.steps for part in parts]),
        _apart([part.streams for part in parts]),
        np.concatenate([part.decode for part in parts]),
        np.concatenate([part.times_us for part in parts]),
        np.concatenate(states) if len(states) == len(parts) else None,
    )


def _apart(columns: Sequence[Ids]) -> Ids:
    """One column; numbers that begin anew, as those of another recording do, are moved behind the ones before."""
    moved, end = [], -1
    for column in columns:
        begins_anew = len(column) > 0 and int(column.min()) <= end
        moved.append(column + (end + 2 - int(column.min())) if begins_anew else column)
        end = max(end, int(moved[-1].max(initial=end)))
    return np.concatenate(moved)


def _checked(trace: Trace, path: Path) -> Trace:
    header, routes = trace.header, trace.routes
    rows = (len(trace.steps), len(trace.streams), len(trace.decode), len(trace.times_us))
    if routes.ndim != 3 or routes.shape[1:] != (len(header.experts), header.top_k) or set(rows) != {len(routes)}:
        raise UsageError(f"{path} is no routing trace: routes of shape {routes.shape}, other columns of {rows} rows")
    if len(routes) and (routes.min() < 0 or (routes >= np.array(header.experts)[None, :, None]).any()):
        raise UsageError(f"{path} is no routing trace: it names experts that its header does not have")
    return trace
