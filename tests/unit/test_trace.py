from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from expertd_engine.errors import ConfigError, UsageError
from expertd_engine.lab.recorder import WINDOW_STEPS, TraceRecorder
from expertd_engine.lab.trace import SUFFIX, Ids, Trace, TraceHeader, read_traces, write_part

LAYERS, EXPERTS, TOP_K, WIDTH = 3, 8, 2, 5
HEADER = TraceHeader("store", [EXPERTS] * LAYERS, TOP_K, [64] * LAYERS)


def routes_of(rows: int, seed: int = 0) -> Ids:
    rng = np.random.default_rng(seed)
    return np.sort(rng.permuted(np.tile(np.arange(EXPERTS), (rows, LAYERS, 1)), axis=-1)[..., :TOP_K], axis=-1)


def trace_of(rows: int, *, first: int = 0, seed: int = 0, hidden: bool = False) -> Trace:
    states = np.ones((rows, LAYERS, WIDTH), np.float16) if hidden else None
    steps, ones = np.arange(first, first + rows), np.ones(rows, bool)
    return Trace(HEADER, routes_of(rows, seed), steps, np.zeros(rows, np.int64), ones, 1000 * steps, states)


def feed(recorder: TraceRecorder, routes: Ids, *, well: bool = True) -> bool:
    """One decoding step of these rows `[T, L, K]`."""
    wanted = recorder.begin_step([7] * len(routes), [True] * len(routes))
    if wanted:
        for layer in range(LAYERS):
            recorder.routed(layer, routes[:, layer], torch.full((len(routes), WIDTH), float(layer)))
        recorder.end_step(well=well)
    return wanted


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    written = trace_of(20, hidden=True)
    write_part(tmp_path / f"a{SUFFIX}", written)
    read = read_traces([tmp_path], hidden=True)
    assert read.header == HEADER and read.hidden is not None
    for name in ("routes", "steps", "streams", "decode", "times_us", "hidden"):
        assert np.array_equal(getattr(read, name), getattr(written, name)), name
    with np.load(tmp_path / f"a{SUFFIX}") as file:  # by whoever has numpy
        assert file["routes"].shape == (20, LAYERS, TOP_K)


def test_steps_of_two_recordings_do_not_follow_each_other(tmp_path: Path) -> None:
    write_part(tmp_path / f"a{SUFFIX}", trace_of(5))
    write_part(tmp_path / f"b{SUFFIX}", trace_of(5, first=5))
    assert read_traces([tmp_path]).steps.tolist() == list(range(10)), "one recording goes on"
    write_part(tmp_path / f"b{SUFFIX}", trace_of(5))
    assert read_traces([tmp_path]).steps.tolist() == [0, 1, 2, 3, 4, 6, 7, 8, 9, 10]


def test_the_recorder_keeps_rows_and_forgets_failed_steps(tmp_path: Path) -> None:
    recorder = TraceRecorder(tmp_path, HEADER, limit_bytes=2**20, hidden=True)
    routes = routes_of(6)
    assert (
        feed(recorder, routes[:1]) and feed(recorder, routes[5:], well=False) and feed(recorder, routes[1:3, :, ::-1])
    )
    recorder.close()
    read = read_traces([tmp_path], hidden=True)
    assert np.array_equal(read.routes, routes[:3]) and read.steps.tolist() == [0, 2, 2] and recorder.rows == 3
    assert read.hidden is not None and read.hidden[0, :, 0].tolist() == [0.0, 1.0, 2.0]


def test_a_share_of_steps_is_recorded_in_windows(tmp_path: Path) -> None:
    header = TraceHeader(*(HEADER.store_id, HEADER.experts, TOP_K, HEADER.record_bytes), share=0.25)
    recorder, routes = TraceRecorder(tmp_path, header, limit_bytes=2**20), routes_of(1)
    wanted = [feed(recorder, routes) for _ in range(8 * WINDOW_STEPS)]
    recorder.close()
    assert (
        sum(wanted) == 2 * WINDOW_STEPS
        and all(wanted[:WINDOW_STEPS])
        and not any(wanted[WINDOW_STEPS : 4 * WINDOW_STEPS])
    )
    assert len(read_traces([tmp_path])) == 2 * WINDOW_STEPS


def test_the_folder_does_not_outgrow_its_bound(tmp_path: Path) -> None:
    """Over restarts neither."""
    header = TraceHeader(*(HEADER.store_id, HEADER.experts, TOP_K, HEADER.record_bytes), share=0.5)
    limit, earlier = 30_000, [tmp_path / f"2020010{day}T000000-1-0{SUFFIX}" for day in (1, 2)]
    for path, tokens in zip(earlier, (3 * WINDOW_STEPS, 1), strict=True):
        write_part(path, trace_of(tokens))
    recorder = TraceRecorder(tmp_path, header, limit_bytes=limit)
    for window in range(30):
        for row in routes_of(2 * WINDOW_STEPS, seed=window):
            feed(recorder, row[None])
    recorder.close()
    parts = sorted(tmp_path.glob(f"*{SUFFIX}"))
    assert 1 <= len(parts) < 30 and sum(part.stat().st_size for part in parts) <= limit
    assert not any(path.exists() for path in earlier)
    assert read_traces(parts[-1:]).steps[-1] > 28 * 2 * WINDOW_STEPS, "the oldest go first"


def test_a_text_is_recorded_as_if_it_were_generated(tmp_path: Path) -> None:
    recorder, routes = TraceRecorder(tmp_path, HEADER, limit_bytes=2**20, unroll=True), routes_of(7)
    for begin, end in ((0, 4), (4, 7)):
        assert recorder.begin_step([1] * (end - begin), [False] * (end - begin))
        for layer in range(LAYERS):
            recorder.routed(layer, routes[begin:end, layer], None)
        recorder.end_step(well=True)
    recorder.close()
    read = read_traces([tmp_path])
    assert read.steps.tolist() == list(range(7)) and read.decode.all() and np.array_equal(read.routes, routes)


def test_what_cannot_be_written_stops_the_recording_and_not_the_step(tmp_path: Path) -> None:
    recorder = TraceRecorder(tmp_path / "gone", HEADER, limit_bytes=2**20)
    (tmp_path / "gone").rmdir()
    assert feed(recorder, routes_of(1))
    recorder.close()
    assert recorder.failure is not None and "no longer recorded" in recorder.failure
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="trace_dir"):
        TraceRecorder(tmp_path / "file" / "x", HEADER, limit_bytes=1)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"header": b"{}"}, "no routing trace"),
        ({"routes": np.zeros((3, 1, 1), np.uint8)}, "no routing trace"),
        ({"routes": np.full((20, LAYERS, TOP_K), EXPERTS, np.uint8)}, "does not have"),
    ],
)
def test_what_is_no_trace_is_refused(tmp_path: Path, change: dict[str, object], told: str) -> None:
    path = tmp_path / f"a{SUFFIX}"
    write_part(path, trace_of(20))
    with np.load(path) as file:
        arrays = {name: file[name] for name in file.files}
    raw = {name: np.frombuffer(one, np.uint8) if isinstance(one, bytes) else one for name, one in change.items()}
    np.savez(path, **(arrays | raw))
    with pytest.raises(UsageError, match=told):
        read_traces([path])


def test_another_version_store_or_nothing_at_all_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no trace in"):
        read_traces([tmp_path])
    write_part(tmp_path / f"a{SUFFIX}", trace_of(3))
    with pytest.raises(UsageError, match="no hidden states"):
        read_traces([tmp_path], hidden=True)
    other = TraceHeader("other", HEADER.experts, TOP_K, HEADER.record_bytes, version=9)
    trace = trace_of(3)
    write_part(
        tmp_path / f"b{SUFFIX}", Trace(other, trace.routes, trace.steps, trace.streams, trace.decode, trace.times_us)
    )
    with pytest.raises(UsageError, match="version 9"):
        read_traces([tmp_path])
