"""`expertd prepare`: turns a Hugging Face checkpoint into an expert store, one expert at a time. Owns the writing side.

Peak anonymous memory is that of the imports plus one expert, or one piece of a dense weight: a checkpoint larger than
memory can be prepared. The index is written last and the folder renamed into place: a killed run leaves no store.
"""

from __future__ import annotations

import argparse
import json
import logging
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
import numpy as np
import torch
from safetensors import safe_open

from expertd_engine.checkpoint import Checkpoint, copy_text_files
from expertd_engine.console import Progress, progress_bar, run_command, silent
from expertd_engine.errors import ModelError, StoreError, UsageError
from expertd_engine.experts.store import ExpertStore, describe_file, identify, is_store
from expertd_engine.experts.store_format import (
    ALIGNMENT,
    DENSE_NAME,
    FORMAT_VERSION,
    INDEX_NAME,
    RECORDS_NAME,
    FileEntry,
    LayerEntry,
    RecordLayout,
    StoreIndex,
    TensorSpec,
)
from expertd_engine.families import (
    DTYPES,
    Config,
    Model,
    build_servable_model,
    dense_dtype_plan,
    find_experts,
    load_config,
    weight_dtypes,
)
from expertd_engine.model.router_kinds import adapt_router, check_adapter, router_kind_of
from expertd_engine.publish import publish
from expertd_engine.tensor_file import TensorFileWriter, TensorShape

logger = logging.getLogger(__name__)

_TENSOR_ALIGNMENT = 64


def prepare(
    source: Path,
    destination: Path,
    experts_format: str = "bf16",
    *,
    name: str | None = None,
    described_as: str | None = None,
    force: bool = False,
    progress: Progress = silent,
) -> ExpertStore:
    """Write the store of the checkpoint folder `source` to the new folder `destination`, and open it.

    `name` is what clients call the model (default: the source folder's), `described_as` what people read of its origin.
    `force` replaces an existing store, never another folder. Raises ModelError for a family that cannot be served or an
    incomplete checkpoint, ResourceError for a full disk.
    """
    if experts_format not in DTYPES:
        raise UsageError(f"experts format {experts_format!r} is not known: allowed are {', '.join(DTYPES)}")
    dtype = DTYPES[experts_format]
    config = load_config(source)
    model = build_servable_model(config, dtype)
    checkpoint = Checkpoint(source, model, dtype)
    layers, layouts = _lay_out(model, dtype, experts_format)
    dense = {key: TensorShape(kind, tuple(model.state_dict()[key].shape)) for key, kind in _dense_types(model, dtype)}
    needed = sum(layer.size for layer in layers) + sum(shape.num_bytes for shape in dense.values())
    with publish(destination, replace=force and is_store(destination), needed_bytes=needed) as folder:
        _copy_config(source, folder)
        copy_text_files(source, folder)
        _write_dense(folder / DENSE_NAME, checkpoint, dense, progress)
        entries = _write_records(folder / RECORDS_NAME, checkpoint, layers, progress)
        index = StoreIndex(
            format_version=FORMAT_VERSION,
            store_id="",
            name=name or source.resolve().name,
            source=described_as or str(source.resolve()),
            model_type=config.model_type,
            architecture=type(model).__name__,
            dense_dtype=experts_format,
            experts_format=experts_format,
            top_k=_top_k(config),
            layouts=layouts,
            layers=entries,
            router_kind=_router_kind(model, folder / DENSE_NAME),
            files=_describe_files(folder),
            created_by=_created_by(),
        )
        (folder / INDEX_NAME).write_bytes(msgspec.json.encode(msgspec.structs.replace(index, store_id=identify(index))))
    return ExpertStore.open(destination)


@dataclass(frozen=True, slots=True)
class _Layer:
    """One MoE layer as it will lie in experts.bin."""

    module: str
    num_experts: int
    layout: RecordLayout
    layout_index: int
    offset: int

    @property
    def size(self) -> int:
        return self.num_experts * self.layout.bytes


def _lay_out(model: Model, dtype: torch.dtype, experts_format: str) -> tuple[list[_Layer], list[RecordLayout]]:
    """The layers in forward order, back to back, and the distinct layouts of their records."""
    layouts: list[RecordLayout] = []
    layers: list[_Layer] = []
    types = weight_dtypes(model, dtype)
    offset = 0
    for name, module in find_experts(model):
        layout, num_experts = _record_layout(name, module, types, experts_format)
        if layout not in layouts:
            layouts.append(layout)
        layers.append(_Layer(name, num_experts, layout, layouts.index(layout), offset))
        offset += layers[-1].size
    return layers, layouts


def _record_layout(
    name: str, module: torch.nn.Module, types: dict[str, torch.dtype], experts_format: str
) -> tuple[RecordLayout, int]:
    parameters = dict(module.named_parameters())
    counts = {parameter.shape[0] for parameter in parameters.values()}
    if len(counts) != 1 or any("." in own for own in parameters):
        raise ModelError(
            f"{name} ({type(module).__name__}) cannot be served: not all its weights are one slice an expert"
        )
    specs, end = [], 0
    for own, parameter in parameters.items():
        dtype = types[f"{name}.{own}"]
        offset = _round_up(end, _TENSOR_ALIGNMENT)
        specs.append(TensorSpec(own, _name_of(dtype), list(parameter.shape[1:]), offset))
        end = offset + parameter.shape[1:].numel() * dtype.itemsize
    return RecordLayout(experts_format, _round_up(end, ALIGNMENT), specs), counts.pop()


def _copy_config(source: Path, folder: Path) -> None:
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config.pop("quantization_config", None)  # the store's weights are plain numbers
    (folder / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")


def _write_dense(path: Path, checkpoint: Checkpoint, shapes: dict[str, TensorShape], progress: Progress) -> None:
    total = sum(shape.num_bytes for shape in shapes.values())
    done = 0
    with TensorFileWriter(path, shapes) as file:
        for name, shape in shapes.items():
            file.write(name, checkpoint.pieces(name))
            done += shape.num_bytes
            progress("dense weights", done / total)


def _write_records(path: Path, checkpoint: Checkpoint, layers: list[_Layer], progress: Progress) -> list[LayerEntry]:
    total = sum(layer.size for layer in layers)
    entries = []
    with path.open("wb") as file:
        for layer in layers:
            checksums = []
            record = np.zeros(layer.layout.bytes, np.uint8)
            for expert in range(layer.num_experts):
                checksums.append(_write_record(file, record, checkpoint, layer, expert))
                progress("experts", file.tell() / total)
            entries.append(LayerEntry(layer.module, layer.num_experts, layer.layout_index, layer.offset, checksums))
    return entries


def _write_record(
    file: BinaryIO, record: np.typing.NDArray[np.uint8], checkpoint: Checkpoint, layer: _Layer, expert: int
) -> int:
    """Fill `record` (padding stays zero) with one expert, append it to `file`, and return its checksum."""
    specs = {f"{layer.module}.{spec.name}": spec for spec in layer.layout.tensors}
    for target, tensor in checkpoint.expert(list(specs), expert).items():
        spec = specs[target]
        dtype: torch.dtype = getattr(torch, spec.dtype)
        place = torch.from_numpy(record)[spec.offset : spec.offset + tensor.numel() * dtype.itemsize]
        place.view(dtype).reshape(tensor.shape).copy_(tensor)
    file.write(record.data)
    return zlib.crc32(record.data)


def _router_kind(model: Model, dense: Path) -> str | None:
    """The routers' declared kind if adapters of it agree bit for bit with the model's own routers, else None."""
    kind = router_kind_of(model)
    if kind is None:
        return None
    generator = torch.Generator().manual_seed(0)
    with safe_open(dense, framework="pt") as file:
        for name, _ in find_experts(model):
            adapter = adapt_router(model, name)
            if adapter is None:
                return None
            _load_router(model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[0], adapter.module, file)
            if not check_adapter(adapter, generator):
                logger.warning("%s: routers do not act as %s; served in exact mode without prediction", name, kind)
                return None
    return kind.value


def _load_router(block: torch.nn.Module, prefix: str, router: torch.nn.Module, file: Any) -> None:
    """Give `router`, and what of the selection lies on `block` itself, the stored weights."""
    own = next(name for name, child in block.named_children() if child is router)
    names = [name for name in block.state_dict() if "." not in name or name.startswith(f"{own}.")]
    block.load_state_dict({name: file.get_tensor(f"{prefix}.{name}") for name in names}, strict=False, assign=True)


def _describe_files(folder: Path) -> dict[str, FileEntry]:
    return {path.name: describe_file(path, checksum=path.name != RECORDS_NAME) for path in sorted(folder.iterdir())}


def _dense_types(model: Model, dtype: torch.dtype) -> list[tuple[str, torch.dtype]]:
    return list(dense_dtype_plan(model, dtype).items())


def _top_k(config: Config) -> int:
    """Experts chosen for a token; the most of any layer where they differ."""
    top_k = config.num_experts_per_tok
    return int(max(top_k) if isinstance(top_k, list) else top_k)


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _round_up(number: int, multiple: int) -> int:
    return -(-number // multiple) * multiple


def _created_by() -> str:
    return ", ".join(f"{package} {version(package)}" for package in ("expertd", "transformers", "torch"))


def main(argv: Sequence[str] | None = None) -> int:
    """`expertd prepare`. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="expertd prepare", description="Make an expert store of a MoE checkpoint.")
    parser.add_argument("source", type=Path, help="checkpoint folder; with --verify and no DST, a store")
    parser.add_argument("destination", type=Path, nargs="?", metavar="DST", help="folder of the new store")
    parser.add_argument("--experts", choices=list(DTYPES), default="bf16", help="format of all weights (default: bf16)")
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
