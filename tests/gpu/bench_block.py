"""Times the kernels of a decoder layer, but for its routed experts, at the shapes of Qwen3-30B-A3B on one GPU.

    PYTHONPATH=engine python tests/gpu/bench_block.py [--only dense,attention,layer] [--compilers 12]

Each figure is the mean over a CUDA graph of many launches on different weights, more than the second-level cache holds.
Compiling comes first, in several processes. Lines: what, microseconds, GB/s of weights or keys.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch

from expertd_engine.kernels.cuda import attention, block, dense, router, tiles, words
from expertd_engine.kernels.cuda.matrices import DeviceMatrix
from expertd_engine.kernels.cuda.norms import DeviceNorm
from expertd_engine.model.native_abi import NormKind, Rope, Scores

HIDDEN, HEADS, KV_HEADS, DIM, EXPERTS, TOP_K, VOCABULARY, LAYERS = 2048, 32, 4, 128, 128, 8, 151_936, 48
BLOCK_TOKENS = 16
COLD_BYTES = 200e6
MOST_COPIES = 100
BATCHES = (1, 16)
CONTEXTS = (64, 1024, 8192)
SHAPES = {"qkv": ((HEADS + 2 * KV_HEADS) * DIM, HIDDEN), "output": (HIDDEN, HEADS * DIM), "head": (VOCABULARY, HIDDEN)}
ROW_CONFIGS = [
    attention.RowsConfig(*shape)
    for shape in (
        (64, 128, 16, 16, 8),
        (32, 128, 16, 4, 4),
        (64, 64, 16, 16, 8),
        (64, 256, 32, 16, 8),
        (32, 64, 32, 8, 8),
    )
]

Launch = Callable[[int], None]
Make = Callable[[], tuple[Launch, int, float]]


@dataclass(frozen=True)
class Case:
    """`make()` gives a launch on the i-th copy of its data, how many there are, and bytes that a launch reads."""

    name: str
    make: Make


def random_matrix(format: str, rows: int, cols: int) -> DeviceMatrix:
    bits = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4, "int4s": 4}[format]
    if bits >= 16:
        data = torch.randn(rows, cols, device="cuda").mul_(0.02).to(getattr(torch, format))
        return DeviceMatrix(format, data, None, None, None, rows, cols)
    width, kind = cols * bits // 8, torch.int8 if bits == 8 else torch.uint8
    low, high = (-127, 128) if bits == 8 else (0, 256)
    data = torch.randint(low, high, (rows, width), device="cuda", dtype=kind)
    scales = torch.full((rows, cols // 32), 1e-3, device="cuda", dtype=torch.float16)
    return DeviceMatrix(format, data, scales, scales.neg() if format == "int4" else None, None, rows, cols)


def random_norm(length: int) -> DeviceNorm:
    return DeviceNorm(NormKind.RMS, torch.rand(length, device="cuda"), None, 1e-6, length)


def copies(format: str, shape: tuple[int, int]) -> list[DeviceMatrix]:
    first = random_matrix(format, *shape)
    return [first, *(random_matrix(format, *shape) for _ in range(min(MOST_COPIES, int(COLD_BYTES / first.nbytes))))]


def rows_configs(cols: int) -> Iterator[dense.RowsConfig]:
    for warps in (1, 2, 4):
        for block_n in (1, 2):
            if 32 <= block_n * cols // (32 * warps) <= 64:
                yield dense.RowsConfig(block_n, 1, warps)


def words_configs(count: int, cols: int) -> Iterator[words.WordsConfig]:
    for warps in (1, 2, 4, 8):
        for block_n in (4, 8, 16):
            if 64 <= block_n * cols // (32 * warps) <= 256:
                yield words.WordsConfig(block_n, min(count, 4), warps)


def tiles_configs(count: int) -> Iterator[tiles.TilesConfig]:
    if count <= 16:
        for shape in ((64, 128, 4, 4), (32, 128, 4, 4), (16, 256, 4, 3), (16, 128, 2, 5), (32, 256, 4, 3)):
            yield tiles.TilesConfig(shape[0], 16, *shape[1:])
    else:
        for block_n, block_m, warps, stages in ((128, 128, 8, 3), (64, 128, 4, 4), (128, 64, 4, 4)):
            yield tiles.TilesConfig(block_n, block_m, 64, warps, stages)


def dense_cases() -> Iterator[Case]:
    for what, shape in SHAPES.items():
        for count in (1, 16):
            for narrow in words_configs(count, shape[1]):
                for format in ("int8", "int4"):
                    yield Case(f"{what} {format} x{count} words {tuple(narrow)}", _words(format, shape, count, narrow))
        for rows in rows_configs(shape[1]):
            yield Case(f"{what} bfloat16 x1 rows {tuple(rows)}", _rows(shape, rows))
        for count in (16, 512) if what != "head" else (16,):
            for config in tiles_configs(count):
                yield Case(f"{what} bfloat16 x{count} tiles {tuple(config)}", _tiles("bfloat16", shape, count, config))


def _words(format: str, shape: tuple[int, int], count: int, config: words.WordsConfig) -> Make:
    def make() -> tuple[Launch, int, float]:
        matrices, x, norm = copies(format, shape), torch.randn(count, shape[1], device="cuda"), random_norm(shape[1])
        out = torch.empty(count, shape[0], device="cuda")
        used = norm if shape[1] == HIDDEN else None
        return (
            lambda i: words.product_by_words(x, matrices[i], out, used, False, 1.0, config),
            len(matrices),
            matrices[0].nbytes,
        )

    return make


def _rows(shape: tuple[int, int], config: dense.RowsConfig) -> Make:
    def make() -> tuple[Launch, int, float]:
        matrices, x, norm = copies("bfloat16", shape), torch.randn(1, shape[1], device="cuda"), random_norm(shape[1])
        out = torch.empty(1, shape[0], device="cuda")
        used = norm if shape[1] == HIDDEN else None
        return (
            lambda i: dense.product_by_rows(x, matrices[i], out, used, False, 1.0, config),
            len(matrices),
            matrices[0].nbytes,
        )

    return make


def _tiles(format: str, shape: tuple[int, int], count: int, config: tiles.TilesConfig) -> Make:
    def make() -> tuple[Launch, int, float]:
        matrices, norm = copies(format, shape), random_norm(shape[1])
        x = torch.randn(count, shape[1], device="cuda")
        x = x if count <= 16 else x.bfloat16()
        out = torch.empty(count, shape[0], device="cuda")
        used = norm if shape[1] == HIDDEN and count <= 16 else None
        return (
            lambda i: tiles.product_by_tiles(x, matrices[i], out, used, False, 1.0, config),
            len(matrices),
            matrices[0].nbytes,
        )

    return make


class Layer:
    """One decoder layer's kernels up to its routes, `layers` times with weights of their own."""

    def __init__(self, format: str, count: int, context: int, layers: int) -> None:
        self.qkv = [random_matrix(format, *SHAPES["qkv"]) for _ in range(layers)]
        self.output = [random_matrix(format, *SHAPES["output"]) for _ in range(layers)]
        self.norms = [random_norm(HIDDEN) for _ in range(layers)]
        self.routers = [
            router.RouterLayout(
                random_matrix("bfloat16", EXPERTS, HIDDEN), None, TOP_K, Scores.SOFTMAX, 0, 0, 0, True, 0.0, 1.0
            )
            for _ in range(layers)
        ]
        angles = torch.rand(16384, DIM // 2, device="cuda")
        head = random_norm(DIM)
        self.heads = block.HeadLayout(
            *(HEADS, KV_HEADS, DIM, DIM, Rope.HALVES, DIM, angles.cos(), angles.sin()),
            *(head, head, False, 0.0, DIM**-0.5),
        )
        per_row = -(-(context + 1) // BLOCK_TOKENS)
        self.pools = [
            torch.randn(2, count * per_row, BLOCK_TOKENS, KV_HEADS, DIM, device="cuda").bfloat16()
            for _ in range(max(1, min(layers, int(4e9 / (count * per_row * BLOCK_TOKENS * KV_HEADS * DIM * 4)))))
        ]
        self.tables = torch.randperm(count * per_row, device="cuda").int().view(count, per_row)
        self.row_table = torch.arange(count, device="cuda", dtype=torch.int32)
        self.positions = torch.full((count,), context, device="cuda", dtype=torch.int32)
        self.hidden = torch.randn(count, HIDDEN, device="cuda")
        self.projected = torch.empty(count, SHAPES["qkv"][0], device="cuda")
        self.query = torch.randn(count, HEADS * DIM, device="cuda")
        self.attended = torch.empty(count, HEADS * DIM, device="cuda")
        self.scratch = attention.AttentionScratch.of(count, HEADS, KV_HEADS, DIM, "cuda")
        self.logits = torch.empty(count, EXPERTS, device="cuda")
        self.index = torch.empty(count, TOP_K, device="cuda", dtype=torch.int32)
        self.weights = torch.empty(count, TOP_K, device="cuda")
        self.normed = torch.empty(count, HIDDEN, device="cuda", dtype=torch.bfloat16)
        self.done = torch.zeros(count, device="cuda", dtype=torch.int32)

    def project(self, i: int) -> None:
        dense.matmul(self.hidden, self.qkv[i], self.projected, norm=self.norms[i])

    def store(self, i: int) -> None:
        keys, values = self.pools[i % len(self.pools)]
        block.store_qkv(
            *(self.projected, self.heads, self.query, keys, values),
            *(self.positions, self.row_table, self.tables),
        )

    def attend(self, i: int, config: attention.RowsConfig | None = None) -> None:
        keys, values = self.pools[i % len(self.pools)]
        attention.attend(
            *(self.query, keys, values, self.tables, self.row_table, self.positions, self.attended, self.scratch),
            config=config,
        )

    def mix(self, i: int) -> None:
        dense.matmul(self.attended, self.output[i], self.hidden, add=True, scale=1e-3)

    def route(self, i: int) -> None:
        router.route(
            *(self.hidden, self.norms[i], self.routers[i], self.logits, self.index, self.weights, self.normed),
            self.done,
        )

    def all(self, i: int) -> None:
        for part in (self.project, self.store, self.attend, self.mix, self.route):
            part(i)


def attention_cases() -> Iterator[Case]:
    for count in BATCHES:
        for context in CONTEXTS:
            for config in ROW_CONFIGS:
                yield Case(f"attend x{count} of {context} {tuple(config)}", _attend(count, context, config))
    for part in ("store", "route"):
        for count in BATCHES:
            yield Case(f"{part} x{count}", _part(part, count, 64))
    yield Case("attend 2048 rows in tiles", _prompt())
    for count in BATCHES:
        yield Case(f"argmax x{count}", _argmax(count))


def _attend(count: int, context: int, config: attention.RowsConfig) -> Make:
    def make() -> tuple[Launch, int, float]:
        layer = Layer("int8", count, context, 16)
        return lambda i: layer.attend(i, config), 16, count * context * KV_HEADS * DIM * 4

    return make


def _part(part: str, count: int, context: int) -> Make:
    def make() -> tuple[Launch, int, float]:
        layer = Layer("int8", count, context, 16)
        return getattr(layer, part), 16, EXPERTS * HIDDEN * 2 if part == "route" else 0

    return make


def _prompt() -> Make:
    def make() -> tuple[Launch, int, float]:
        layer, count = Layer("int8", 1, 2048, 1), 2048
        cut = torch.tensor([[first, 16] for first in range(0, count, 16)], device="cuda", dtype=torch.int32)
        query, out = torch.randn(count, HEADS * DIM, device="cuda"), torch.empty(count, HEADS * DIM, device="cuda")
        positions = torch.arange(count, device="cuda", dtype=torch.int32)
        table = torch.zeros(count, device="cuda", dtype=torch.int32)
        keys, values = layer.pools[0]

        def launch(i: int) -> None:
            attention.attend(query, keys, values, layer.tables, table, positions, out, layer.scratch, tiles=cut)

        return launch, 4, 0

    return make


def _argmax(count: int) -> Make:
    def make() -> tuple[Launch, int, float]:
        logits = torch.randn(count, VOCABULARY, device="cuda")
        out, best = torch.empty(count, dtype=torch.int64, device="cuda"), block.Argmax(count, VOCABULARY, "cuda")
        return lambda i: best(logits, out), 4, logits.nbytes

    return make


def layer_cases() -> Iterator[Case]:
    for format in ("bfloat16", "int8", "int4"):
        for count in BATCHES:
            for context in CONTEXTS:
                yield Case(f"layer {format} x{count} of {context}", _layer(format, count, context))


def _layer(format: str, count: int, context: int) -> Make:
    def make() -> tuple[Launch, int, float]:
        layer = Layer(format, count, context, min(LAYERS, MOST_COPIES + 1))
        return layer.all, len(layer.qkv), layer.qkv[0].nbytes + layer.output[0].nbytes

    return make


CASES = {"dense": dense_cases, "attention": attention_cases, "layer": layer_cases}


def timed(launch: Launch, copies: int) -> float:
    """Microseconds of one launch."""
    launches = max(copies, 16 // copies * copies)
    launch(0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for i in range(launches):
            launch(i % copies)
    graph.replay()
    best = float("inf")
    for _ in range(5):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        best = min(best, begin.elapsed_time(end) * 1e3 / launches)
    return best


def compile_all(only: str, compilers: int) -> None:
    """Every case once, in parallel: what is compiled stays in Triton's cache on disk."""
    command = [sys.executable, __file__, "--only", only, "--compilers", str(compilers), "--share"]
    for process in [subprocess.Popen([*command, str(share)]) for share in range(compilers)]:
        process.wait()


def run_case(case: Case, share: bool) -> None:
    try:
        launch, count, read = case.make()
        if share:
            launch(0)
            torch.cuda.synchronize()
        else:
            spent = timed(launch, count)
            print(f"{case.name:60} {spent:9.2f} us {read / spent / 1e3:8.0f} GB/s", flush=True)
    except Exception as error:  # a case that fails does not end the table
        if not share:
            print(f"{case.name:60} {type(error).__name__}: {str(error)[:300]}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="layer,attention,dense")
    parser.add_argument("--compilers", type=int, default=12)
    parser.add_argument("--share", type=int)
    options = parser.parse_args()
    if options.share is None:
        compile_all(options.only, options.compilers)
        print(torch.cuda.get_device_name(), torch.__version__, flush=True)
    else:
        globals()["MOST_COPIES"] = 0
    cases = [case for kind in options.only.split(",") for case in CASES[kind]()]
    for case in cases if options.share is None else cases[options.share :: options.compilers]:
        run_case(case, options.share is not None)
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
