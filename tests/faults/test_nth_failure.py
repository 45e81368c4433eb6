"""The n-th read or allocation fails, for every n: once, then from there on. Whoever was not touched says what it would
have said; what was touched ends with an error; afterwards everything balances and the next request is right.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest

from simulation.world import World

SEEDS = (7, 32, 51)
"""Three worlds of different shapes; in this test nothing happens in them but the one fault."""

Plant = Callable[[World, range], None]


def fail_reads(world: World, numbers: range) -> None:
    world.faults.failing = numbers


def fail_allocations(world: World, numbers: range) -> None:
    world.failing_allocations = numbers


def quiet_world(seed: int) -> World:
    world = World(seed)
    world.calm = True
    world.faults.clear()
    world.step_faults = world.kills = 0.0
    return world


def ends(world: World) -> dict[int, str | None]:
    return {sequence_id: request.ended for sequence_id, request in world.requests.ended.items()}


def run_with(seed: int, plant: Plant, numbers: range) -> World:
    """The world's requests with the fault, then one more without."""
    world = quiet_world(seed)
    plant(world, numbers)
    world.run()
    plant(world, range(0))
    world.arrivals = [(world.step, 99)]
    world.run()
    assert ends(world)[99] in ("stop", "length"), "the request after the fault"
    return world


def count_of(seed: int, plant: Plant) -> int:
    world = quiet_world(seed)
    world.run()
    assert set(ends(world).values()) <= {"stop", "length"}
    return world.disk.reads if plant is fail_reads else world.allocations


@pytest.mark.parametrize("plant", [fail_reads, fail_allocations])
@pytest.mark.parametrize("seed", SEEDS)
def test_one_failure_costs_nobody_an_answer(plant: Plant, seed: int) -> None:
    """It is tried again: a demanded read by the ledger, the step by the scheduler."""
    count = count_of(seed, plant)
    assert count > 20
    for number in range(count):
        world = run_with(seed, plant, range(number, number + 1))
        assert set(ends(world).values()) <= {"stop", "length"}, f"{number} of {count}"


@pytest.mark.parametrize("plant", [fail_reads, fail_allocations])
@pytest.mark.parametrize("seed", SEEDS)
def test_failures_without_end_end_the_requests_that_meet_them_and_no_others(plant: Plant, seed: int) -> None:
    count = count_of(seed, plant)
    reasons = set()
    for number in range(0, count, 3):
        reasons |= set(ends(run_with(seed, plant, range(number, 10**9))).values())
    assert reasons == {"stop", "length", "error"} or reasons == {"length", "error"}


@pytest.mark.parametrize("length", [2, 3, 5, 9])
def test_a_run_of_failures_ends_at_most_those_in_its_steps(length: int) -> None:
    for number in range(0, count_of(SEEDS[0], fail_reads), 5):
        run_with(SEEDS[0], fail_reads, range(number, number + length))
