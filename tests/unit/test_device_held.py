"""What virtual mode keeps on a device: nothing evicts it, it gives way to budgets, and it follows what is asked for."""

from __future__ import annotations

import numpy as np
import pytest

from expertd_engine.experts.accounting import LedgerError
from expertd_engine.experts.device_cache import DeviceCache
from expertd_engine.experts.device_events import Confine, Fill, Keep, LetGo, Provide, Retire
from expertd_engine.experts.device_held import DeviceHeld
from expertd_engine.experts.device_host import HostTier
from expertd_engine.experts.device_ledger import DeviceLedger
from expertd_engine.experts.device_pool import ChunkPlan, Use
from expertd_engine.experts.device_streams import HostDevice
from expertd_engine.experts.events import ExpertId
from expertd_engine.experts.leases import ExpertUnavailableError
from expertd_engine.experts.lookahead import NoLookahead
from expertd_engine.experts.policy import make_policy
from expertd_engine.experts.residency import State
from expertd_engine.experts.swaps import SwapLimits
from expertd_engine.experts.virtual import VirtualExperts
from expertd_engine.experts.virtual_room import VirtualRoom
from support.fake_device import RECORD, Records, index_of

LAYERS, EXPERTS, TOP_K = 2, 6, 2


def make_held(slots: int, share: float = 0.75) -> tuple[DeviceCache, DeviceHeld]:
    device, index = HostDevice(), index_of(LAYERS, EXPERTS, TOP_K)
    host = HostTier(index, device, available=2**20)
    host.fill(Records(), threads=1, report=lambda fraction: None)
    ledger = DeviceLedger(
        [RECORD] * LAYERS, [EXPERTS] * LAYERS, ChunkPlan(RECORD, 3, RECORD), slots * RECORD, make_policy("lru"),
        LAYERS * EXPERTS * RECORD,
    )  # fmt: skip
    cache = DeviceCache(index, device, host, ledger, NoLookahead(), EXPERTS)
    sets = VirtualExperts([[2.0, 2.0, *[1.0] * (EXPERTS - 2)]] * LAYERS, TOP_K, SwapLimits(in_flight=2, ahead=0))
    room = VirtualRoom([RECORD] * LAYERS, [EXPERTS] * LAYERS, TOP_K, share, [EXPERTS] * LAYERS)
    return cache, DeviceHeld(cache, sets, room)


def test_sets_open_from_an_empty_device_and_nothing_evicts_them() -> None:
    cache, held = make_held(slots=8)
    assert held.begin_step()
    assert held.sets.is_ready and cache.link.held == LAYERS * TOP_K * RECORD
    cache.settle()
    mask = [[bool(word) for word in row] for row in cache.table.held.tolist()]
    assert mask == [[expert in held.sets.held(layer) for expert in range(EXPERTS)] for layer in range(LAYERS)]
    cache.fill()
    kept = set(cache.ledger.kept)
    retired = [one.expert for one in cache.ledger.handle_all([Provide(0, 8)]) if isinstance(one, Retire)]
    assert len(retired) == 8 - len(kept) > 0 and not kept.intersection(retired)
    assert all(cache.ledger.state(expert) is State.LEASED for expert in kept)


def test_sets_open_while_copies_of_others_hold_every_slot() -> None:
    cache, held = make_held(slots=6)
    cache.settle()
    others = [ExpertId(layer, expert) for layer in range(LAYERS) for expert in (2, 3, 4)]
    cache._executor.handle([Provide(0, 0, still=True), Fill(others)])
    assert not cache.ledger.is_idle(), "nobody has looked whether they are there"
    assert held.begin_step() and held.sets.is_ready


def test_what_is_asked_for_comes_in_for_what_is_not() -> None:
    cache, held = make_held(slots=8, share=0.5)
    assert held.begin_step() and held.sets.slots == [TOP_K] * LAYERS
    outside = next(expert for expert in range(EXPERTS) if expert not in held.sets.held(1))
    asked = np.zeros((LAYERS, EXPERTS), np.float32)
    asked[1, outside] = 1.0
    held.digest(lambda: asked, 1.0)
    cache.poll()  # while a step runs
    cache.poll()
    assert outside not in held.sets.held(1), "its bytes are not there"
    cache.poll()
    cache.poll()
    assert outside in held.sets.held(1) and held.sets.swaps == [0, 1] and len(held.sets.held(1)) == TOP_K


def test_sets_follow_where_two_slots_are_all_that_is_left() -> None:
    cache, held = make_held(slots=LAYERS * TOP_K + 2, share=0.5)
    assert held.begin_step() and held.sets.slots == [TOP_K] * LAYERS
    asked = np.zeros((LAYERS, EXPERTS), np.float32)
    asked[1, next(expert for expert in range(EXPERTS) if expert not in held.sets.held(1))] = 1.0
    for step in range(5):
        cache.begin_step([])
        cache.before_launch()
        cache.after_launch()
        for _ in range(LAYERS + 1):
            cache.poll()
        cache.end_step()
        if step == 1:  # by then nothing has been missed, and slots that hold nothing are there to be handed to steps
            held.digest(lambda: asked, 1.0)
    assert held.sets.swaps == [0, 1]


def test_newcomers_take_back_what_steps_were_handed_and_do_not_use() -> None:
    """Exact steps that missed much leave slots to land in; virtual ones miss nothing, and never use them."""
    cache, held = make_held(slots=10, share=1.0)
    cache._executor.handle([Provide(4, 0)])
    cache._executor.handle([Fill([ExpertId(layer, expert) for layer in range(LAYERS) for expert in range(3)])])
    cache._executor.drain()
    assert cache.ledger.pool.number(Use.HANDED) == 4 and not cache.ledger.kept
    for _ in range(4):
        assert held.begin_step()
        cache.begin_step([])
        for part in (cache.before_launch, cache.after_launch, cache.poll, cache.poll, cache.end_step):
            part()
    assert held.sets.slots == [4, 4] == [len(held.sets.held(layer)) for layer in range(LAYERS)]
    cache.settle()
    cache.ledger.check()


def test_a_prompt_finds_room_where_newcomers_have_taken_all_of_it() -> None:
    cache, held = make_held(slots=6, share=0.5)
    assert held.begin_step() and held.sets.slots == [TOP_K] * LAYERS
    asked = np.zeros((LAYERS, EXPERTS), np.float32)
    asked[:, 4] = 1.0
    held.digest(lambda: asked, 1.0)
    cache.poll()
    cache.poll()
    cache.fill()  # they arrive, and whom they replace is still kept
    assert len(cache.ledger.kept) == 6
    with cache.stage():
        pass
    assert len(cache.ledger.kept) == LAYERS * TOP_K and held.sets.swaps == [1, 1]


def test_a_budget_that_is_too_small_closes_the_sets_and_a_larger_one_opens_them() -> None:
    cache, held = make_held(slots=8)
    assert held.refusal() is None and held.begin_step()
    cache.set_budget(4 * RECORD)
    assert not held.sets.is_open and not cache.ledger.kept and not held.begin_step()
    assert f"{2 * TOP_K * RECORD + 2 * RECORD}" in (held.refusal() or "")
    cache.set_budget(10 * RECORD)
    assert held.begin_step() and held.sets.is_ready


def test_a_device_without_a_slot_to_spare_says_so() -> None:
    cache, held = make_held(slots=8)
    for expert in range(4):  # somebody else keeps all
        cache.keep(Keep(ExpertId(0, expert)))
        cache.keep(Keep(ExpertId(1, expert)))
    cache.bring()
    cache.take_kept()
    with pytest.raises(LedgerError, match="8 are kept, and 2 slots are left"):
        cache.ledger.handle_all([Confine(2)])
    with pytest.raises(LedgerError, match="kept already"):
        held.begin_step()
    cache.keep(LetGo(ExpertId(0, 0)))
    with pytest.raises(LedgerError, match="let go, but is not kept"):
        cache.keep(LetGo(ExpertId(0, 0)))


def test_experts_that_never_come_fail_the_step(monkeypatch: pytest.MonkeyPatch) -> None:
    cache, held = make_held(slots=8)
    monkeypatch.setattr(held, "_at_hand", list)
    for layer in range(LAYERS):
        for expert in (2, 3, 4, 5):
            cache.keep(Keep(ExpertId(layer, expert)))
    cache.bring()
    cache.take_kept()
    with pytest.raises(ExpertUnavailableError, match="no slot can be had for any of 4 experts"):
        held.begin_step()
