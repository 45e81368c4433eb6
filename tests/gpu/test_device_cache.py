"""A device's expert cache on a real device: pinned memory, copies beside compute, memory seen from outside."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from expertd_engine.experts.device_cache import DeviceCache
from expertd_engine.experts.device_events import HIT
from expertd_engine.experts.device_host import HostTier
from expertd_engine.experts.device_ledger import DeviceLedger
from expertd_engine.experts.device_slab import plan_chunks
from expertd_engine.experts.device_staging import Chunk
from expertd_engine.experts.device_streams import CudaDevice
from expertd_engine.experts.events import ExpertId, Hint
from expertd_engine.experts.lookahead import Exactness
from expertd_engine.experts.policy import make_policy
from support.fake_device import index_of

pytestmark = pytest.mark.gpu
LAYERS, EXPERTS, RECORD = 48, 32, 9_437_184
ALL = LAYERS * EXPERTS * RECORD
QUARTER = ALL // 4


class Patterned:
    """Records whose first bytes tell who they are."""

    def place_of(self, expert: ExpertId) -> None:
        """Each is read by itself."""

    def read_record(self, expert: ExpertId, buffer: memoryview) -> None:
        buffer[:2] = bytes(expert)
        buffer[-2:] = bytes(expert)


class Told:
    """Foresees what it is told, once a layer has routed."""

    exactness: Exactness = "exact"

    def __init__(self) -> None:
        self.next: list[Hint] = []

    def begin_step(self, step: int, token_ids: Sequence[int]) -> list[Hint]:
        return []

    def routed(self, step: int, layer: int, experts: Sequence[int]) -> list[Hint]:
        told, self.next = self.next, []
        return told

    def next_use(self, expert: ExpertId, after: int) -> int | None:
        return None


def note(**figures: float) -> None:
    """Print, and keep beside the run's other output."""
    print(figures)
    if "OUT" in os.environ:
        with (Path(os.environ["OUT"]) / "device_cache.jsonl").open("a") as file:
            file.write(json.dumps(figures) + "\n")


@pytest.fixture(scope="module")
def device() -> CudaDevice:
    return CudaDevice(torch.device("cuda"))


@pytest.fixture(scope="module")
def host(device: CudaDevice) -> Iterator[HostTier]:
    index = index_of(LAYERS, EXPERTS, 8, RECORD)
    began = time.perf_counter()
    tier = HostTier(index, device, available=2 * ALL)
    tier.fill(Patterned(), threads=16, report=lambda fraction: None)
    note(host_gib=tier.bytes / 2**30, fill_and_pin_s=time.perf_counter() - began)
    assert tier.pinned
    yield tier
    tier.close()


@pytest.fixture
def cache(device: CudaDevice, host: HostTier) -> Iterator[DeviceCache]:
    plan = plan_chunks(RECORD, LAYERS * EXPERTS)
    policy = make_policy("next-use", 8 * LAYERS)
    ledger = DeviceLedger([RECORD] * LAYERS, [EXPERTS] * LAYERS, plan, QUARTER, policy, ALL + 2**28, prefetch_depth=16)
    made = DeviceCache(index_of(LAYERS, EXPERTS, 8, RECORD), device, host, ledger, Told(), EXPERTS)
    yield made
    while not made.ledger.is_idle():
        made.pump()
    torch.cuda.synchronize()
    made.slab.resize(0)


def used() -> int:
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return total - free


def check_residents(cache: DeviceCache) -> int:
    """Every resident's slot holds its record, and its entry says so; the number of residents."""
    torch.cuda.synchronize()
    entries, residents = cache.table.entries.cpu(), 0
    for layer in range(LAYERS):
        for expert, slot in enumerate(cache.ledger.resident_slots(layer)):
            if slot < 0:
                assert entries[layer, expert, 0] == cache.host.home(ExpertId(layer, expert))
                continue
            view = cache.slab.view(slot, RECORD)
            assert view[[0, 1, -2, -1]].tolist() == [layer, expert] * 2
            assert entries[layer, expert].tolist() == [cache.slab.address(slot), 0]
            residents += 1
    return residents


def test_slots_fill_at_the_speed_of_the_link(cache: DeviceCache) -> None:
    began = time.perf_counter()
    cache.fill()
    seconds = time.perf_counter() - began
    slots = cache.slab.slots
    note(link_gb_s=cache.link_bytes_per_s / 1e9, fill_gb_s=slots * RECORD / seconds / 1e9, slots=slots)
    assert check_residents(cache) == slots


def test_the_budget_is_what_the_device_says(cache: DeviceCache) -> None:
    full = used()
    cache.fill()
    cache.set_budget(QUARTER // 2)
    assert full - used() >= QUARTER // 2 - 2**28
    assert cache.slab.bytes <= QUARTER // 2 and check_residents(cache) > 0
    cache.set_budget(QUARTER)
    assert used() <= full and cache.slab.bytes <= QUARTER
    check_residents(cache)


def test_what_is_foreseen_is_copied_beside_a_running_step(cache: DeviceCache) -> None:
    """Long products stand in for a step; hints come while they run, the next boundary publishes what they brought."""
    told = cache.lookahead
    assert isinstance(told, Told)
    cache.routes = lambda: lambda layer: ()
    cache.fill()
    busy = torch.randn(8192, 8192, device="cuda")
    foreseen = [ExpertId(layer, EXPERTS - 1 - e) for e in range(2) for layer in range(0, LAYERS, 2)]
    beside = 0
    for step in range(1, 6):
        cache.begin_step(())
        cache.before_launch()
        cache.table.apply()
        for _ in range(20):
            busy @ busy
        cache.after_launch()
        running = cache.device.compute.mark()
        told.next = [Hint(e, (step + 1) * LAYERS * EXPERTS + e.layer * EXPERTS + e.expert) for e in foreseen]
        cache.table.progress[0] = cache.table.staged_launch + 1
        before = cache.link.prefetched
        while not running.done():
            cache.poll()
        beside += cache.link.prefetched - before
        cache.end_step()
    cache.settle()
    arrived = sum(cache.ledger.resident_slots(e.layer)[e.expert] >= 0 for e in foreseen)
    note(copied_beside_compute=beside / RECORD, foreseen_resident=arrived)
    assert beside and arrived
    check_residents(cache)


def test_a_step_costs_the_host_little(cache: DeviceCache) -> None:
    """384 lookups, a tenth of them landing, told by hand; prints what the host does per step."""
    cache.fill()
    report = cache.table
    generator = torch.Generator().manual_seed(0)
    spent: list[dict[str, float]] = []
    for _ in range(40):
        cache.begin_step(())
        cache.before_launch()
        cache.table.apply()
        chosen = torch.stack([torch.randperm(EXPERTS, generator=generator)[:8].sort().values for _ in range(LAYERS)])
        rows = torch.stack(
            [chosen, torch.full_like(chosen, HIT), torch.full_like(chosen, -1), torch.ones_like(chosen)], -1
        )
        report.seen[:, :8] = rows.to(torch.int32).cuda()
        report.seen_count.fill_(8)
        torch.cuda.synchronize()
        parts: dict[str, float] = {}
        for name, call, times in (("after_launch", cache.after_launch, 1), ("poll", cache.poll, 80)):
            began = time.perf_counter()
            for _ in range(times):
                call()
            parts[name] = 1e3 * (time.perf_counter() - began)
        met = cache.end_step()
        spent.append(parts)
    middle = {name: sorted(part[name] for part in spent)[len(spent) // 2] for name in spent[0]}
    note(**{f"{name}_ms": value for name, value in middle.items()})
    assert cache.ledger.counters.lookups() == 39 * 8 * LAYERS
    assert met.hits == 8 * LAYERS


def test_a_prefill_streams_what_is_absent(cache: DeviceCache) -> None:
    cache.fill()
    for timed in (True, False):
        cache.begin_step((), scan=True)
        torch.cuda.synchronize()
        began = time.perf_counter()
        with cache.stage() as staging:
            absent = sum(
                _take(cache, layer, staging.chunks(layer, torch.empty(0)), not timed) for layer in range(LAYERS)
            )
        torch.cuda.synchronize()
        if timed:
            note(staged=absent, staged_gb_s=absent * RECORD / (time.perf_counter() - began) / 1e9)
        cache.scanned([[1] * EXPERTS] * LAYERS)
        assert cache.end_step().misses == absent > 0


def _take(cache: DeviceCache, layer: int, chunks: Iterator[Chunk], check: bool) -> int:
    slots = {cache.slab.address(slot): slot for slot in range(cache.slab.slots)} if check else {}
    count = 0
    for chunk in chunks:
        count += chunk.count
        for index, address in zip(chunk.indices, chunk.addresses.tolist() if check else (), strict=check):
            assert cache.slab.view(slots[address], RECORD)[[0, 1, -2, -1]].tolist() == [layer, index] * 2
    return count
