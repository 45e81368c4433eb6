"""Twenty ways in which servers of this kind have failed their users, and the tests that say that this one does not.

`CHECKS` names the tests of each; that they exist is tested here. Speed is compared by the bytes that a step has to wait
for, and by virtual time.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from random import Random

import pytest

from expertd_engine.bench.virtual_clock import Clock
from expertd_engine.config import option_names
from expertd_engine.experts.cache import ExpertCache
from expertd_engine.experts.lookahead import EveryExpert, Lookahead, NoLookahead
from expertd_engine.experts.policy import make_policy
from simulation.checkers import LedgerChecker, WatchedLedger
from simulation.device import UNIT, DiskFaults, SimDisk, SimSlab
from simulation.model import VOCAB, Shape
from support.running_server import Start

TESTS = Path(__file__).parents[1]

HERE = "faults/test_peer_checks.py"
CHECKS: dict[str, list[str]] = {
    "1. budgets count bytes of real records, not entries": [
        "stateful/test_ledger_machine.py::LedgerMachine",
        "unit/test_ledger.py::test_a_longer_record_takes_the_bytes_of_two",
    ],
    "2. free lists, staging and reads in flight count": [
        "unit/test_slab.py::test_memory_is_committed_by_writing_and_returned_by_dropping",
        "unit/test_ledger.py::test_an_aborted_load_is_doomed_charged_until_it_ends_and_dropped",
        "simulation/test_simulation.py::test_the_first_500_seeds",
    ],
    "3. a prompt with other experts keeps the peak under the cap": [f"{HERE}::test_other_experts_keep_the_peak"],
    "4. a repeated prompt has hits": [f"{HERE}::test_a_repeated_prompt_hits"],
    "5. nothing leased is evicted; unions larger than the slots run in waves": [
        "stateful/test_ledger_machine.py::LedgerMachine", "simulation/test_simulation.py::test_the_first_500_seeds",
        "golden/test_engine_invariance.py::test_budget_policy_and_prefetch_change_no_bit",
    ],
    "6. the same tokens at every budget and batch size": [
        "golden/test_engine_invariance.py::test_a_sequence_is_the_same_alone_and_in_any_batch",
        "golden/test_family_logits.py::test_bits_depend_on_the_sequence_alone",
        "golden/test_demo.py::test_tokens_do_not_depend_on_batch_chunk_or_budget",
    ],
    "7. a long prompt neither runs out of memory nor flushes the decode set": [
        "unit/test_ledger_hits.py::test_a_scan_does_not_flush_the_working_set",
        f"{HERE}::test_decoding_recovers_at_once_from_a_long_prompt",
    ],
    "8. after a failed allocation the next request succeeds": [
        "faults/test_reads.py::test_an_allocation_that_never_works_fails_requests_and_never_the_engine",
    ],
    "9. two prompts at the minimum budget do not collapse": [
        f"{HERE}::test_two_at_once_read_no_more_than_one_after_the_other",
    ],
    "10. every fallback is a warning, a metric and a field": [f"{HERE}::test_a_fallback_is_a_metric_and_a_field"],
    "11. a cgroup's limit is the box": ["unit/test_memory.py::test_what_is_available_is_what_the_system_says_at_most"],
    "12. no second model takes the first one's cache": [f"{HERE}::test_there_is_one_model_and_no_option_for_another"],
    "13. the prompt cache is inside the budget": [
        "unit/test_prefix_cache.py::test_a_full_cache_holds_up_nobody",
        "unit/server/test_engine_metrics.py::test_the_prefix_cache_is_shown_beside_the_kv_in_use",
    ],
    "14. a full queue is an error before the first byte; health needs no key": [
        "api/test_lifecycle.py::test_a_full_queue_refuses_with_retry_after_and_frees_up_again",
        "api/test_auth.py::test_probes_need_no_key",
    ],
    "15. unknown and unsupported fields follow a written rule": [
        "api/test_completions.py::test_unknown_fields_are_accepted",
        "api/test_bad_requests.py::test_a_known_field_with_a_bad_value_is_refused_by_name",
    ],
    "16. a budget changes under load without failed streams": [
        "golden/test_loop.py::test_a_budget_that_shrinks_while_requests_run_ends_none_of_them",
        "simulation/test_simulation.py::test_the_first_500_seeds",
    ],
    "17. prefetching changes no text, wastes little, delays no demand": [
        "golden/test_engine_invariance.py::test_budget_policy_and_prefetch_change_no_bit",
        f"{HERE}::test_prefetching_reads_nothing_in_vain_and_waits_less",
    ],
    "18. a union that cannot fit is never read twice in a step": [f"{HERE}::test_a_union_that_cannot_fit_is_read_once"],
    "19. a cache that cannot be had is an error at start": [
        "unit/test_startup_plan.py::test_a_budget_too_small_is_refused_with_the_smallest_that_works",
    ],
    "20. few large experts are not slower than reading what is routed": [
        f"{HERE}::test_coarse_experts_cost_no_more_than_reading",
    ],
}  # fmt: skip


@cache
def names_in(path: str) -> set[str]:
    tree = ast.parse((TESTS / path).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}


def test_every_check_has_tests_that_exist() -> None:
    assert [int(check.split(".")[0]) for check in CHECKS] == list(range(1, 21))
    for check, tests in CHECKS.items():
        missing = [test for test in tests if test.split("::")[1] not in names_in(test.split("::")[0])]
        assert tests and not missing, f"{check}: {missing}"


# ---------------------------------------------------------------- an expert cache over a simulated disk


class Bench:
    """Steps of tokens over `slots` slots; every token is routed by itself alone."""

    def __init__(
        self,
        shape: Shape,
        slots: int,
        *,
        policy: str = "lru",
        lookahead: Lookahead | None = None,
        prefetch: bool = True,
    ) -> None:
        total = sum(n * b for n, b in zip(shape.experts, shape.record_bytes, strict=True))
        budget = slots * max(shape.record_bytes)
        self.shape, self.clock = shape, Clock()
        self.ledger = WatchedLedger(shape.record_bytes, shape.experts, budget, make_policy(policy), total, prefetch)
        slab = SimSlab(self.ledger.num_slots, max(shape.pieces))
        disk = SimDisk(self.clock, slab, 2, Random(0), DiskFaults())
        checker = self.ledger.watcher = LedgerChecker(self.ledger, slab, shape)
        slab.changed = checker.bytes_now
        self.cache = ExpertCache(self.ledger, slab, disk, lookahead or NoLookahead(), shape.record_bytes)  # type: ignore[arg-type]  # stand-ins

    def step(self, tokens: Sequence[int], *, prompt: bool = False) -> None:
        """One step of decoding tokens, or of a prompt's."""
        self.cache.begin_step(tokens)
        for layer, routes in enumerate(self.shape.routes):
            experts = sorted({expert for token in tokens for expert in routes[token]})
            with self.cache.lease(layer, experts, scanned=experts if prompt else ()) as leases:
                done = 0
                while done < len(experts):
                    taken = [index for index, _ in leases.take()]
                    self.clock.advance(0.05 * len(taken))
                    leases.release(taken)
                    done += len(taken)
        self.cache.end_step()

    @property
    def read_bytes(self) -> int:
        return self.ledger.counters.demand_bytes + self.ledger.counters.prefetch_bytes

    @property
    def hits(self) -> int:
        return sum(self.ledger.counters.hits)

    def misses_of(self, tokens: Sequence[int], *, prompt: bool = False) -> int:
        """Lookups of one more step that find nothing."""
        before = sum(self.ledger.counters.misses)
        self.step(tokens, prompt=prompt)
        return sum(self.ledger.counters.misses) - before


def fine(experts: int = 16, top_k: int = 2, layers: int = 3) -> Shape:
    return Shape((experts,) * layers, (2,) * layers, top_k, seed=5)


def union_bytes(shape: Shape, tokens: Sequence[int]) -> int:
    """What reading each routed expert of a step once takes."""
    unions = [{expert for token in tokens for expert in routes[token]} for routes in shape.routes]
    return sum(len(union) * nbytes for union, nbytes in zip(unions, shape.record_bytes, strict=True))


def disjoint_tokens(shape: Shape) -> tuple[int, int]:
    """Two tokens that share no expert in any layer."""
    for a in range(VOCAB):
        for b in range(a):
            if all(not set(routes[a]) & set(routes[b]) for routes in shape.routes):
                return a, b
    raise AssertionError("no such tokens")


@pytest.mark.parametrize("slots", [2, 6, 12])
def test_other_experts_keep_the_peak(slots: int) -> None:
    """The device's own count is compared at every change; the ledger's peak must agree."""
    shape = fine()
    bench = Bench(shape, slots)
    for token in disjoint_tokens(shape) * 3:
        for _ in range(4):
            bench.step([token])
    assert bench.ledger.peak_bytes <= slots * 2 * UNIT


def test_a_repeated_prompt_hits() -> None:
    bench = Bench(fine(), 8)
    bench.step([3])
    assert bench.hits == 0
    bench.step([3])
    assert bench.hits == 6 and bench.misses_of([3]) == 0


def test_decoding_recovers_at_once_from_a_long_prompt() -> None:
    """One step of a prompt over all experts, with room for three quarters of them: decoding misses nothing after it."""
    shape = fine()
    bench = Bench(shape, 36)
    working_set = [1, 2]
    for _ in range(3):
        bench.step(working_set)
    for _ in range(3):
        bench.step(range(VOCAB), prompt=True)
        assert bench.misses_of(working_set) == 0


@pytest.mark.parametrize("slots", [2, 4, 8])
def test_two_at_once_read_no_more_than_one_after_the_other(slots: int) -> None:
    rng = Random(1)
    first, second = ([rng.randrange(VOCAB) for _ in range(20)] for _ in range(2))
    alone, together = Bench(fine(), slots), Bench(fine(), slots)
    for token in [*first, *second]:
        alone.step([token])
    for pair in zip(first, second, strict=True):
        together.step(pair)
    assert together.read_bytes <= alone.read_bytes


def test_prefetching_reads_nothing_in_vain_and_waits_less() -> None:
    """Exact lookahead over a cycle, where a wrong prefetch would evict what comes next."""
    shape = Shape((8,) * 4, (2,) * 4, 8, seed=0)
    for slots in (4, 8, 16):
        benches = [
            Bench(shape, slots, policy="next-use", lookahead=EveryExpert(4, 8, 4), prefetch=prefetch)
            for prefetch in (False, True)
        ]
        for bench in benches:
            for _ in range(10):
                bench.step([0])
        without, with_prefetch = benches
        counters = with_prefetch.ledger.counters
        assert counters.prefetch_wasted <= 0.02 * counters.prefetch_loads
        assert with_prefetch.read_bytes <= 10 * union_bytes(shape, [0])
        assert with_prefetch.clock.now <= without.clock.now


@pytest.mark.parametrize("policy", ["lru", "lfu", "next-use"])
@pytest.mark.parametrize("slots", [2, 3, 5])
def test_a_union_that_cannot_fit_is_read_once(slots: int, policy: str) -> None:
    shape = fine()
    bench = Bench(shape, slots, policy=policy)
    for _ in range(3):
        before = bench.read_bytes
        bench.step(range(VOCAB), prompt=True)
        assert bench.read_bytes - before <= union_bytes(shape, range(VOCAB))


@pytest.mark.parametrize("slots", [2, 5, 12])
def test_coarse_experts_cost_no_more_than_reading(slots: int) -> None:
    shape = fine(experts=8)
    bench, rng, plain = Bench(shape, slots), Random(2), 0
    for _ in range(40):
        token = rng.randrange(VOCAB)
        bench.step([token])
        plain += union_bytes(shape, [token])
    assert bench.read_bytes <= plain


# ---------------------------------------------------------------- what is not about experts


def test_a_fallback_is_a_metric_and_a_field(start: Start, caplog: pytest.LogCaptureFixture) -> None:
    """And a warning, once the engine that has it is ready."""
    server = start()
    assert server.http.get("/version").json()["engine"]["fallbacks"] == ["direct I/O was refused"]
    assert server.metrics()['expertd_fallback_info{fallback="direct I/O was refused"}'] == 1
    warned = [record for record in caplog.records if record.message == "fallback"]
    assert warned and warned[0].levelname == "WARNING"


def test_there_is_one_model_and_no_option_for_another() -> None:
    assert not [name for name in option_names() if "draft" in name or "specul" in name]
