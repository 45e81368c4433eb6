"""What a step is known to lack is fetched as a plain reading of the rule says, and what it met counts as ever."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from expertd_engine.experts.accounting import LedgerError
from expertd_engine.experts.device_columns import ColumnUses
from expertd_engine.experts.device_events import (
    HIT,
    READ,
    WAITED,
    Cooled,
    Fetch,
    Fetched,
    Fetching,
    Met,
    PassOn,
    Provide,
    Recall,
    Retire,
    Seen,
)
from expertd_engine.experts.device_ledger import DeviceLedger
from expertd_engine.experts.device_pool import Use
from expertd_engine.experts.device_uses import Uses
from expertd_engine.experts.events import ExpertId, Hint, Predict, Tick
from expertd_engine.experts.policy import make_policy
from expertd_engine.experts.residency import State
from support.device_caches import EXPERTS, LAYERS, PLAN, make_ledger
from support.fake_device import RECORD

ALL = [ExpertId(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]
STEPS = st.lists(
    st.tuples(
        st.lists(st.sampled_from(range(len(ALL))), min_size=1, max_size=8, unique=True),
        st.integers(0, 2),  # slots to leave empty
        st.booleans(),  # into empty slots first
        st.sampled_from([HIT, WAITED, READ]),
        st.booleans(),  # the step before is told of
        st.integers(0, 2),  # hints
        st.booleans(),  # the next boundary comes before the next step
    ),
    min_size=2,
    max_size=8,
)


class Twins:
    """Ledgers that hear the same: in columns; one by one; and one by one, told of each layer by itself."""

    def __init__(self, slots: int, policy: str, arranges: bool) -> None:
        """`arranges`: who gives way is found out ahead now and then."""
        self.arranges = arranges
        sizes, counts, most = [RECORD] * LAYERS, [EXPERTS] * LAYERS, len(ALL) * RECORD
        self.ledgers = []
        for kind in (ColumnUses, Uses, Uses):
            ranks = make_policy(policy, 4)
            self.ledgers.append(
                DeviceLedger(sizes, counts, PLAN, slots * RECORD, ranks, most, uses=kind(counts, ranks))
            )

    def fetch(self, event: Fetch) -> list[Fetching]:
        """What the first does is what the rule says, and what the others do."""
        expected = expected_of(self.ledgers[0], event)
        outs = [ledger.handle_all([event]) for ledger in self.ledgers]
        assert outs[0] == outs[1] == outs[2]
        fetching = [one for one in outs[0] if isinstance(one, Fetching)]
        passed_on = [expert for one in outs[0] if isinstance(one, PassOn) for expert in one.experts]
        retired = {one.slot: one.expert for one in outs[0] if isinstance(one, Retire)}
        fetched, slots = [e for one in fetching for e in one.experts], [s for one in fetching for s in one.slots]
        assert (fetched, {*passed_on, *retired.values()}, len(passed_on) + len(retired)) == (
            expected[0], {*expected[1]}, len(expected[1]),
        )  # fmt: skip
        assert len({*slots}) == len(slots) and not {*slots} & {*retired, *event.unready}
        recalled = [slot for one in outs[0] if isinstance(one, Recall) for slot in one.slots]
        for ledger in self.ledgers:
            ledger.check()
            cooled = [slot for slot in (*retired, *recalled) if ledger.pool.use(slot) is Use.COOLING]
            ledger.handle_all([Cooled(cooled)])
            if event.spare and self.arranges:
                ledger.arrange()
        return fetching

    def tell(self, event: Met) -> None:
        for ledger in self.ledgers[:2]:
            ledger.handle_all([event])
        seen = []
        for layer in sorted({*event.layers.tolist()}):
            here = event.layers == layer
            experts, position = event.numbers[here] - layer * EXPERTS, event.position + layer * event.stride
            pairs, sources = event.pairs[here].tolist(), event.sources[here].tolist()
            seen.append(Seen(layer, experts.tolist(), sources, pairs, position))
        self.ledgers[2].handle_all(seen)
        assert self.ledgers[0].counters == self.ledgers[1].counters == self.ledgers[2].counters

    def handle(self, *events: Fetched | Predict | Provide | Tick) -> None:
        outs = [ledger.handle_all(events) for ledger in self.ledgers]
        assert outs[0] == outs[1] == outs[2]


def expected_of(ledger: DeviceLedger, event: Fetch) -> tuple[list[ExpertId], list[ExpertId]]:
    """Who is fetched and who gives way."""
    wanted = [ALL[number] for number in event.numbers.tolist()]
    absent = [expert for expert in wanted if ledger.state(expert) is State.ABSENT]
    uses = (Use.COLD, Use.COOLING, Use.FREE, *([Use.HANDED] if event.evict else []))
    empty = sum(slot not in event.unready for use in uses for slot in ledger.pool.slots(use))
    if not event.evict:
        return absent[: empty if event.most is None else min(empty, event.most)], []
    known = {number: ledger._uses.facts[number] for number in range(len(ALL))}
    barred = {*wanted, *event.unready.values()}
    may = [n for n, facts in known.items() if ledger.state(ALL[n]) is State.RESIDENT and ALL[n] not in barred]
    rank = ledger._policy.rank
    order = sorted(may, key=lambda n: (n in event.untold, not known[n].probation, rank(known[n]), known[n].last_use))
    given_up = [ALL[number] for number in order[: max(0, len(absent) + event.spare - empty)]]
    return absent[: empty + len(given_up)], given_up


@given(
    steps=STEPS, slots=st.integers(2, len(ALL)), policy=st.sampled_from(["lru", "lfu", "next-use"]),
    arranges=st.booleans(),
)  # fmt: skip
def test_plans_are_what_the_rule_says(
    steps: Sequence[tuple[list[int], int, bool, int, bool, int, bool]], slots: int, policy: str, arranges: bool
) -> None:
    twins, untold = Twins(slots, policy, arranges), np.empty(0, np.int64)
    every = np.arange(len(ALL))  # so that no two rank alike
    twins.tell(Met(every // EXPERTS, every, np.full(len(ALL), READ), np.ones(len(ALL), np.int64), 0, EXPERTS))
    unready: dict[int, ExpertId] = {}
    position = 0
    for chosen, spare, at_once, source, told, hinted, publishes in steps:
        position += len(ALL)
        numbers = np.array(sorted(chosen))
        twins.handle(Provide(spare, 0), Predict(tuple(Hint(ALL[n], position + n) for n in chosen[:hinted])))
        fetched = twins.fetch(Fetch(numbers, untold, unready, evict=False, most=1)) if at_once else []
        fetched += twins.fetch(Fetch(numbers, untold, unready, evict=False)) if at_once else []
        fetched += twins.fetch(Fetch(numbers, untold, unready, evict=True, spare=spare))
        unready = {} if publishes else unready
        for one in fetched:
            twins.handle(Fetched(one.number))
            unready |= dict(zip(one.slots, one.experts, strict=True))
        untold = numbers
        if told:
            sources: NDArray[np.int64] = np.full(len(numbers), source)
            pairs = np.arange(1, len(numbers) + 1)
            twins.tell(Met(numbers // EXPERTS, numbers, sources, pairs, position, EXPERTS))
            untold = numbers[:0]
            twins.handle(Tick(position + len(ALL)))
    first, *others = ([(f.last_use, f.next_use, f.probation) for f in ledger._uses.facts] for ledger in twins.ledgers)
    assert all(first == other for other in others)


def test_a_fetch_ends_once() -> None:
    ledger, numbers = make_ledger(4), np.array([0, 3])
    [fetching] = ledger.handle_all([Fetch(numbers, numbers[:0], {}, evict=True)])
    assert isinstance(fetching, Fetching) and ledger.counters.prefetch_issued == 2
    ledger.handle_all([Fetched(fetching.number)])
    assert ledger.resident_slots(0)[3] == fetching.slots[1] and ledger.is_idle()
    try:
        ledger.handle_all([Fetched(fetching.number)])
    except LedgerError as error:
        assert "law 3" in str(error)
    else:
        raise AssertionError("a fetch ended twice")
