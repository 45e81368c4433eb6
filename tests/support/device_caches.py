"""Small expert caches of a device, whose records all lie in the host's memory."""

from __future__ import annotations

from expertd_engine.experts.device_cache import DeviceCache
from expertd_engine.experts.device_host import HostTier
from expertd_engine.experts.device_ledger import DeviceLedger
from expertd_engine.experts.device_pool import ChunkPlan
from expertd_engine.experts.device_streams import HostDevice
from expertd_engine.experts.lookahead import NoLookahead
from expertd_engine.experts.policy import make_policy
from support.fake_device import RECORD, FakeDevice, Records, index_of

LAYERS, EXPERTS = 2, 6
PLAN = ChunkPlan(RECORD, 3, RECORD)


def make_ledger(slots: int, depth: int = 4) -> DeviceLedger:
    sizes, counts = [RECORD] * LAYERS, [EXPERTS] * LAYERS
    most = LAYERS * EXPERTS * RECORD
    return DeviceLedger(sizes, counts, PLAN, slots * RECORD, make_policy("lru"), most, prefetch_depth=depth)


def make_cache(slots: int, device: FakeDevice | HostDevice) -> DeviceCache:
    index = index_of(LAYERS, EXPERTS, 2)
    host = HostTier(index, device, available=2**20)
    host.fill(Records(), threads=1, report=lambda fraction: None)
    return DeviceCache(index, device, host, make_ledger(slots), NoLookahead(), EXPERTS)
