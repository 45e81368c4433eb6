"""Keys and values on a device: which memory goes back when the pool above shrinks, and that the rest stays as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from expertd_engine.errors import ResourceError
from expertd_engine.experts.device_range import CudaAddresses, DriverRefused
from expertd_engine.experts.device_streams import HostDevice
from expertd_engine.experts.slab import PAGE
from expertd_engine.model.cuda_kv import DeviceKV
from expertd_engine.model.kv_storage import LayerShape

SHAPES = [LayerShape(1, 2, 20, 12), LayerShape(2, 1, 16, 16)]
BLOCKS = 12


def make() -> DeviceKV:
    """Blocks of 1536 bytes, so that pages are shared by two and three of them."""
    kv = DeviceKV(SHAPES, BLOCKS, 4, torch.float32, HostDevice())
    assert PAGE % kv.block_bytes and kv.block_bytes == 1536
    for block in range(BLOCKS):
        for pool in (*kv.keys, *kv.values):
            pool[block] = block + 1
    return kv


def kept(kv: DeviceKV, block: int) -> bool:
    return all(bool((pool[block] == block + 1).all()) for pool in (*kv.keys, *kv.values))


def gone(kv: DeviceKV, block: int) -> bool:
    """Whether any of its memory went back: that reads as zeros."""
    return any(bool((pool[block] == 0).any()) for pool in (*kv.keys, *kv.values))


def test_layers_have_the_shapes_that_kernels_read() -> None:
    kv = make()
    assert [tuple(pool.shape) for pool in kv.keys] == [(BLOCKS, 4, 1, 20), (BLOCKS, 4, 2, 16)]
    assert [tuple(pool.shape) for pool in kv.values] == [(BLOCKS, 4, 1, 12), (BLOCKS, 4, 2, 16)]
    assert all(pool.stride(-1) == 1 for pool in (*kv.keys, *kv.values))


def test_what_is_dropped_goes_back_and_every_other_block_stays() -> None:
    kv = make()
    for block in (11, 9, 10, 8, 8):
        kv.drop(block)
    assert all(kept(kv, block) for block in range(8))
    assert all(gone(kv, block) for block in (9, 10, 11)), "two pages and more are no one's"
    kv.provide(10)
    for pool in (*kv.keys, *kv.values):
        pool[8:10] = 7
    assert all(kept(kv, block) for block in range(8))
    kv.drop(7)
    assert all(bool((pool[8:10] == 7).all()) for pool in (*kv.keys, *kv.values)), "a page that another lies in stays"


def test_no_room_for_what_comes_back_leaves_what_was_there(monkeypatch: pytest.MonkeyPatch) -> None:
    kv = make()
    for block in range(4, BLOCKS):
        kv.drop(block)

    def refuse(piece: int) -> None:
        raise ResourceError("no room, as planted")

    with monkeypatch.context() as patched, pytest.raises(ResourceError, match="planted"):
        patched.setattr(kv._range, "back", refuse)
        kv.provide(BLOCKS)
    assert all(kept(kv, block) for block in range(4))
    kv.provide(BLOCKS)


class Driver:
    """libcuda's virtual memory calls: counts what is there, refuses `refused`."""

    def __init__(self) -> None:
        self.refused = ""
        self.handles = self.mapped = 0

    def __getattr__(self, name: str) -> Any:
        def call(*arguments: Any) -> int:
            if name == self.refused:
                return 2
            self.handles += {"cuMemCreate": 1, "cuMemRelease": -1}.get(name, 0)
            self.mapped += {"cuMemMap": 1, "cuMemUnmap": -1}.get(name, 0)
            if name == "cuMemGetAllocationGranularity":
                arguments[0]._obj.value = 2**21
            return 0

        return call


@pytest.mark.parametrize("refused", ["cuMemCreate", "cuMemMap", "cuMemSetAccess"])
def test_a_card_that_has_no_memory_is_left_as_it_was(refused: str) -> None:
    driver = Driver()
    addresses = CudaAddresses(driver, 0)
    driver.refused = refused
    with pytest.raises(DriverRefused, match=f"{refused}: error 2"):
        addresses.map(addresses.granule)
    assert (driver.handles, driver.mapped) == (0, 0)
    driver.refused = ""
    addresses.map(addresses.granule)
    assert (driver.handles, driver.mapped) == (0, 1)
