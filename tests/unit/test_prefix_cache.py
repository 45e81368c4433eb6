from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from expertd_engine.core import EngineCore, StepFailed
from expertd_engine.kv_pool import KVPool
from expertd_engine.messages import Submit
from expertd_engine.prefix_cache import PrefixCache
from expertd_engine.step_plan import StepPlan
from support.builders_core import (
    HashForward,
    Told,
    make_core,
    make_scheduler,
    make_sequence,
    make_submit,
    run_alone,
    run_to_end,
)

BLOCK = 4
PROMPT = range(10, 20)
"""Two full blocks and a half."""


def caching_core(forward: HashForward | None = None, **limits: int) -> EngineCore:
    scheduler = make_scheduler(block_tokens=BLOCK, prefix_cache=True, batching="decode-first", **limits)
    return make_core(scheduler, forward or HashForward(BLOCK))


def run(core: EngineCore, *messages: Submit) -> Told:
    for message in messages:
        core.submit(message, 0.0)
    return run_to_end(core)


def hits(core: EngineCore) -> tuple[int, int]:
    prefixes = core.scheduler.prefixes
    assert prefixes is not None
    return prefixes.num_hit, prefixes.num_queried


def cached_tokens(told: Told) -> dict[int, int]:
    return {sequence_id: finished.stats.cached_tokens for sequence_id, finished in told.finished.items()}


def ask(sequence_id: int, prompt: Iterable[int] = PROMPT, **options: Any) -> Submit:
    return make_submit(sequence_id, prompt, **{"max_tokens": 3, "ignore_eos": True, **options})


def test_a_second_sequence_starts_after_the_full_blocks_of_the_first() -> None:
    forward = HashForward(BLOCK)
    core = caching_core(forward)
    first = run(core, ask(1))
    num_plans = len(forward.plans)
    second = run(core, ask(2, [*PROMPT, 20]))
    assert (cached_tokens(first), cached_tokens(second)) == ({1: 0}, {2: 8})
    chunk = forward.plans[num_plans].chunks[0]
    assert (chunk.start, chunk.num_tokens) == (8, 3)
    assert hits(core) == (8, 21)
    assert second.tokens[2] == run_alone(ask(2, [*PROMPT, 20])).tokens[2]


def test_what_a_sequence_generated_is_found_too() -> None:
    core = caching_core()
    answer = run(core, ask(1, max_tokens=7)).tokens[1]
    assert cached_tokens(run(core, ask(2, [*PROMPT, *answer, 5]))) == {2: 16}


@pytest.mark.parametrize(("length", "found"), [(1, 0), (4, 0), (5, 4), (8, 4), (9, 8)])
def test_one_token_is_always_left_to_compute(length: int, found: int) -> None:
    core = caching_core()
    told = run(core, ask(1, range(12)))
    assert cached_tokens(run(core, ask(2, range(length)))) == {2: found}
    assert told.reasons() == {1: "length"}


def test_a_prompt_that_is_computed_alone_for_no_answer_may_be_cached_too() -> None:
    core = caching_core()
    told = run(core, ask(1, max_tokens=0))
    again = run(core, ask(2, max_tokens=0))
    assert (told.reasons(), again.reasons(), cached_tokens(again)) == ({1: "length"}, {2: "length"}, {2: 8})


@pytest.mark.parametrize("other", [{"cache_salt": "b"}, {"mode": "virtual"}, {"prompt": [9, *PROMPT]}])
def test_nothing_is_shared_across_salts_modes_or_histories(other: dict[str, Any]) -> None:
    core = caching_core()
    run(core, ask(1, cache_salt="a"))
    assert cached_tokens(run(core, ask(2, **{"cache_salt": "a", **other}))) == {2: 0}


def test_blocks_of_different_histories_are_not_strung_together() -> None:
    core = caching_core()
    for sequence_id, first_block in ((1, range(4)), (2, range(4, 8))):
        run(core, ask(sequence_id, [*first_block, *range(10 * sequence_id, 10 * sequence_id + 5)]))
    assert cached_tokens(run(core, ask(3, [*range(4), *range(20, 25)]))) == {3: 4}


def test_virtual_mode_fills_no_cache() -> None:
    core = caching_core()
    run(core, ask(1, mode="virtual"))
    assert core.scheduler.pool.cached_blocks == 0
    assert cached_tokens(run(core, ask(2, mode="virtual"))) == {2: 0}
    assert hits(core) == (0, 0)


def test_other_weights_are_other_keys() -> None:
    pool = KVPool(9, BLOCK)
    sequences = [make_sequence(i, PROMPT) for i in (1, 2)]
    for sequence in sequences:
        sequence.admit(pool.allocate(3))
    sequences[0].advance(10)
    PrefixCache(pool, "store-a").publish(sequences[0], 0)
    assert len(PrefixCache(pool, "store-a").lookup(make_sequence(3, PROMPT))) == 2
    assert PrefixCache(pool, "store-b").lookup(make_sequence(3, PROMPT)) == []


def test_prompt_logprobs_are_computed_from_the_first_token_on() -> None:
    core = caching_core()
    run(core, ask(1))
    told = run(core, ask(2, prompt_logprobs=0))
    assert cached_tokens(told) == {2: 0}
    assert len(told.prompt_logprobs[2]) == len(PROMPT)
    assert cached_tokens(run(core, ask(3))) == {3: 8}


def test_a_sequence_shares_with_one_that_still_runs() -> None:
    core = caching_core()
    core.submit(ask(1, max_tokens=9), 0.0)
    told = Told()
    told.take(core.step(0.0))
    core.submit(ask(2), 0.0)
    told.take(core.step(0.0))
    assert core.scheduler.pool.used_blocks == 4  # 3 for each, 2 of them the same
    core.scheduler.check()
    run_to_end(core, told)
    assert {i: told.tokens[i] for i in (1, 2)} == {
        1: run_alone(ask(1, max_tokens=9)).tokens[1], 2: run_alone(ask(2)).tokens[2],
    }  # fmt: skip


def test_a_preempted_sequence_finds_its_own_blocks_again_and_they_are_not_its_cached_tokens() -> None:
    core = caching_core(num_blocks=8)
    messages = [ask(1, max_tokens=12), ask(2, range(30, 40), max_tokens=12)]
    told = run(core, *messages)
    assert told.finished[2].stats.preemptions == 1
    assert cached_tokens(told) == {1: 0, 2: 0}
    assert hits(core)[0] > 0
    assert {i: told.tokens[i] for i in (1, 2)} == {i: run_alone(m).tokens[i] for i, m in enumerate(messages, 1)}


def test_blocks_of_a_step_that_failed_are_not_found() -> None:
    def fail_first(plan: StepPlan) -> None:
        if plan.step == 0:
            raise StepFailed([1], "out of luck")

    core = caching_core(HashForward(BLOCK, before=fail_first))
    assert run(core, ask(1)).reasons() == {1: "error"}
    assert cached_tokens(run(core, ask(2))) == {2: 0}


def test_a_full_cache_holds_up_nobody() -> None:
    core = caching_core(num_blocks=6)
    for i in range(5):
        prompt = range(100 * i, 100 * i + 17)
        assert run(core, ask(i, prompt)).tokens[i] == run_alone(ask(i, prompt)).tokens[i]
    assert core.scheduler.pool.num_evictions > 0
    core.scheduler.check()


def test_the_end_of_a_prefix_is_given_up_before_its_beginning() -> None:
    core = caching_core(num_blocks=6)
    run(core, ask(1, range(16), max_tokens=1))
    run(core, ask(2, range(50, 58), max_tokens=1))
    assert core.scheduler.pool.num_evictions == 1
    assert cached_tokens(run(core, ask(3, range(17), max_tokens=1))) == {3: 12}
