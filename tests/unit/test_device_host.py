"""Where a device reads experts: memory that is pinned, that cannot be, that holds some of them, or that is its own."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from expertd_engine.errors import BudgetError, ResourceError
from expertd_engine.experts.device_cache import DeviceCache
from expertd_engine.experts.device_host import HostTier
from expertd_engine.experts.device_pool import Use
from expertd_engine.experts.device_spill import SpilledHost
from expertd_engine.experts.events import ExpertId, Hint
from expertd_engine.experts.lookahead import NoLookahead
from expertd_engine.experts.policy import make_policy
from support.device_caches import EXPERTS, LAYERS, make_cache, make_ledger
from support.fake_device import RECORD, FakeDevice, FakeStep, Records, content, index_of


def test_a_host_without_room_is_refused_with_the_shortfall() -> None:
    with pytest.raises(ResourceError, match=f"{LAYERS * EXPERTS * RECORD} bytes, and 100 are available"):
        HostTier(index_of(LAYERS, EXPERTS, 2), FakeDevice(), available=100)


def test_a_record_that_layers_share_is_read_once() -> None:
    index, records = index_of(LAYERS, EXPERTS, 2), Records()
    index.layers[1:] = [index.layers[0]]
    host = HostTier(index, FakeDevice(), available=2**20)
    host.fill(records, threads=1, report=lambda fraction: None)
    assert records.reads == EXPERTS and bytes(host.record(ExpertId(1, 3)).numpy()) == content(ExpertId(0, 3))


def test_where_nothing_can_be_pinned_experts_are_brought_in_layer_by_layer(caplog: pytest.LogCaptureFixture) -> None:
    device = FakeDevice()
    device.unpinnable = "no permission"
    cache = make_cache(6, device)
    assert "no permission" in caplog.text and cache.by_layer
    expect_served_by_layer(cache, device)


def test_a_host_that_holds_some_reads_the_others() -> None:
    device, index, records = FakeDevice(), index_of(LAYERS, EXPERTS, 2), Records()
    with pytest.raises(BudgetError, match="host budget"):
        SpilledHost(index, device, records, RECORD, make_policy("lru"), threads=1)
    host = SpilledHost(index, device, records, 4 * RECORD, make_policy("lru"), threads=1)
    cache = DeviceCache(index, device, host, make_ledger(6), NoLookahead(), EXPERTS)
    assert cache.by_layer and cache.tiers().host_bytes == 4 * RECORD
    expect_served_by_layer(cache, device)
    assert 0 < records.reads <= 2 * LAYERS * 3
    cache.close()
    assert not device.registered


class AllForetold(NoLookahead):
    """Names every expert, for the step after the first."""

    def begin_step(self, step: int, token_ids: Sequence[int]) -> list[Hint]:
        everyone = [ExpertId(layer, expert) for layer in range(LAYERS) for expert in range(EXPERTS)]
        return [Hint(expert, 2 * len(everyone) + place) for place, expert in enumerate(everyone)]


def test_a_prompt_waits_for_experts_that_are_being_copied_where_all_have_slots() -> None:
    cache = make_cache(LAYERS * EXPERTS, FakeDevice())
    cache.lookahead = AllForetold()
    cache.begin_step((), scan=True)
    assert cache.ledger.pool.number(Use.OWNED) == LAYERS * EXPERTS > sum(cache.ledger.residents_by_layer())
    with cache.stage() as staging:
        assert [staging.resident(layer).count for layer in range(LAYERS)] == [EXPERTS] * LAYERS


def expect_served_by_layer(cache: DeviceCache, device: FakeDevice) -> None:
    """Twice the same step: what was chosen is there while it is read, and of what came in, most is there again."""
    chosen, met = torch.tensor([1, 0, 2, 0, 0, 1]), []
    for _ in range(2):
        cache.begin_step(())
        with cache.stage() as staging:
            for layer in range(LAYERS):
                known = list(staging.resident(layer).indices)
                for chunk in staging.chunks(layer, chosen):
                    device.compute.mark().wait()
                    known += chunk.indices
                    for expert, address in zip(chunk.indices, chunk.addresses.tolist(), strict=True):
                        slot = next(s for s in range(6) if cache.slab.address(s) == address)
                        assert bytes(cache.slab.view(slot, RECORD).numpy()) == content(ExpertId(layer, expert))
                assert {0, 2, 5} <= set(known)
        cache.scanned([chosen.tolist()] * LAYERS)
        met.append(cache.end_step())
        cache.ledger.check()
    assert (met[0].hits, met[0].misses) == (0, 6) and met[1].hits > 0
    assert cache.ledger.counters.lookups() == 12


def test_a_device_that_shares_memory_reads_everything_at_home() -> None:
    device = FakeDevice()
    device.shares_memory = True
    cache = make_cache(4, device)
    cache.begin_step(())
    cache.before_launch()
    FakeStep(cache.table, [{0: 1, 3: 2}, {5: 1}]).give(device.lanes[0])
    cache.after_launch()
    counts = cache.end_step()
    assert (counts.hits, counts.misses, device.bytes_allotted(), cache.tiers().slots) == (3, 0, 0, 0)
    with pytest.raises(ResourceError, match="shares the host's memory"):
        cache.set_budget(4 * RECORD)
