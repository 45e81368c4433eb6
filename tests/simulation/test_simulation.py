"""The fixed seeds, in every run. `make fuzz` runs fresh ones; a seed that fails there joins the seed file."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from simulation import run
from simulation.run import failure_of, known_seeds, replay_command
from simulation.world import World

ROOT = Path(__file__).resolve().parents[2]


def first_failure(seeds: range | list[int]) -> str | None:
    return next((failure for seed in seeds if (failure := failure_of(seed))), None)


def test_the_first_500_seeds() -> None:
    """By themselves: within these every planted bug is found."""
    failure = first_failure(range(500))
    assert failure is None, failure


@pytest.mark.parametrize("first", range(500, 2000, 250))
def test_more_seeds(first: int) -> None:
    failure = first_failure(range(first, first + 250))
    assert failure is None, failure


def test_seeds_that_failed_once() -> None:
    failure = first_failure(known_seeds())
    assert failure is None, failure


def test_the_worlds_are_eventful() -> None:
    """What is to be survived does happen."""
    worlds = [World(seed) for seed in range(200)]
    for world in worlds:
        world.run()
    ends = {request.ended for world in worlds for request in world.requests.ended.values()}
    assert ends == {"stop", "length", "abort", "error", "engine_dead"}
    happened = {
        "preempted": sum(world.scheduler.num_preemptions > 0 for world in worlds),
        "evicted": sum(world.ledger.counters.evictions["capacity"] > 0 for world in worlds),
        "evicted for the budget": sum(world.ledger.counters.evictions["budget_change"] > 0 for world in worlds),
        "failed": sum(world.ledger.counters.load_failures > 0 for world in worlds),
        "late": sum(sum(world.ledger.counters.late) > 0 for world in worlds),
        "cancelled": sum(world.ledger.counters.prefetch_cancelled > 0 for world in worlds),
        "given up": sum(world.disturbed > 0 for world in worlds),
        "engines": sum(world.engines > 1 for world in worlds),
        "prefix found": sum(w.scheduler.prefixes is not None and w.scheduler.prefixes.num_hit > 0 for w in worlds),
        "virtual": sum(len(world.modes) > 1 for world in worlds),
    }
    assert not {what for what, count in happened.items() if count < 5}, happened


def trace_of(seed: int) -> str:
    """All that one process saw of a world."""
    code = (
        "from simulation.world import World\n"
        f"w = World({seed})\nw.run()\n"
        "print(w.step, w.clock.now, w.ledger.counters, [(r.got, r.ended) for r in w.requests.ended.values()])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT / "tests", capture_output=True, text=True, check=True)
    return done.stdout


def test_a_seed_says_everything() -> None:
    """Two processes, whose strings and sets hash differently, see the same world."""
    assert trace_of(3) == trace_of(3) != trace_of(4)


def test_a_failing_seed_prints_its_replay_and_joins_the_seed_file(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(self: World) -> None:
        raise AssertionError("planted")

    monkeypatch.setattr(World, "run", broken)
    monkeypatch.setattr(run, "SEEDS", tmp_path / "seeds.txt")
    (tmp_path / "seeds.txt").write_text("# comment\n")
    assert run.judge(map(failure_of, run.fresh_seeds(3))) == 1
    [seed] = known_seeds()
    assert replay_command(seed) in capsys.readouterr().out
