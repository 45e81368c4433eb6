"""The device's expert kernels: right in every format, the same bits in any company, and what lands is the record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from expertd_engine.experts.store_format import tensor_bytes
from expertd_engine.kernels.cuda import experts
from expertd_engine.kernels.cuda.experts import ACTIVATIONS, ExpertLayout, Tiles, down, experts_decode
from expertd_engine.kernels.cuda.experts_prefill import PairGroups, combine, experts_prefill
from expertd_engine.kernels.cuda.resolve import FAR, ExpertScratch
from expertd_engine.kernels.row_order import ROW_FORMATS, row_bytes
from expertd_engine.weights_plan import lay_out
from golden.tolerances import DEVICE_EXPERTS, DEVICE_EXPERTS_BF16
from support.expert_records import FORMATS, ExpertWorld, Kind
from support.interpreter import DEVICE, interpreter
from support.row_values import dequantise_rows


def at_the_third_look(monkeypatch: pytest.MonkeyPatch, bring: Callable[[], None]) -> None:
    """Have the interpreter call `bring` when a kernel uses an atomic operation for the third time."""
    looks = iter(range(3))
    look = interpreter.InterpreterBuilder.create_atomic_rmw

    def looking(*arguments: Any) -> Any:
        if next(looks, None) == 2:
            bring()
        return look(*arguments)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_atomic_rmw", looking)


every_format = pytest.mark.parametrize("format", FORMATS)


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).abs().max() / expected.abs().max())


@every_format
@pytest.mark.parametrize(("hidden", "inner", "rows"), [(40, 24, 5), (100, 33, 3)])
def test_every_format_and_shape(format: str, hidden: int, inner: int, rows: int) -> None:
    world = ExpertWorld(Kind(format, has_bias=rows == 3, hidden=hidden, inner=inner))
    x, (index, weights) = world.rows(rows, torch.float32), world.routes(rows)
    assert error(world.decode(x, index, weights), world.expected(x, index, weights)) <= DEVICE_EXPERTS.allowed


@pytest.mark.parametrize("format", [format for format in FORMATS if format != "float32"])
def test_rows_in_bfloat16(format: str) -> None:
    world = ExpertWorld(Kind(format))
    x, (index, weights) = world.rows(3, torch.bfloat16), world.routes(3)
    assert error(world.decode(x, index, weights), world.expected(x, index, weights)) <= DEVICE_EXPERTS_BF16.allowed


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("has_gate", [True, False])
def test_every_activation(activation: str, has_gate: bool) -> None:
    if activation == "swiglu_clamped" and not has_gate:
        pytest.skip("it needs a gate")
    world = ExpertWorld(Kind(activation=activation, has_gate=has_gate, has_bias=True))
    x, (index, weights) = world.rows(2, torch.float32) * 2, world.routes(2)
    assert error(world.decode(x, index, weights), world.expected(x, index, weights)) <= DEVICE_EXPERTS.allowed


@pytest.mark.parametrize(
    ("format", "dtype"), [("bfloat16", torch.bfloat16), ("int4", torch.bfloat16), ("int8", torch.float32)]
)
def test_a_rows_bits_do_not_depend_on_its_batch(format: str, dtype: torch.dtype) -> None:
    world = ExpertWorld(Kind(format))
    x, (index, weights) = world.rows(9, dtype), world.routes(9)
    together = world.decode(x, index, weights)
    for row in (0, 8):
        one = slice(row, row + 1)
        assert torch.equal(world.decode(x[one], index[one], weights[one])[0], together[row])


def test_more_rows_than_a_program_takes_at_once() -> None:
    world = ExpertWorld(Kind(experts=2, top_k=2), far=(1,), free=(0,))
    x, (index, weights) = world.rows(64, torch.float32), world.routes(64)
    assert error(world.decode(x, index, weights), world.expected(x, index, weights)) <= DEVICE_EXPERTS.allowed


@pytest.mark.parametrize(("top_k", "registers"), [(8, None), (9, 168)])
def test_rows_of_many_experts_leave_room_for_more_programs(
    top_k: int, registers: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the registers of down alone, in bfloat16 alone; results stay right."""
    cuts: list[Tiles] = []

    def noted(*arguments: Any, **options: Any) -> None:
        cuts.append(arguments[-1])
        down(*arguments, **options)

    monkeypatch.setattr(experts, "down", noted)
    for format in ("bfloat16", "int4"):
        world = ExpertWorld(Kind(format, experts=10, top_k=top_k))
        x, (index, weights) = world.rows(1, torch.float32), world.routes(1)
        assert error(world.decode(x, index, weights), world.expected(x, index, weights)) <= DEVICE_EXPERTS.allowed
    layout = ExpertWorld(Kind("bfloat16")).layout
    assert [cut.registers for cut in cuts] == [registers, None]
    assert replace(cuts[0], registers=None) == experts.decode_tiles(layout, layout.inner)
    assert experts.decode_tiles(layout, layout.hidden, top_k).registers is None


def test_rows_of_padding_are_left_alone() -> None:
    world = ExpertWorld(Kind())
    x, (index, weights) = world.rows(4, torch.float32), world.routes(4)
    out = world.decode(x, index, weights, real=2)
    assert error(out[:2], world.expected(x[:2], index[:2], weights[:2])) <= DEVICE_EXPERTS.allowed
    assert not out[2:].any()
    assert sorted({expert for expert, *_ in world.seen()}) == sorted(set(index[:2].flatten().tolist()))
    assert sum(pairs for *_, pairs in world.seen()) == 2 * world.kind.top_k


def test_a_step_without_rows() -> None:
    world = ExpertWorld(Kind())
    x, (index, weights) = world.rows(2, torch.float32), world.routes(2)
    assert not world.decode(x, index, weights, real=0).any()
    assert world.seen() == [] and int(world.table.progress) == 1


@every_format
def test_what_lands_is_the_record(format: str) -> None:
    """Read over the link once, written to a slot, resident from the next step on, with the same bits in every step."""
    world = ExpertWorld(Kind(format, has_bias=True, experts=4, top_k=4), far=(1, 2, 3), free=(3, 0))
    x, (index, weights) = world.rows(1, torch.float32), world.routes(1)
    first = world.decode(x, index, weights)
    assert world.seen() == [[0, 0, -1, 1], [1, 3, 3, 1], [2, 3, 0, 1], [3, 1, -1, 1]]
    for expert, slot in ((1, 3), (2, 0)):
        for spec in world.record.tensors:
            place = slice(spec.offset, spec.offset + tensor_bytes(spec.dtype, spec.shape, "rows"))
            record, written = world.home.bytes[expert, place], world.slots.bytes[slot, place].cpu()
            if spec.dtype in ROW_FORMATS:  # rows of padding may be left out
                meant, landed = (dequantise_rows(one.numpy(), spec.dtype, *spec.shape) for one in (record, written))
                np.testing.assert_array_equal(landed, meant)
            else:
                assert torch.equal(written, record), spec.name
    entries = world.table.entries[0, :, 0].tolist()
    assert entries[1:] == [world.slots.addresses[3], world.slots.addresses[0], world.home.addresses[3] | FAR]
    world.home.bytes[1:3] = 77  # what has landed is not read over the link again
    assert torch.equal(world.decode(x, index, weights), first)
    assert [source for _, source, _, _ in world.seen()] == [0, 0, 0, 1]


@pytest.mark.parametrize(
    ("format", "hidden", "inner", "cut"), [*((one, 40, 150, 64) for one in FORMATS), ("int8", 33, 256, 64)]
)
def test_a_part_of_an_experts_neurons(format: str, hidden: int, inner: int, cut: int) -> None:
    """Those before the cut alone: what the processor has of gate and up is not even read."""
    world = ExpertWorld(
        Kind(format, has_bias=hidden == 40, hidden=hidden, inner=inner, experts=3, top_k=2), far=(1,), free=(2,)
    )
    row = row_bytes(format, hidden)[0]
    for data, _, _ in world.layout.offsets[:2]:
        world.home.bytes[1, data + cut * row : data + inner // 16 * 16 * row] = 77
    x, weights = world.rows(2, torch.float32), world.routes(2)[1]
    index = torch.tensor([[0, 1], [1, 2]], dtype=torch.int32, device=DEVICE)
    found = world.decode(x, index, weights, cut=cut)
    assert world.seen() == [[0, 0, -1, 1], [1, 5, cut, 2], [2, 0, -1, 1]], "what is divided does not land"
    assert error(found, world.expected(x, index, weights, {1: cut})) <= DEVICE_EXPERTS.allowed


def test_the_next_layer_publishes_what_landed() -> None:
    world = ExpertWorld(Kind(), far=(0, 1, 2, 3, 4, 5, 6), free=(2,))
    index, _ = world.routes(1)
    scratch = world.scratch(1, torch.float32)
    world.resolve(index, scratch)
    landed = world.seen()[0][0]
    assert int(world.table.entries[0, landed, 0]) & FAR
    world.resolve(index, scratch, layer=1)
    assert int(world.table.entries[0, landed, 0]) == world.slots.addresses[2]
    assert int(world.table.progress) == 2


def test_a_program_waits_for_a_record_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its bytes and then `ready` come while the kernels run; nothing is read before."""
    world = ExpertWorld(Kind("int8"), far=range(7), slots=7)
    world.table.entries[0, :, 1] = torch.arange(1, 8, device=DEVICE)
    x, (index, weights) = world.rows(2, torch.float32), world.routes(2)
    scratch, out = world.scratch(2, torch.float32), torch.zeros(2, world.kind.hidden, device=DEVICE)
    world.resolve(index, scratch)
    assert {source for _, source, _, _ in world.seen()} == {2}

    complete = torch.ones(7, dtype=torch.int32)

    def bring() -> None:
        world.slots.bytes.copy_(world.home.bytes, non_blocking=True)
        world.table.ready.copy_(complete, non_blocking=True)

    if DEVICE == "cuda":
        complete = complete.pin_memory()
        world.table.ready.fill_(1)  # once without waiting: no module may be loaded while a program waits
        experts_decode(world.layout, world.table, x, weights, scratch, torch.zeros_like(out))
        world.table.ready.zero_()
        torch.cuda.synchronize()
        experts_decode(world.layout, world.table, x, weights, scratch, out)
        with torch.cuda.stream(torch.cuda.Stream()):
            bring()
    else:
        at_the_third_look(monkeypatch, bring)
        experts_decode(world.layout, world.table, x, weights, scratch, out)
    assert error(out.cpu(), world.expected(x, index, weights)) <= DEVICE_EXPERTS.allowed
    world.resolve(index, scratch)
    assert {source for _, source, _, _ in world.seen()} == {0}, "what is complete is resident, published or not"


@pytest.mark.parametrize(("format", "dtype"), [("float32", torch.float32), ("int4", torch.bfloat16)])
def test_prefill_in_any_order_of_arrival(format: str, dtype: torch.dtype) -> None:
    world = ExpertWorld(Kind(format, has_bias=True))
    x, (index, weights) = world.rows(12, dtype), world.routes(12)
    groups = PairGroups.of(index, world.kind.experts)
    addresses = torch.tensor(world.resident.addresses, device=DEVICE)
    results = []
    for parts in ([[0, 1, 2, 3, 4, 5, 6]], [[5, 3, 4], [2, 0, 6, 1]]):
        out = torch.zeros(x.shape, device=DEVICE)
        inner = torch.empty(len(groups.pairs), world.kind.inner, dtype=dtype, device=DEVICE)
        partials = torch.full((len(groups.pairs), world.kind.hidden), torch.nan, device=DEVICE)
        for part in parts:
            experts = torch.tensor(part, dtype=torch.int32, device=DEVICE)
            where = addresses[experts.long()] | FAR
            experts_prefill(world.layout, x, weights, groups, experts, where, inner, partials, rows=16)
        combine(groups, partials, out)
        results.append(out.cpu())
    assert torch.equal(*results)
    allowed = DEVICE_EXPERTS if dtype == torch.float32 else DEVICE_EXPERTS_BF16
    assert error(results[0], world.expected(x, index, weights)) <= allowed.allowed
    assert groups.count.tolist() == torch.bincount(index.flatten().cpu(), minlength=world.kind.experts).tolist()


def test_what_no_kernel_computes_is_refused() -> None:
    shapes = {"gate_proj": (32, 32), "up_proj": (32, 32), "down_proj": (32, 32)}
    with pytest.raises(ValueError, match=r"order 'strips'.*--for gpu"):
        ExpertLayout.of(lay_out(shapes, "int8"), "silu", 0.0, 0.0)
    with pytest.raises(ValueError, match="'mish' is unknown"):
        ExpertLayout.of(lay_out(shapes, "int8", "rows"), "mish", 0.0, 0.0)
    with pytest.raises(ValueError, match="2000 pairs"):
        ExpertScratch.of(hidden=8, inner=8, max_rows=500, top_k=4, num_experts=9, dtype=torch.float32, device=DEVICE)
    world = ExpertWorld(Kind())
    index, _ = world.routes(4)
    with pytest.raises(ValueError, match="4 x 3 do not fit a scratch of 3 x 3"):
        world.resolve(index, world.scratch(3, torch.float32))
