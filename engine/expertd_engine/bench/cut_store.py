"""Writes a store that has the first N experts of each layer alone: what virtual mode's speed is held against."""

from __future__ import annotations

import json
import os
from pathlib import Path

import msgspec
from safetensors.torch import load_file, save_file

from expertd_engine.errors import UsageError
from expertd_engine.experts.store import ExpertStore
from expertd_engine.experts.store_format import DENSE_NAME, RECORDS_NAME, LayerEntry
from expertd_engine.store_index import describe_files, write_index

CONFIG_NAME = "config.json"
_PATH_CHOOSER = "router.head.weight"
"""Of a model of one index: the rows choose a path."""
_OTHERS = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")


def cut_store(store: ExpertStore, experts: int, folder: Path) -> ExpertStore:
    """Routers lose the rows of experts from `experts` on; records are the same file. Its answers mean nothing.

    Raises UsageError for fewer experts than a token chooses, or more than a layer has, and for a model whose layers
    choose apart before a step.
    """
    config = json.loads((store.path / CONFIG_NAME).read_text(encoding="utf-8"))
    if config.get("router_heads", 1) > 1:
        raise UsageError(
            f"{store.index.name} has no virtual mode: its router chooses in each of {config['router_heads']} heads"
        )
    fewest = min(layer.num_experts for layer in store.index.layers)
    if not store.index.top_k <= experts <= fewest:
        raise UsageError(f"{experts} experts a layer are not allowed: give {store.index.top_k} to {fewest}")
    folder.mkdir()
    for name in (RECORDS_NAME, *(name for name in _OTHERS if (store.path / name).is_file())):
        os.symlink((store.path / name).resolve(), folder / name)
    blocks = {layer.module.rpartition(".")[0]: layer.num_experts for layer in store.index.layers}
    dense = load_file(store.path / DENSE_NAME)
    for name, tensor in dense.items():
        block = next((block for block in blocks if name.startswith(f"{block}.")), None)
        if name == _PATH_CHOOSER or (block is not None and tensor.shape[0] == blocks[block]):
            dense[name] = tensor[:experts].contiguous()
    save_file(dense, folder / DENSE_NAME)
    (folder / CONFIG_NAME).write_text(json.dumps(_cut_config(config, set(blocks.values()), experts)), encoding="utf-8")
    layers = [_cut_layer(layer, experts) for layer in store.index.layers]
    index = msgspec.structs.replace(store.index, store_id="", layers=layers, files=describe_files(folder))
    write_index(folder, index)
    return ExpertStore.open(folder)


def _cut_config(config: dict[str, object], counts: set[int], experts: int) -> dict[str, object]:
    """Whatever counts experts, under the name that the family has for it."""
    counted = {name for name, value in config.items() if "expert" in name and value in counts and "_per_" not in name}
    return config | dict.fromkeys(counted, experts)


def _cut_layer(layer: LayerEntry, experts: int) -> LayerEntry:
    norms = None if layer.norms is None else layer.norms[:experts]
    return msgspec.structs.replace(layer, num_experts=experts, crc32=layer.crc32[:experts], norms=norms)
