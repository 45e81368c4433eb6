"""`expertd prepare`: turns a Hugging Face checkpoint into an expert store, one expert at a time. Owns the writing side.

Peak anonymous memory is that of the imports plus one expert, or one piece of a dense weight: a checkpoint larger than
memory can be prepared. The index is written last and the folder renamed into place: a killed run leaves no store.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from expertd_engine.checkpoint import Checkpoint, copy_text_files
from expertd_engine.console import Progress, progress_bar, run_command, silent
from expertd_engine.errors import ModelError, StoreError, UsageError
from expertd_engine.experts.store import ExpertStore, is_store
from expertd_engine.experts.store_format import DENSE_NAME, RECORDS_NAME, TARGETS, LayerEntry, QuantisedTensor
from expertd_engine.families import DTYPES, Model, build_servable_model, find_experts, load_config
from expertd_engine.kernels.formats import STRIP_ROWS, Bytes, quantise
from expertd_engine.kernels.row_order import ROW_FORMATS, quantise_rows
from expertd_engine.publish import publish
from expertd_engine.store_index import describe_store, write_index
from expertd_engine.tensor_file import TensorFileWriter, TensorShape
from expertd_engine.weights_plan import (
    EXPERT_FORMATS,
    FORMATS,
    LayerPlan,
    canonical,
    check_experts_format,
    check_format,
    compute_dtype,
    dense_format_beside,
    dense_shapes,
    plan_quantised,
    plan_records,
)

DEFAULT_FORMAT = "bf16"


def prepare(
    source: Path,
    destination: Path,
    experts_format: str = DEFAULT_FORMAT,
    dense_format: str | None = None,
    *,
    order: str = "strips",
    name: str | None = None,
    described_as: str | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> ExpertStore:
    """Write the store of the checkpoint folder `source` to the new folder `destination`, and open it.

    Formats: `weights_plan.EXPERT_FORMATS` and `FORMATS`; `dense_format` None means that of the experts (bf16 beside
    fp8). `order` is that of the records, one of `store_format.ORDERS`. `name` is what clients call the model (default:
    the source folder's), `described_as` what people read of its origin. `force` replaces an existing store, never
    another folder. Raises UsageError for a format that does not fit, ModelError for a family that cannot be served, an
    incomplete checkpoint or weights that a format cannot hold, ResourceError for a full disk.
    """
    dense_format = dense_format or dense_format_beside(experts_format)
    check_experts_format(experts_format, order)
    check_format(dense_format, "dense")
    dtype = DTYPES[compute_dtype(dense_format)]
    config = load_config(source)
    model = build_servable_model(config, dtype)
    checkpoint = Checkpoint(source, model, dtype)
    layers, layouts = plan_records(model, experts_format, order)
    quantised = plan_quantised(model, dense_format)
    dense = dense_shapes(model, dtype, quantised)
    needed = sum(layer.size for layer in layers) + sum(shape.num_bytes for shape in dense.values())
    with publish(destination, replace=force and is_store(destination), needed_bytes=needed) as folder:
        _copy_config(source, folder)
        copy_text_files(source, folder)
        _write_dense(folder / DENSE_NAME, checkpoint, dense, quantised, progress)
        entries = _write_records(folder / RECORDS_NAME, model, checkpoint, layers, progress)
        names = (name or source.resolve().name, described_as or str(source.resolve()))
        index = describe_store(folder, model, *names, experts_format, dense_format, layouts, entries, quantised)
        write_index(folder, index)
    return ExpertStore.open(destination)


def _copy_config(source: Path, folder: Path) -> None:
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)  # the store's weights are plain numbers
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _write_dense(
    path: Path,
    checkpoint: Checkpoint,
    shapes: Mapping[str, TensorShape],
    quantised: Mapping[str, QuantisedTensor],
    progress: Progress,
) -> None:
    total = sum(shape.num_bytes for shape in shapes.values())
    done = 0
    with TensorFileWriter(path, shapes) as file:
        for name, shape in shapes.items():
            pieces = checkpoint.pieces(name, row_multiple=STRIP_ROWS)
            file.write(name, _packed(name, pieces, quantised[name].format) if name in quantised else pieces)
            done += shape.num_bytes
            progress("dense weights", done / total)


def _packed(name: str, pieces: Iterable[torch.Tensor], quantised_format: str) -> Iterator[torch.Tensor]:
    """Pieces of whole strips (but for the last), quantised."""
    for piece in pieces:
        yield torch.from_numpy(_stored(name, piece, quantised_format))


def _write_records(
    path: Path, model: Model, checkpoint: Checkpoint, layers: list[LayerPlan], progress: Progress
) -> list[LayerEntry]:
    total = sum(layer.size for layer in layers)
    modules = dict(find_experts(model))
    entries = []
    with path.open("wb") as file:
        for layer in layers:
            checksums: list[int] = []
            norms: list[float] = []
            record = np.zeros(layer.layout.bytes, np.uint8)
            module = modules[layer.module]
            for expert in range(layer.num_experts):
                tensors = canonical(module, _expert(checkpoint, layer.module, module, expert))
                _fill(record, layer, tensors)
                norms.append(_norm(tensors))
                file.write(record.data)
                checksums.append(zlib.crc32(record.data))
                progress("experts", file.tell() / total)
            entries.append(
                LayerEntry(layer.module, layer.num_experts, layer.layout_index, layer.offset, checksums, norms)
            )
    return entries


def _expert(checkpoint: Checkpoint, name: str, module: torch.nn.Module, expert: int) -> dict[str, torch.Tensor]:
    """One expert's slice of each of its module's parameters."""
    own = {f"{name}.{parameter}": parameter for parameter, _ in module.named_parameters()}
    return {own[target]: tensor for target, tensor in checkpoint.expert(list(own), expert).items()}


def _fill(record: Bytes, layer: LayerPlan, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put one expert's tensors in their places; padding stays zero."""
    for spec in layer.layout.tensors:
        stored = _stored(f"{layer.module}.{spec.name}", tensors[spec.name], spec.dtype, layer.layout.order)
        record[spec.offset : spec.offset + len(stored)] = stored


def _norm(tensors: Mapping[str, torch.Tensor]) -> float:
    """Frobenius norm of an expert's matrices together, to as many digits as no order of summation changes."""
    squares = sum(float(torch.linalg.vector_norm(t, dtype=torch.float32)) ** 2 for t in tensors.values() if t.dim() > 1)
    return float(f"{math.sqrt(squares):.5g}")


def _stored(name: str, tensor: torch.Tensor, dtype: str, order: str = "strips") -> Bytes:
    """The bytes of `tensor` as `dtype`, a plain type of torch or a quantised format. ModelError if it does not fit."""
    if dtype not in ROW_FORMATS:
        plain: Bytes = tensor.to(getattr(torch, dtype)).contiguous().view(-1).view(torch.uint8).numpy()
        return plain
    try:
        to_bytes = quantise_rows if order == "rows" else quantise
        return to_bytes(tensor.float().contiguous().numpy(), dtype, threads=len(os.sched_getaffinity(0)))
    except ValueError as error:
        raise ModelError(f"{name} cannot be stored as {dtype}: {error}") from error


def main(argv: Sequence[str] | None = None) -> int:
    """`expertd prepare`. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="expertd prepare", description="Make an expert store of a MoE checkpoint.")
    parser.add_argument("source", type=Path, help="checkpoint folder; with --verify and no DST, a store")
    parser.add_argument("destination", type=Path, nargs="?", metavar="DST", help="folder of the new store")
    parser.add_argument(
        "--experts",
        choices=EXPERT_FORMATS,
        default=DEFAULT_FORMAT,
        help=f"format of experts (default: {DEFAULT_FORMAT}); fp8 goes with --for gpu",
    )
    parser.add_argument("--for", dest="target", choices=TARGETS, default="cpu", help="what computes (default: cpu)")
    parser.add_argument(
        "--dense", choices=FORMATS, help="format of all other matrices (default: as experts; bf16 with fp8)"
    )
    parser.add_argument("--name", help="what clients call the model (default: the source folder's name)")
    parser.add_argument("--verify", action="store_true", help="read the store back and compare all checksums")
    parser.add_argument("--force", action="store_true", help="replace DST if it is a store already")
    options = parser.parse_args(argv)
    return run_command(lambda: _run(options))


def _run(options: argparse.Namespace) -> None:
    with progress_bar() as progress:
        if options.destination is None:
            store = _open_to_verify(options)
        else:
            store = prepare(
                options.source,
                options.destination,
                options.experts,
                options.dense,
                order=TARGETS[options.target],
                name=options.name,
                force=options.force,
                progress=progress,
            )
        if options.verify:
            store.verify(progress)
    size = store.index.expert_bytes_total()
    print(f"{store.path}: {store.index.name}, {size} bytes of experts, store id {store.index.store_id}")


def _open_to_verify(options: argparse.Namespace) -> ExpertStore:
    if not options.verify:
        raise UsageError("expertd prepare needs SRC and DST; one folder alone goes with --verify")
    if not is_store(options.source):
        raise StoreError(f"{options.source} is not an expert store: there is nothing to verify")
    return ExpertStore.open(options.source)
