"""Whether a store's index makes sense, whoever wrote it: kernels follow its offsets and shapes without asking. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from expertd_engine.experts.store_format import (
    ALIGNMENT,
    DENSE_NAME,
    ORDERS,
    RECORDS_NAME,
    LayerEntry,
    RecordLayout,
    StoreIndex,
    TensorSpec,
    tensor_bytes,
)
from expertd_engine.kernels.formats import QUANTISED
from expertd_engine.kernels.row_order import ROW_FORMATS

TENSOR_ALIGNMENT = 64
DTYPES = {order: ("float32", "bfloat16", *kinds) for order, kinds in zip(ORDERS, (QUANTISED, ROW_FORMATS), strict=True)}
MATRICES = ("gate_proj", "up_proj", "down_proj")
LARGEST_SIDE = 2**24
"""Rows or columns of a matrix: far beyond any model, and no product of two overflows."""


def problem_of(index: StoreIndex) -> str | None:
    """What is wrong with the index first, in words for the user; None if nothing is."""
    layouts = chain.from_iterable(map(_of_layout, index.layouts))
    layers = chain.from_iterable(_of_layer(index, entry) for entry in index.layers)
    return next(chain(_of_whole(index), layouts, layers), None)


def _of_whole(index: StoreIndex) -> Iterator[str]:
    for name, file in index.files.items():
        if not name or "/" in name or "\0" in name or name in (".", ".."):
            yield f"file name {name!r} does not name a file of the store"
        if file.bytes < 0:
            yield f"file {name} has {file.bytes} bytes"
    for name in (RECORDS_NAME, DENSE_NAME):
        if name not in index.files:
            yield f"{name} is not among its files"
    if not index.layers:
        yield "it has no layer of experts"
    for name, matrix in index.quantised.items():
        if matrix.format not in QUANTISED or not _is_matrix(matrix.shape):
            yield f"weight {name} is a {matrix.format} of shape {matrix.shape}"
    if index.layers and not 1 <= index.top_k <= min(entry.num_experts for entry in index.layers):
        yield f"tokens choose {index.top_k} experts of fewer"


def _of_layout(layout: RecordLayout) -> Iterator[str]:
    if layout.bytes < ALIGNMENT or layout.bytes % ALIGNMENT:
        yield f"records of {layout.bytes} bytes: not a multiple of {ALIGNMENT}"
    if layout.order not in ORDERS:
        yield f"records lie in the order {layout.order[:64]!r}: known are {', '.join(ORDERS)}"
        return
    for tensor in layout.tensors:
        yield from _of_tensor(tensor, layout.bytes, layout.order)


def _of_tensor(tensor: TensorSpec, record_bytes: int, order: str) -> Iterator[str]:
    is_bias = tensor.name.removesuffix("_bias") in MATRICES and tensor.name.endswith("_bias")
    if tensor.name not in MATRICES and not is_bias:
        yield f"a record has a tensor {tensor.name[:64]!r}"
    elif tensor.dtype not in DTYPES[order] or not (_is_vector(tensor.shape) if is_bias else _is_matrix(tensor.shape)):
        yield f"tensor {tensor.name} is a {tensor.dtype[:64]} of shape {tensor.shape[:4]}"
    elif is_bias and tensor.dtype in ROW_FORMATS:
        yield f"tensor {tensor.name} is a {tensor.dtype}"
    elif tensor.offset < 0 or tensor.offset % TENSOR_ALIGNMENT:
        yield f"tensor {tensor.name} begins at byte {tensor.offset}: not a multiple of {TENSOR_ALIGNMENT}"
    elif tensor.offset + tensor_bytes(tensor.dtype, tensor.shape, order) > record_bytes:
        yield f"tensor {tensor.name} ends beyond its record of {record_bytes} bytes"


def _of_layer(index: StoreIndex, entry: LayerEntry) -> Iterator[str]:
    if not 0 <= entry.layout < len(index.layouts):
        yield f"{entry.module[:64]} has layout {entry.layout} of {len(index.layouts)}"
        return
    if entry.num_experts < 1 or len(entry.crc32) != entry.num_experts:
        yield f"{entry.module[:64]} has {entry.num_experts} experts and {len(entry.crc32)} checksums"
    end = entry.offset + entry.num_experts * index.layouts[entry.layout].bytes
    if entry.offset < 0 or entry.offset % ALIGNMENT or end > index.files[RECORDS_NAME].bytes:
        yield f"the records of {entry.module[:64]} lie at bytes {entry.offset} to {end} of {RECORDS_NAME}"


def _is_matrix(shape: list[int]) -> bool:
    return len(shape) == 2 and all(1 <= side <= LARGEST_SIDE for side in shape)


def _is_vector(shape: list[int]) -> bool:
    return len(shape) == 1 and 1 <= shape[0] <= LARGEST_SIDE
