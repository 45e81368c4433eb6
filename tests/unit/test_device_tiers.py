"""The parts of a device's expert cache by themselves: slots, chunks, the table's words, what is set aside."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import pytest
import torch

from expertd_engine.errors import BudgetError, ResourceError
from expertd_engine.experts.accounting import LedgerError
from expertd_engine.experts.device_aside import Aside
from expertd_engine.experts.device_copies import DeviceCopies
from expertd_engine.experts.device_events import (
    COMPUTED,
    HIT,
    LANDED,
    READ,
    SHARED,
    Cooled,
    Fill,
    Hand,
    Landed,
    Provide,
    Retire,
    Seen,
)
from expertd_engine.experts.device_layout import HOME, TableLayout, Words, halves, signed
from expertd_engine.experts.device_ledger import DeviceLedger
from expertd_engine.experts.device_pool import ChunkPlan, Use
from expertd_engine.experts.device_publication import Publication
from expertd_engine.experts.device_report import count_report
from expertd_engine.experts.device_slab import DeviceSlab
from expertd_engine.experts.device_streams import HostDevice, Mark
from expertd_engine.experts.device_table import DeviceTable, Report
from expertd_engine.experts.events import ExpertId, Hint, Load, Loaded, Predict, Priority, Tick
from expertd_engine.experts.policy import LRU, Facts, make_policy
from expertd_engine.experts.residency import State
from support.device_caches import EXPERTS, LAYERS, PLAN, make_cache, make_ledger
from support.fake_device import RECORD, FakeDevice, FakeStep


def address_words(layout: TableLayout, expert: ExpertId, address: int) -> Words:
    words: Words = {}
    layout.note_address(words, expert, halves(address))
    return words


# ------------------------------------------------------------ chunks and slots


def test_chunks_never_take_more_than_the_budget() -> None:
    plan = ChunkPlan(slot_bytes=3, chunk_slots=5, granule=8)
    for budget in range(200):
        whole, rest = divmod(plan.slots_within(budget), 5)
        assert whole * plan.bytes_of(5) + (plan.bytes_of(rest) if rest else 0) <= budget
    assert plan.slots_within(16) == 5 and plan.slots_within(24) == 7


def test_a_slab_that_finds_no_room_keeps_what_it_had() -> None:
    device = FakeDevice(most_bytes=7 * RECORD)
    slab = DeviceSlab(PLAN, device)
    slab.resize(6)
    before = slab.address(5)
    with pytest.raises(ResourceError):
        slab.resize(9)
    assert slab.slots == 6 and slab.address(5) == before and device.bytes_allotted() == 6 * RECORD
    slab.resize(2)
    assert device.bytes_allotted() == 2 * RECORD


def test_a_budget_for_which_there_is_no_room_leaves_what_there_is() -> None:
    device = FakeDevice(most_bytes=7 * RECORD)
    cache = make_cache(6, device)
    cache.fill()
    with pytest.raises(ResourceError):
        cache.set_budget(9 * RECORD)
    assert cache.ledger.budget_bytes == cache.slab.bytes == 6 * RECORD
    with pytest.raises(BudgetError):
        cache.set_budget(RECORD)
    cache.ledger.check()
    assert sum(cache.ledger.residents_by_layer()) == 6


def test_a_lower_budget_keeps_all_that_it_has_room_for() -> None:
    cache = make_cache(8, FakeDevice())
    cache.fill()
    cache.set_budget(6 * RECORD)
    assert sum(cache.ledger.residents_by_layer()) == 6


# ------------------------------------------------------------ two phases, event by event


def test_a_retired_slot_is_not_copied_into_before_it_has_cooled() -> None:
    ledger = make_ledger(slots=2)
    expert, other, wanted = ExpertId(0, 0), ExpertId(0, 1), ExpertId(1, 3)
    [hand_a, hand_b] = ledger.handle_all([Provide(2, 0)])
    assert isinstance(hand_a, Hand) and isinstance(hand_b, Hand)
    uses = Seen(0, [0, 1], [LANDED, LANDED], [1, 1], position=12)
    assert ledger.handle_all([uses, Landed(expert, hand_a.slot), Landed(other, hand_b.slot)]) == []
    assert ledger.handle_all([Provide(0, 1), Predict((Hint(wanted, 100),))]) == [Retire(hand_a.slot, expert)]
    assert ledger.state(expert) is State.ABSENT and ledger.pool.use(hand_a.slot) is Use.COOLING
    assert ledger.handle_all([Cooled((hand_a.slot,))]) == [Load(0, wanted, hand_a.slot, Priority.PREFETCH)]
    ledger.handle_all([Loaded(0)])
    assert ledger.state(wanted) is State.RESIDENT and ledger.counters.misses == [2, 0]


def test_what_lands_while_it_is_copied_is_retired() -> None:
    ledger = make_ledger(slots=4)
    expert = ExpertId(1, 2)
    [hand] = ledger.handle_all([Provide(1, 2)])
    [load] = ledger.handle_all([Predict((Hint(expert, 100),))])
    assert isinstance(hand, Hand) and isinstance(load, Load)
    assert ledger.handle_all([Landed(expert, hand.slot)]) == [Retire(hand.slot, expert)]
    ledger.handle_all([Loaded(load.load_id)])
    assert ledger.duplicates == 1 and ledger.resident_slots(1)[2] == load.slot


def test_a_landing_in_a_slot_that_nobody_handed_out_is_an_error() -> None:
    with pytest.raises(LedgerError, match="law 2"):
        make_ledger(slots=4).handle_all([Landed(ExpertId(0, 0), 1)])


def test_uses_are_counted_by_what_the_device_met() -> None:
    ledger = make_ledger(slots=4)
    ledger.handle_all([Seen(1, [0, 2, 3, 5], [0, READ, 2, LANDED], [3, 1, 1, 2], position=18)])
    counters = ledger.counters
    assert (counters.hits, counters.late, counters.misses) == ([0, 1], [0, 1], [0, 2])
    assert counters.activations == {"hit": [0, 3], "late": [0, 1], "miss": [0, 3]}
    assert counters.demand_bytes == 2 * RECORD


# ------------------------------------------------------------ the table


def test_addresses_survive_being_two_words() -> None:
    layout = TableLayout(LAYERS, EXPERTS, slots=4, landing=4)
    table = DeviceTable(layout, EXPERTS, HostDevice())
    address = 0xFFFF_8765_FEDC_B001
    table.stage(address_words(layout, ExpertId(1, 5), address) | layout.slot_words(2, address - 1))
    table.apply()
    assert table.entries[1, 5].tolist() == [address - 2**64, 0]
    assert int(table.slot_address[2]) == address - 1 - 2**64 and int(table.entries[0].abs().sum()) == 0
    assert signed(2**31) == -(2**31)
    with pytest.raises(ValueError, match="power of two"):
        TableLayout(1, 1, 1, 3)


def test_more_words_than_one_launch_applies() -> None:
    layout = TableLayout(layers=40, experts=64, slots=8, landing=8)
    table = DeviceTable(layout, 8, HostDevice())
    words: dict[int, int] = {}
    for layer in range(40):
        for expert in range(64):
            words |= address_words(layout, ExpertId(layer, expert), 4096 * (64 * layer + expert))
    table.stage(words)
    table.apply()
    assert torch.equal(table.entries[..., 0].flatten(), 4096 * torch.arange(40 * 64))


def test_boundaries_that_follow_each_other_quickly_lose_no_word() -> None:
    device = FakeDevice()
    layout = TableLayout(LAYERS, EXPERTS, slots=4, landing=4)
    table = DeviceTable(layout, EXPERTS, device)
    for expert in range(4):  # nothing has been sent when the next is staged
        table.stage(address_words(layout, ExpertId(1, expert), 4096 * (expert + 1)))
        table.apply_now()
    device.compute.mark().wait()
    assert table.entries[1, :, 0].tolist() == [4096, 8192, 12288, 16384, 0, 0]


def test_nothing_is_launched_behind_a_launch_that_has_yet_to_take_in_what_it_was_given() -> None:
    device = FakeDevice()
    cache, lane = make_cache(8, device), device.lanes[0]

    def launch() -> Mark:
        cache.begin_step(())
        cache.before_launch()
        FakeStep(cache.table, [{0: 1} for _ in range(LAYERS)]).give(lane)
        return cache.after_launch()

    first = launch()
    while not cache.nears_end:
        lane.advance()
    assert not first.done()
    launch()
    while not first.done():
        lane.advance()
    cache.end_step()
    looks = []
    while not cache.table.layers_known(cache.table.staged_launch):
        looks.append(cache.nears_end)
        lane.advance()
    assert looks and not any(looks), "the first's layers are none of the second's"


def test_a_slot_handed_out_while_it_is_retired_does_not_cool() -> None:
    layout = TableLayout(LAYERS, EXPERTS, slots=4, landing=4)
    publication = Publication(layout, home=lambda expert: 8192 | HOME)
    publication.place_slot(1, 4096)
    publication.retire(1, ExpertId(0, 0), lies_in=-1)
    publication.retire(2, ExpertId(0, 1), lies_in=1)
    publication.hand(1)
    boundary = publication.boundary()
    assert boundary.retired == (2,) and boundary.words[layout.list] == 1 and boundary.words[layout.tail] == 1
    assert boundary.words[0] == 8192 | HOME and boundary.words[4] == 4096
    assert publication.boundary().words == {}


def test_a_slot_whose_ready_a_launch_puts_back_is_not_copied_into_beside_that_launch() -> None:
    layout = TableLayout(LAYERS, EXPERTS, slots=4, landing=4)
    publication = Publication(layout, home=lambda expert: 8192 | HOME)
    for awaited, cooled in ((False, [(), (2,)]), (True, [(2,), ()])):
        publication.copied(ExpertId(0, 1), 2)
        publication.retire(2, ExpertId(0, 1), lies_in=-1)
        boundaries = [publication.boundary(awaited=awaited), publication.boundary()]
        assert boundaries[0].words[layout.ready + 2] == 0 and boundaries[0].words[4] == 8192 | HOME
        assert [boundary.retired for boundary in boundaries] == cooled


# ------------------------------------------------------------ copies


def test_what_has_not_begun_can_be_taken_back() -> None:
    device = FakeDevice()
    table = DeviceTable(TableLayout(LAYERS, EXPERTS, slots=4, landing=4), EXPERTS, device)
    copies = DeviceCopies(device, table, record_bytes=2**30)  # two at once
    room = torch.zeros(8, dtype=torch.uint8)
    for number in range(3):
        load = Load(number, ExpertId(0, number), number, Priority.PREFETCH)
        copies.submit(load, room.data_ptr() + 4, room.data_ptr(), 4)
    copies.begin()
    assert copies.begun == 2 and copies.cancel(0) is None and copies.cancel(2) is not None
    assert copies.complete() == []
    copies.wait()
    assert [loaded.load_id for _, loaded in copies.complete()] == [0]
    assert table.ready.tolist()[:1] == [1] and int(table.entries[0, 0, 1]) == 1


# ------------------------------------------------------------ what is set aside


def test_what_is_set_aside_follows_what_steps_miss() -> None:
    aside = Aside()
    for _ in range(40):
        aside.step(misses=30, prefetches=20)
    settled = aside.wanted(slots=1000, unused=60, absent=500, room=4096, foresees=True)
    assert (settled.landing, settled.reserve) == (60, 44)
    assert aside.wanted(slots=1000, unused=0, absent=0, room=4096, foresees=True) == Provide(0, 0)
    few = aside.wanted(slots=10, unused=0, absent=500, room=4096, foresees=True)
    assert few.landing + few.reserve <= 4
    for _ in range(20):  # half of what is set aside can be used in a step, so less than is sought would stay so
        aside.step(misses=30, prefetches=math.floor(aside.prefetches), fell_short=True)
    assert aside.wanted(slots=1000, unused=0, absent=500, room=4096, foresees=True).reserve > 2 * settled.reserve


def test_prompts_evict_nothing_where_everything_fits_and_no_more_than_a_ring_elsewhere() -> None:
    for slots, least in ((12, 12), (8, 6)):
        cache = make_cache(slots, HostDevice())
        cache.fill()
        for _ in range(6):
            cache.begin_step((), scan=True)
            with cache.stage() as staging:
                for layer in range(LAYERS):
                    assert (
                        staging.resident(layer).count
                        + sum(chunk.count for chunk in staging.chunks(layer, torch.empty(0)))
                        == EXPERTS
                    )
            cache.scanned([[1] * EXPERTS] * LAYERS)
            cache.end_step()
            assert sum(cache.ledger.residents_by_layer()) >= least


# ------------------------------------------------------------ who stays


class Adapting(LRU):
    """Tells that it ranks otherwise, once; `met` is what it was asked with."""

    def __init__(self) -> None:
        self.met: list[tuple[int, int, int]] = []

    def adapt(self, lookups: int, slots: int, known: Iterable[Facts]) -> bool:
        self.met.append((lookups, slots, len(list(known))))
        return len(self.met) == 1


def test_a_devices_policy_may_adapt_with_every_step() -> None:
    policy = Adapting()
    ledger = DeviceLedger([RECORD] * LAYERS, [EXPERTS] * LAYERS, PLAN, 4 * RECORD, policy)
    ledger.handle_all([Seen(1, [0, 2], [READ, READ], [1, 1], position=18), Tick(24)])
    assert policy.met == [(2, 4, LAYERS * EXPERTS)]


def test_what_the_processor_computed_is_copied_in_where_it_ranks_above_who_gives_way() -> None:
    ledger = DeviceLedger([RECORD], [EXPERTS], PLAN, 3 * RECORD, make_policy("lfu"), EXPERTS * RECORD)
    ledger.brings_in = True
    brought = ledger.handle_all([Fill([ExpertId(0, expert) for expert in range(3)])])
    ledger.handle_all([Loaded(one.load_id) for one in brought if isinstance(one, Load)])
    met = Seen(0, [0, 1, 2], [HIT] * 3, [1] * 3, 0)
    ledger.handle_all([met, met])
    [*_, retired] = [one.slot for one in ledger.handle_all([Provide(0, 1)]) if isinstance(one, Retire)]
    ledger.handle_all([Cooled([retired])])
    computed = [Seen(0, [5], [COMPUTED], [1], 0)]
    assert ledger.handle_all(computed) == [], "others are used more often"
    divided = Seen(0, [5], [SHARED], [1], 0, shared_bytes=7)
    hinted = ledger.handle_all([Predict((Hint(ExpertId(0, 4), 9),)), *computed, divided])
    [hinted_load] = [one for one in hinted if isinstance(one, Load)]
    assert hinted_load.expert == ExpertId(0, 4), "hints come first"
    ledger.handle_all([Loaded(hinted_load.load_id)])
    [*_, retired] = [one.slot for one in ledger.handle_all([Provide(0, 1)]) if isinstance(one, Retire)]
    assert ledger.handle_all([Cooled([retired])]) == ledger.handle_all([Tick(1)]) == [], (
        "and go on coming first for a while"
    )
    assert ledger.handle_all([Tick(2)]) != []
    assert ledger.state(ExpertId(0, 5)) is State.LOADING
    assert ledger.brought_in == 1 and ledger.counters.misses == [3]
    assert ledger.counters.demand_bytes % RECORD == 7
    ledger.check()


def test_what_an_earlier_step_reported_of_more_experts_does_not_count() -> None:
    divided, all_there = [[3, SHARED, 64, 1], [5, SHARED, 128, 1]], [[0, HIT, -1, 1], [1, HIT, -1, 1]]
    report = Report(np.array([divided, all_there], np.int32), np.array([1, 2], np.int32))
    counts = count_report(report, [RECORD] * 2, 1.0, lambda layer, cut: cut)
    assert (counts.hits, counts.misses, counts.loaded_bytes) == (2, 1, 64)
