"""What stands in a store's index: made of the model and of the files that are there, and written last."""

from __future__ import annotations

import logging
from importlib.metadata import version
from pathlib import Path
from typing import Any

import msgspec
import torch
from safetensors import safe_open

from expertd_engine.experts.store import describe_file, identify
from expertd_engine.experts.store_format import (
    DENSE_NAME,
    FORMAT_VERSION,
    INDEX_NAME,
    RECORDS_NAME,
    FileEntry,
    LayerEntry,
    QuantisedTensor,
    RecordLayout,
    StoreIndex,
)
from expertd_engine.families import Config, Model, find_experts
from expertd_engine.model.router_kinds import adapt_router, check_adapter, router_kind_of
from expertd_engine.weights_plan import compute_dtype

logger = logging.getLogger(__name__)


def describe_store(
    folder: Path,
    model: Model,
    name: str,
    source: str,
    experts_format: str,
    dense_format: str,
    layouts: list[RecordLayout],
    layers: list[LayerEntry],
    quantised: dict[str, QuantisedTensor],
) -> StoreIndex:
    """The index of `folder`, where all other files are, without its identity. `source` is for people to read."""
    return StoreIndex(
        format_version=FORMAT_VERSION,
        store_id="",
        name=name,
        source=source,
        model_type=model.config.model_type,
        architecture=type(model).__name__,
        dense_dtype=compute_dtype(dense_format),
        dense_format=dense_format,
        experts_format=experts_format,
        top_k=_top_k_of(model.config),
        layouts=layouts,
        layers=layers,
        router_kind=_router_kind_as_stored(model, folder / DENSE_NAME),
        quantised=quantised,
        files=describe_files(folder),
        created_by=", ".join(f"{package} {version(package)}" for package in ("expertd", "transformers", "torch")),
    )


def write_index(folder: Path, index: StoreIndex) -> None:
    """Give `index` its identity and write it, which makes a store of `folder`: all other files are there by now."""
    (folder / INDEX_NAME).write_bytes(msgspec.json.encode(msgspec.structs.replace(index, store_id=identify(index))))


def _router_kind_as_stored(model: Model, dense: Path) -> str | None:
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


def describe_files(folder: Path) -> dict[str, FileEntry]:
    """The index's entries for all files of a store that is about to get its index."""
    return {path.name: describe_file(path, checksum=path.name != RECORDS_NAME) for path in sorted(folder.iterdir())}


def _top_k_of(config: Config) -> int:
    """Experts chosen for a token; the most of any layer where they differ."""
    top_k = config.num_experts_per_tok
    return int(max(top_k) if isinstance(top_k, list) else top_k)
