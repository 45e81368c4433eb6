"""Writes an expert store of random weights in a real model's shape: no checkpoint, and never the model in memory."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import msgspec
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from expertd_engine.bench.shapes import Cut, make_config
from expertd_engine.bench.weights import constant, random_matrix, random_rows, stored_bytes
from expertd_engine.console import Progress, silent
from expertd_engine.experts.store import ExpertStore, is_store
from expertd_engine.experts.store_format import DENSE_NAME, RECORDS_NAME, LayerEntry, QuantisedTensor, RecordLayout
from expertd_engine.families import DTYPES, build_servable_model
from expertd_engine.kernels.formats import STRIP_ROWS, Bytes
from expertd_engine.kernels.row_order import ROW_FORMATS
from expertd_engine.publish import publish
from expertd_engine.store_index import describe_store, write_index
from expertd_engine.tensor_file import TensorFileWriter, TensorShape
from expertd_engine.weights_plan import (
    LayerPlan,
    check_experts_format,
    check_format,
    compute_dtype,
    dense_format_beside,
    dense_shapes,
    plan_quantised,
    plan_records,
)

_PIECE_BYTES = 32 * 2**20


def make_model(
    shape: str,
    destination: Path,
    experts_format: str,
    dense_format: str | None = None,
    *,
    cut: Cut | None = None,
    order: str = "strips",
    one_layer: bool = False,
    seed: int = 0,
    force: bool = False,
    progress: Progress = silent,
) -> ExpertStore:
    """Write a store of `shape` (see `shapes.SHAPES`), cut down where asked, and open it.

    `dense_format` None means that of the experts. `order` is one of `store_format.ORDERS`. With `one_layer` all layers
    share the records of the first, which saves disk and the time to fill it. Equal arguments write equal bytes. `force`
    replaces an existing store. Raises UsageError for an unknown shape or format, ResourceError for a full disk.
    """
    dense_format = dense_format or dense_format_beside(experts_format)
    check_experts_format(experts_format, order)
    check_format(dense_format, "dense")
    dtype = DTYPES[compute_dtype(dense_format)]
    config = make_config(shape, cut)
    model = build_servable_model(config, dtype)
    plans, layouts = plan_records(model, experts_format, order)
    if one_layer:
        plans = [replace(plan, offset=plans[0].offset) for plan in plans]
    quantised = plan_quantised(model, dense_format)
    dense = dense_shapes(model, dtype, quantised)
    rng = np.random.Generator(np.random.SFC64(seed))
    needed = sum({plan.offset: plan.size for plan in plans}.values()) + sum(one.num_bytes for one in dense.values())
    with publish(destination, replace=force and is_store(destination), needed_bytes=needed) as folder:
        (folder / "config.json").write_text(json.dumps(config.to_dict(), indent=2), encoding="utf-8")
        make_tokenizer(config.vocab_size).save(str(folder / "tokenizer.json"))
        _write_dense(folder / DENSE_NAME, dense, quantised, rng, progress)
        entries = _write_records(folder / RECORDS_NAME, plans, rng, progress)
        names = (f"random-{shape}", f"random weights of the shape {shape}")
        index = describe_store(folder, model, *names, experts_format, dense_format, layouts, entries, quantised)
        write_index(folder, index)
    return ExpertStore.open(destination)


def make_tokenizer(vocabulary: int) -> Tokenizer:
    """Bytes as tokens, then names for the rest of the vocabulary, so that every id has a text."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())[:vocabulary]
    names = [*alphabet, *(f"<{i}>" for i in range(len(alphabet), vocabulary))]
    tokenizer = Tokenizer(models.BPE(vocab={name: i for i, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _write_dense(
    path: Path,
    shapes: Mapping[str, TensorShape],
    quantised: Mapping[str, QuantisedTensor],
    rng: np.random.Generator,
    progress: Progress,
) -> None:
    total = sum(shape.num_bytes for shape in shapes.values())
    done = 0
    with TensorFileWriter(path, shapes) as file:
        for name, shape in shapes.items():
            if name in quantised:
                pieces = _matrix(quantised[name].format, quantised[name].shape, rng)
            else:
                pieces = _plain(name, shape, rng)
            file.write(name, (torch.from_numpy(piece).view(shape.dtype) for piece in pieces))
            done += shape.num_bytes
            progress("dense weights", done / total)


def _plain(name: str, shape: TensorShape, rng: np.random.Generator) -> Iterator[Bytes]:
    """Matrices are random; norms are 1; biases, sinks and other vectors 0."""
    dtype = str(shape.dtype).removeprefix("torch.")
    if len(shape.shape) == 2:
        yield from _matrix(dtype, shape.shape, rng)
    else:
        yield constant(dtype, shape.shape[0], 1.0 if "norm" in name else 0.0)


def _matrix(dtype: str, shape: Sequence[int], rng: np.random.Generator) -> Iterator[Bytes]:
    """A random matrix in pieces of whole strips (but for the last)."""
    rows, cols = shape
    step = max(1, _PIECE_BYTES // stored_bytes(dtype, STRIP_ROWS, cols)) * STRIP_ROWS
    for first in range(0, rows, step):
        yield random_matrix(dtype, min(step, rows - first), cols, rng)


def _write_records(
    path: Path, plans: Sequence[LayerPlan], rng: np.random.Generator, progress: Progress
) -> list[LayerEntry]:
    total = sum({plan.offset: plan.size for plan in plans}.values())
    entries: list[LayerEntry] = []
    with path.open("wb") as file:
        for plan in plans:
            if plan.offset < file.tell():  # the records of a layer before
                shared = next(entry for entry in entries if entry.offset == plan.offset)
                entries.append(msgspec.structs.replace(shared, module=plan.module))
                continue
            checksums = []
            record = np.zeros(plan.layout.bytes, np.uint8)
            for _ in range(plan.num_experts):
                _fill(record, plan.layout, rng)
                file.write(record.data)
                checksums.append(zlib.crc32(record.data))
                progress("experts", file.tell() / total)
            entries.append(LayerEntry(plan.module, plan.num_experts, plan.layout_index, plan.offset, checksums))
    return entries


def _fill(record: Bytes, layout: RecordLayout, rng: np.random.Generator) -> None:
    """One random expert; its biases, and padding, stay zero."""
    for spec in layout.tensors:
        if len(spec.shape) == 2:
            rows, cols = spec.shape
            if layout.order == "rows" and spec.dtype in ROW_FORMATS:
                stored = random_rows(spec.dtype, rows, cols, rng)
            else:
                stored = random_matrix(spec.dtype, rows, cols, rng)
            record[spec.offset : spec.offset + len(stored)] = stored
