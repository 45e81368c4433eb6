"""The benchmarks' engine: what a session counts is what happened, and the commands print what they promise."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from expertd_engine.bench.cgroup import limited_memory
from expertd_engine.bench.cli import main
from expertd_engine.bench.contender import Contender, Lost
from expertd_engine.bench.make_model import make_model
from expertd_engine.bench.protocol import Decoded, DecodeRequest, EngineSpec, PrefillRequest, TurnsRequest
from expertd_engine.bench.report import FIELDS
from expertd_engine.bench.session import EngineSession
from expertd_engine.bench.shapes import Cut
from expertd_engine.bench.turns import joined, take_turns, turns_of
from expertd_engine.errors import EngineError
from expertd_engine.model.predictor import NextGate
from support.memory_cgroup import can_limit_memory

DECODE = DecodeRequest(tokens=12, warm=6, prompt=8)
SMALL = ["--prompt", "8", "--tokens", "6", "--warm", "4", "--pairs", "2", "--max-step-tokens", "64", "--threads", "1"]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """6 layers of 64 experts, top-8; 3.4 MiB of experts a layer."""
    folder = tmp_path_factory.mktemp("bench") / "store"
    make_model("olmoe-1b-7b", folder, "int4s", cut=Cut(layers=6, vocabulary=512, narrow=8))
    return folder


def spec(store: Path, **options: object) -> EngineSpec:
    fields = {"threads": 1, "max_step_tokens": 64, "max_model_len": 128, **options}
    return EngineSpec(str(store), **fields)  # type: ignore[arg-type]  # each test gives fields of their types


@pytest.fixture
def budgeted(store: Path) -> Iterator[EngineSession]:
    session = EngineSession(spec(store, expert_budget="25%", policy="lru", routing="calibrated:fine", streams=2))
    yield session
    session.close()


def test_an_lru_engine_reads_what_the_lru_replay_reads(budgeted: EngineSession) -> None:
    """Without hints, with one eviction order: the yardstick and the engine meet the same misses once both are warm."""
    for _ in range(3):
        met = budgeted.decode(DECODE)
    assert met.tokens == 24
    assert met.late == 0
    assert met.hits + met.misses == round(met.union * 6 * 12)
    assert met.transferred_bytes == met.missed_bytes
    assert met.transferred_bytes == pytest.approx(met.lru_transferred_bytes, rel=0.05)
    assert 8 < met.union <= 16
    assert met.peak_bytes <= budgeted.describe().expert_budget
    assert met.elapsed_s > met.stall_s > 0


def test_with_every_expert_resident_nothing_is_read(store: Path) -> None:
    session = EngineSession(spec(store, expert_budget="100%", routing="uniform"))
    met = session.decode(DECODE)
    session.close()
    assert (met.misses, met.transferred_bytes, met.lru_transferred_bytes) == (0, 0, 0)
    assert met.hits == 12 * 6 * 8
    assert met.union == 8


def test_the_models_own_router_is_measured_too(store: Path) -> None:
    session = EngineSession(spec(store, expert_budget="100%"))
    met = session.decode(DECODE)
    session.close()
    assert met.transferred_bytes == 0
    assert met.union == 8


def test_exact_hints_turn_misses_into_hits(store: Path, budgeted: EngineSession) -> None:
    session = EngineSession(
        spec(store, expert_budget="25%", routing="calibrated:fine", hints="exact", streams=2, policy="lru")
    )
    hinted, bare = session.decode(DECODE), budgeted.decode(DECODE)
    session.close()
    assert session.describe().lookahead == "exact"
    assert hinted.misses < bare.misses / 2


def test_one_engine_goes_with_its_foresight_and_without(store: Path) -> None:
    session = EngineSession(spec(store, expert_budget="25%", routing="calibrated:fine", hints="exact", policy="lru"))
    turns = take_turns(session, TurnsRequest(pairs=2, settle=6, tokens=8, prompt=4))
    session.close()
    assert [len(steps) for steps in turns.off + turns.on] == [8] * 4
    off, on = (joined([*first, *second]) for first, second in (turns.off, turns.on))
    assert (off.tokens, on.tokens) == (16, 16) and on.misses < off.misses / 2
    assert off.hardness > 0 and on.hits + on.late + on.misses == on.tokens * 6 * 8 and turns.prefetched_bytes > 0


def test_a_predictor_hears_of_steps_without_foresight_too(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    session = EngineSession(spec(store, expert_budget="25%", hints="next-gate"))
    streams = session.start(4, 20)
    session.foresee(True)
    used: list[int] = []
    monkeypatch.setattr(NextGate, "use", lambda _, layer, chosen: used.append(layer))
    session.steps([True, False, False, True, False], len(streams))
    session.close()
    assert used == [0, 1, 2, 3, 4, 5] * 5


@pytest.mark.parametrize("steps", [1, 4])
def test_steps_with_foresight_and_without_are_as_many_and_neither_comes_first(steps: int) -> None:
    pairs = [turns_of(pair, 40, steps) for pair in range(4)]
    for order in pairs:
        places = [[at for at, on in enumerate(order) if on is arm] for arm in (False, True)]
        assert [len(each) for each in places] == [40, 40]
        assert sum(places[0]) == sum(places[1]), "what drifts falls on both alike"
    assert len({tuple(order) for order in pairs}) > 1, "nor does what comes back"


def test_a_prompt_beside_a_decode(budgeted: EngineSession) -> None:
    alone = budgeted.prefill(PrefillRequest(40))
    beside = budgeted.prefill(PrefillRequest(40, decode=True, warm=5, after=7))
    assert (alone.before_s, alone.after_s) == ([], [])
    assert (len(beside.before_s), len(beside.after_s)) == (5, 7)
    assert beside.ttft_s == pytest.approx(sum(beside.during_s))
    assert 0 < beside.resident_bytes <= budgeted.describe().expert_budget


# ---------------------------------------------------------------- processes


def test_an_error_there_is_an_error_here(store: Path) -> None:
    with (
        pytest.raises(EngineError, match="--expert-budget"),
        Contender(spec(store, expert_budget="1KiB"), timeout_s=120),
    ):
        pass


def test_a_contender_that_takes_too_long_is_lost(store: Path) -> None:
    with pytest.raises(Lost, match="did not start in 0 s"), Contender(spec(store), timeout_s=0.0):
        pass


@pytest.mark.cgroup
@pytest.mark.skipif(not can_limit_memory(), reason="cannot make memory cgroups")
def test_a_contender_without_memory_is_killed_and_says_so(store: Path) -> None:
    starved = Contender(spec(store), limit_bytes=64 * 2**20, timeout_s=120)
    with pytest.raises(Lost, match="killed for want of memory"), starved:
        pass
    with limited_memory(2**30) as group:
        assert group.limit_bytes() == 2**30


@pytest.mark.cgroup
@pytest.mark.skipif(not can_limit_memory(), reason="cannot make memory cgroups")
def test_a_contender_inside_its_cgroup_decodes(store: Path) -> None:
    with Contender(spec(store, memory_budget="700MiB"), limit_bytes=700 * 2**20, timeout_s=120) as contender:
        assert contender.ask(DECODE, Decoded).tokens == 12
        assert contender.kills == 0
        assert 0 < (contender.cgroup_peak_bytes or 0) <= 700 * 2**20


# ---------------------------------------------------------------- commands


def last_line(capsys: pytest.CaptureFixture[str]) -> dict[str, object]:
    result: dict[str, object] = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result.keys() >= set(FIELDS)
    return result


def test_decode_reports_limits(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["decode", str(store), "--expert-budget", "25%", "--routing", "uniform", *SMALL]) == 0
    result = last_line(capsys)
    for name in ("tok_s", "resident_tok_s", "bound_tok_s", "serial_tok_s", "disk_bytes_per_s"):
        assert isinstance(value := result[name], float) and value > 0, name
    assert result["peak_bytes"] == result["expert_budget_bytes"]
    assert result["peer_tok_s"] is None


def test_decode_against_llamacpp(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if find_spec("llama_cpp") is None:
        pytest.skip("the extra [bench] is not installed")
    assert main(["decode", str(store), "--peer", "llamacpp", "--streams", "2", *SMALL]) == 0
    result = last_line(capsys)
    assert isinstance(result["peer_tok_s"], float)
    assert isinstance(result["ratio"], float)
    assert result["tok_s"] == result["resident_tok_s"]


def test_prefill_reports_a_pass(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prefill", str(store), "--expert-budget", "50%", "--routing", "uniform", *SMALL]) == 0
    result = last_line(capsys)
    assert isinstance(result["pass_s"], float)
    assert isinstance(result["decode_before_s"], float)


def test_serve_and_io(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", str(store), "--streams", "2", "--expert-budget", "50%", *SMALL]) == 0
    result = last_line(capsys)
    assert isinstance(result["ttft_p95_s"], float)
    assert result["streams"] == 2
    assert main(["io", str(store), "--runs", "1"]) == 0
    assert isinstance(last_line(capsys)["memory_bytes_per_s"], float)


@pytest.mark.parametrize(("flags", "message"), [
    (["--hints", "exact"], "need generated routes"),
    (["--routing", "zipf"], "zipf"),
    (["--expert-budget", "25%", "--memory-budget", "1GiB"], "not both"),
    (["--cgroup"], "needs --memory-budget"),
    (["--versus", "colour=red"], "colour"),
    (["--versus", "prefetch=no"], "'no' is neither on nor off"),
])  # fmt: skip
def test_what_does_not_go_together_is_refused(
    store: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["decode", str(store), *flags, *SMALL]) != 0
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(("flags", "message"), [
    (["--device", "cuda"], "--device cuda is not allowed for bench serve"),
    (["--routing", "uniform", "--hints", "exact"], "without --routing, --hints"),
])  # fmt: skip
def test_a_daemon_is_not_asked_for_what_it_cannot_do(
    store: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", str(store), *flags, *SMALL]) != 0
    assert message in capsys.readouterr().err


def test_the_command_line_and_a_peers_process_load_no_torch() -> None:
    modules = "expertd_engine.bench.cli, expertd_engine.bench.worker, expertd_engine.bench.options"
    code = f"import sys, {modules}; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
