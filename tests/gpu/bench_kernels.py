"""Times the expert kernels at the shape of Qwen3-30B-A3B on one GPU, for every cut worth trying.

    PYTHONPATH=engine python tests/gpu/bench_kernels.py [--formats bfloat16,int8] [--compilers 12] [--only decode,link]

A figure is the mean over a CUDA graph of sixteen layers with routes of their own, so that weights come from memory and
not from a cache. Compiling comes first, in several processes. GB/s are of record bytes.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import triton
from torch import Tensor

from expertd_engine.experts.store_format import RecordLayout
from expertd_engine.kernels.cuda.experts import ExpertLayout, Tiles, decode_tiles, down, experts_decode, gate_up
from expertd_engine.kernels.cuda.experts_prefill import PairGroups, combine, experts_prefill
from expertd_engine.kernels.cuda.resolve import FAR, ExpertScratch, TablePointers, resolve
from expertd_engine.kernels.row_order import ROW_FORMATS, matrix_bytes
from expertd_engine.weights_plan import lay_out

HIDDEN, INNER, EXPERTS, TOP_K, LAYERS = 2048, 768, 128, 8, 16
BATCHES = (1, 4, 16)
PREFILL_ROWS = (128, 512, 2048)
STORED = {"bfloat16": "bf16", "float32": "float32"}

DECODE = {
    "bfloat16": "16,256,2,3 16,256,2,4 32,256,2,3 32,256,2,3,168 32,256,2,4 32,256,4,4 64,256,8,4",
    "int8": "16,128,2,4 16,256,2,4 16,128,1,4 32,128,4,4 32,256,4,4 64,128,4,4 32,128,2,4 64,128,8,4 128,128,8,3",
    "int4": "16,64,2,4 16,64,2,6 16,64,1,4 16,32,2,4 16,32,2,6 32,64,4,4 64,64,4,4 32,64,2,4 32,64,2,6 32,32,2,4",
    "int4s": "32,64,4,4 64,64,4,4 64,64,8,4",
    "fp8": "16,128,2,4 32,128,4,4 64,128,4,4 64,128,8,4",
}
"""Cuts to try: outputs, span, warps, stages, and registers where they are limited."""
PREFILL = {
    "int8": "64,128,4,3 64,128,4,4 128,128,8,3",
    "int4": "64,64,4,3 64,64,4,4",
}
AT_ONCE = (32, 64)
"""Pairs of an expert that a program of prefill takes."""


@dataclass(frozen=True)
class Bench:
    """Records of one layer in device memory, and a table of sixteen layers that all point at them."""

    layout: ExpertLayout
    record: RecordLayout
    records: Tensor
    table: TablePointers

    @classmethod
    def of(cls, format: str, experts: int = EXPERTS) -> Bench:
        shapes = {"gate_proj": (INNER, HIDDEN), "up_proj": (INNER, HIDDEN), "down_proj": (HIDDEN, INNER)}
        record = lay_out(shapes, STORED.get(format, format), "rows")
        records = random_records(record, experts)
        entries = torch.zeros(LAYERS, experts, 2, dtype=torch.int64, device="cuda")
        entries[:, :, 0] = records.data_ptr() + torch.arange(experts, device="cuda") * record.bytes
        return cls(ExpertLayout.of(record, "silu", 0.0, 0.0), record, records, make_table(entries))

    def matrix_bytes(self, name: str) -> int:
        spec = next(spec for spec in self.record.tensors if spec.name == name)
        if spec.dtype in ROW_FORMATS:
            return matrix_bytes(spec.dtype, *spec.shape)
        return spec.shape[0] * spec.shape[1] * (2 if spec.dtype == "bfloat16" else 4)


def random_records(record: RecordLayout, experts: int) -> Tensor:
    records = torch.randint(0, 256, (experts, record.bytes), dtype=torch.uint8, device="cuda")
    for spec in record.tensors:
        rows, cols = spec.shape
        if spec.dtype == "bfloat16":
            values = torch.randn(experts, rows * cols, device="cuda").mul_(0.02).bfloat16()
            records[:, spec.offset : spec.offset + 2 * rows * cols] = values.view(torch.uint8)
        else:
            data = rows * cols // (2 if spec.dtype in ("int4", "int4s") else 1)
            if spec.dtype == "fp8":
                records[:, spec.offset : spec.offset + data] &= 0xBF  # no NaN
            end = spec.offset + matrix_bytes(spec.dtype, rows, cols)
            records[:, spec.offset + data : end].view(torch.float16).fill_(1e-3)
    return records


def make_table(entries: Tensor, slots: int = 64) -> TablePointers:
    def ints(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32, device="cuda")

    progress = torch.zeros(1, dtype=torch.int32).pin_memory()
    landing = torch.arange(64, dtype=torch.int32, device="cuda") % slots
    addresses = torch.zeros(slots, dtype=torch.int64, device="cuda")
    seen = ints(LAYERS, entries.shape[1], 4)
    told = seen, ints(LAYERS), progress, ints(1)
    return TablePointers(entries, addresses, ints(slots), landing, ints(1), ints(1), *told)


@dataclass(frozen=True)
class Step:
    """Routes of sixteen layers for one batch, resolved."""

    rows: int
    index: Tensor
    num_rows: Tensor
    x: Tensor
    weights: Tensor
    out: Tensor
    scratches: list[ExpertScratch]
    distinct: float

    @classmethod
    def of(cls, bench: Bench, rows: int, *, index: Tensor | None = None, landing: bool = False) -> Step:
        experts = bench.records.shape[0]
        if index is None:
            index = torch.rand(LAYERS, rows, experts, device="cuda").topk(TOP_K).indices.int()
        num_rows = torch.full((1,), rows, dtype=torch.int32, device="cuda")
        scratches = [
            ExpertScratch.of(
                hidden=HIDDEN, inner=INNER, max_rows=rows, top_k=TOP_K, num_experts=experts,
                dtype=torch.bfloat16, device="cuda",
            )
            for _ in range(LAYERS)
        ]  # fmt: skip
        for layer, scratch in enumerate(scratches):
            bench.table.head.zero_()  # each layer may have all the slots: what lands is not published
            bench.table.tail.fill_(64 if landing else 0)
            resolve(bench.table, layer, index[layer], num_rows, scratch)
            scratch.inner.normal_()
        distinct = sum(int(scratch.totals[0]) for scratch in scratches) / LAYERS
        x = torch.randn(rows, HIDDEN, device="cuda").bfloat16()
        weights = torch.rand(rows, TOP_K, device="cuda")
        return cls(rows, index, num_rows, x, weights, torch.zeros(rows, HIDDEN, device="cuda"), scratches, distinct)


def timed(launches: Callable[[], None], per: int = LAYERS) -> float:
    """Microseconds of one of the `per` launches that a graph of `launches` holds."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        launches()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            launches()
        times: list[float] = []
        for _ in range(7):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record(stream)
            graph.replay()
            end.record(stream)
            stream.synchronize()
            times.append(begin.elapsed_time(end) * 1e3 / per)
    return sorted(times)[len(times) // 2]


def attempt(launches: Callable[[], None], per: int = LAYERS) -> float:
    """As `timed`; NaN, and a line, for a cut that the card has no room for."""
    try:
        return timed(launches, per)
    except (RuntimeError, triton.TritonError) as error:
        print(f"    failed: {str(error)[:200]}", flush=True)
        return float("nan")


def cuts(known: dict[str, str], format: str) -> list[tuple[str, Tiles]]:
    return [(text, Tiles(*map(int, text.split(",")))) for text in known[format].split()]


def say(bench: Bench, *parts: object) -> None:
    print(f"{bench.layout.format:8}", *parts, flush=True)


def run_gate_up(bench: Bench, step: Step, tiles: Tiles) -> None:
    for scratch in step.scratches:
        gate_up(bench.layout, bench.table, step.x, scratch, tiles)


def run_down(bench: Bench, step: Step, tiles: Tiles) -> None:
    for scratch in step.scratches:
        down(bench.layout, bench.table, step.weights, scratch, step.out, tiles)


def run_resolve(bench: Bench, step: Step) -> None:
    for nth, scratch in enumerate(step.scratches):
        resolve(bench.table, nth, step.index[nth], step.num_rows, scratch)


def run_layers(bench: Bench, step: Step) -> None:
    for nth, scratch in enumerate(step.scratches):
        resolve(bench.table, nth, step.index[nth], step.num_rows, scratch)
        experts_decode(bench.layout, bench.table, step.x, step.weights, scratch, step.out)


def decode(bench: Bench) -> None:
    """Both kernels with every cut, and whole layers as the product cuts them."""
    steps = [Step.of(bench, rows) for rows in BATCHES]
    first = bench.matrix_bytes("gate_proj") + bench.matrix_bytes("up_proj")
    second = bench.matrix_bytes("down_proj")
    for text, tiles in cuts(DECODE, bench.layout.format):
        for name, run, size in (("gate_up", run_gate_up, first), ("down", run_down, second)):
            found = [(step, attempt(partial(run, bench, step, tiles))) for step in steps]
            shown = (f"b{s.rows} {us:7.1f} us {s.distinct * size / us / 1e3:5.0f} GB/s" for s, us in found)
            say(bench, f"{name:7} {text:12}", " | ".join(shown))
    for step in steps:
        us, routes = attempt(partial(run_layers, bench, step)), attempt(partial(run_resolve, bench, step))
        speed = step.distinct * (first + second) / us / 1e3
        say(bench, f"layer   default      b{step.rows} {us:7.1f} us {speed:5.0f} GB/s, resolve {routes:.1f} us")


def link(bench: Bench) -> None:
    """k of a lone row's eight experts in pinned memory: read in place, with and without landing in a slot."""
    size, half = bench.record.bytes, bench.records.shape[0] // 2
    host = torch.empty(half, size, dtype=torch.uint8, pin_memory=True)
    host.copy_(bench.records[:half])
    slots = torch.empty(64, size, dtype=torch.uint8, device="cuda")
    bench.table.slot_address.copy_(slots.data_ptr() + torch.arange(64, device="cuda") * size)
    bench.table.entries[:, :half, 0] = host.data_ptr() + FAR + torch.arange(half, device="cuda") * size
    own = (decode_tiles(bench.layout, HIDDEN), decode_tiles(bench.layout, INNER))
    tried = [("default", own), *((text, (cut, cut)) for text, cut in cuts(DECODE, bench.layout.format)[1:2])]
    for text, (first, second) in tried:
        for far in (1, 4):
            for lands in (False, True):
                step = Step.of(bench, 1, index=_far_routes(far, half), landing=lands)

                def run(step: Step = step, first: Tiles = first, second: Tiles = second) -> None:
                    run_gate_up(bench, step, first)
                    run_down(bench, step, second)

                us = attempt(run)
                what = "landing" if lands else "in place"
                say(bench, f"link {text:12} {far} of 8 {what:8} {us:7.1f} us {far * size / us / 1e3:5.1f} GB/s")


def _far_routes(far: int, half: int) -> Tensor:
    routes = [
        torch.cat([torch.randperm(half)[:far], half + torch.randperm(half)[: TOP_K - far]]) for _ in range(LAYERS)
    ]
    return torch.stack(routes).int().view(LAYERS, 1, TOP_K).cuda()


def prefill(bench: Bench) -> None:
    """All experts resident, many rows."""
    for rows in PREFILL_ROWS:
        given = Prompt.of(bench, rows)
        work = 6 * rows * TOP_K * HIDDEN * INNER
        for text, tiles in cuts(PREFILL, bench.layout.format):
            for at_once in AT_ONCE:
                us = attempt(partial(given.run, bench, tiles, at_once), 1)
                rate = f"{work / us / 1e6:6.1f} TFLOP/s"
                say(bench, f"prefill {rows} rows {text:12} {at_once:3} at once {us:8.1f} us {rate}")
        us = attempt(partial(combine, given.groups, given.partials, torch.zeros(rows, HIDDEN, device="cuda")), 1)
        say(bench, f"combine {rows} rows {us:8.1f} us")


@dataclass(frozen=True)
class Prompt:
    """Rows of a prompt and their routes over all experts."""

    x: Tensor
    weights: Tensor
    groups: PairGroups
    inner: Tensor
    partials: Tensor

    @classmethod
    def of(cls, bench: Bench, rows: int) -> Prompt:
        experts = bench.records.shape[0]
        return cls(
            torch.randn(rows, HIDDEN, device="cuda").bfloat16(),
            torch.rand(rows, TOP_K, device="cuda"),
            PairGroups.of(torch.rand(rows, experts, device="cuda").topk(TOP_K).indices, experts),
            torch.zeros(rows * TOP_K, INNER, device="cuda", dtype=torch.bfloat16),
            torch.zeros(rows * TOP_K, HIDDEN, device="cuda"),
        )

    def run(self, bench: Bench, tiles: Tiles, at_once: int) -> None:
        experts = torch.arange(bench.records.shape[0], dtype=torch.int32, device="cuda")
        experts_prefill(
            bench.layout, self.x, self.weights, self.groups, experts, bench.table.entries[0, :, 0].contiguous(),
            self.inner, self.partials, tiles=(tiles, tiles), rows=at_once,
        )  # fmt: skip


def compile_part(formats: list[str], part: int, parts: int) -> None:
    """Launch every part-th cut once, so that it lies in Triton's cache."""
    for format in formats:
        bench = Bench.of(format)
        step, prompt = Step.of(bench, 1), Prompt.of(bench, 128)
        launches = [
            partial(run, bench, step, tiles) for _, tiles in cuts(DECODE, format) for run in (run_gate_up, run_down)
        ]
        if format in PREFILL:
            launches += [
                partial(prompt.run, bench, tiles, rows) for _, tiles in cuts(PREFILL, format) for rows in AT_ONCE
            ]
        for launch in launches[part::parts]:
            attempt(launch, 1)
        del bench, step, prompt, launches
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--formats", default="bfloat16,int8,int4,int4s,fp8")
    parser.add_argument("--only", default="decode,link,prefill")
    parser.add_argument("--compilers", type=int, default=12)
    parser.add_argument("--part", type=int)
    options = parser.parse_args()
    formats = options.formats.split(",")
    if options.part is not None:
        compile_part(formats, options.part, options.compilers)
        return
    begin = time.monotonic()
    command = [sys.executable, __file__, "--formats", options.formats, "--compilers", str(options.compilers)]
    workers = [subprocess.Popen([*command, "--part", str(part)]) for part in range(options.compilers)]
    for worker in workers:
        worker.wait()
    print(f"{torch.cuda.get_device_name()}; compiled in {time.monotonic() - begin:.0f} s", flush=True)
    for format in formats:
        bench = Bench.of(format)
        for name, run in (("decode", decode), ("prefill", prefill), ("link", link)):
            if name in options.only and (name != "prefill" or format in PREFILL):
                run(bench)
        del bench
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
