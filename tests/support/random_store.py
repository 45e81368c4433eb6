"""A small sound store of two layers whose records are random bytes, for what reads stores and needs no model."""

from __future__ import annotations

import mmap
import random
import zlib
from pathlib import Path

import msgspec

from expertd_engine.experts.events import ExpertId
from expertd_engine.experts.record_file import RecordFile
from expertd_engine.experts.store import describe_file, identify
from expertd_engine.experts.store_format import (
    ALIGNMENT,
    DENSE_NAME,
    FORMAT_VERSION,
    INDEX_NAME,
    RECORDS_NAME,
    LayerEntry,
    RecordLayout,
    StoreIndex,
)

RECORD_BYTES = (ALIGNMENT, 3 * ALIGNMENT)
"""Of the records of each layer."""
EXPERTS = 4
LAST = ExpertId(1, EXPERTS - 1)


def write_store(folder: Path) -> dict[ExpertId, bytes]:
    """A store of two layers with records of random bytes, and those bytes."""
    folder.mkdir()
    source = random.Random(0)
    experts = [ExpertId(layer, expert) for layer in range(2) for expert in range(EXPERTS)]
    records = {expert: source.randbytes(RECORD_BYTES[expert.layer]) for expert in experts}
    (folder / RECORDS_NAME).write_bytes(b"".join(records.values()))
    (folder / DENSE_NAME).write_bytes(source.randbytes(1000))
    layers = [
        LayerEntry(
            module=f"layers.{layer}.experts",
            num_experts=EXPERTS,
            layout=layer,
            offset=layer * EXPERTS * RECORD_BYTES[0],
            crc32=[zlib.crc32(records[ExpertId(layer, expert)]) for expert in range(EXPERTS)],
        )
        for layer in range(2)
    ]
    index = StoreIndex(
        format_version=FORMAT_VERSION, store_id="", name="tiny", source="made", model_type="mixtral",
        architecture="MixtralForCausalLM", dense_dtype="float32", dense_format="float32", experts_format="float32",
        top_k=2, layouts=[RecordLayout("float32", size, []) for size in RECORD_BYTES], layers=layers, router_kind=None,
        quantised={},
        files={
            DENSE_NAME: describe_file(folder / DENSE_NAME),
            RECORDS_NAME: describe_file(folder / RECORDS_NAME, checksum=False),
        },
        created_by="a test",
    )  # fmt: skip
    write_index(folder, msgspec.structs.replace(index, store_id=identify(index)))
    return records


def write_index(folder: Path, index: StoreIndex) -> None:
    """As it is, whether its identity is right or not."""
    (folder / INDEX_NAME).write_bytes(msgspec.json.encode(index))


def buffer_of(size: int) -> memoryview:
    """Page-aligned, as slots are."""
    return memoryview(mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))


def read_record(records: RecordFile, expert: ExpertId) -> bytes:
    """What the record holds, of a store as `write_store` writes it."""
    buffer = buffer_of(RECORD_BYTES[expert.layer])
    records.read_record(expert, buffer)
    return bytes(buffer)
