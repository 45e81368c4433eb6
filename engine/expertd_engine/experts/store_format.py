"""Layout of an expert store on disk. Plain data: the writer is `prepare.py`, the reader `experts/store.py`.

    STORE/
      store.json            the index, written last: a directory without it is not a store
      experts.bin           records; each begins at a multiple of 4096 bytes and is padded to one
      dense.safetensors     everything else the model has, under transformers' parameter names
      config.json, generation_config.json, tokenizer.json, tokenizer_config.json, chat_template.jinja
                            as the checkpoint has them

One record is one contiguous, aligned read that lands in a slot as the kernels read it: no parsing, no repacking.
Its tensors are the slices `parameter[e]` of the experts module's parameters, in the module's own orientation.
"""

from __future__ import annotations

import msgspec

FORMAT_VERSION = 1
INDEX_NAME = "store.json"
RECORDS_NAME = "experts.bin"
DENSE_NAME = "dense.safetensors"
ALIGNMENT = 4096
"""Bytes. Offset and length of direct reads, and slots, are multiples of it."""


class TensorSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor inside a record. `offset` is in bytes from the record's start, a multiple of 64."""

    name: str
    """Name of the experts module's parameter, such as `gate_up_proj`."""
    dtype: str
    """`float32` or `bfloat16`; other formats join by name."""
    shape: list[int]
    """Shape of one expert's slice, without the leading expert dimension."""
    offset: int


class RecordLayout(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How the bytes of one record are to be read. `format` names the kernel's layout: an open set."""

    format: str
    """`float32` or `bf16` now; `int8`, `int4`, `int4s` join."""
    bytes: int
    """Length of a record, padding included: a multiple of `ALIGNMENT`."""
    tensors: list[TensorSpec]


class LayerEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One MoE layer. Record of expert e: bytes `[offset + e × layout.bytes, + layout.bytes)` of experts.bin."""

    module: str
    """Dotted name of the experts module in the transformers model, such as `model.layers.0.mlp.experts`."""
    num_experts: int
    layout: int
    """Index into `StoreIndex.layouts`."""
    offset: int
    crc32: list[int]
    """Checksum of each record, padding included."""


class FileEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file of the store other than the index. `crc32` is None for experts.bin: its records have their own."""

    bytes: int
    crc32: int | None


class StoreIndex(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole index. `store_id` identifies the contents: sha256 over the index without it, in hex."""

    format_version: int
    store_id: str
    name: str
    """What the model is called when the user does not say."""
    source: str
    """Where the weights came from, for people to read."""
    model_type: str
    architecture: str
    """Class in transformers that builds the model."""
    dense_dtype: str
    """`float32` or `bf16`: what the model computes in."""
    experts_format: str
    top_k: int
    layouts: list[RecordLayout]
    layers: list[LayerEntry]
    """In the order the forward pass meets them."""
    router_kind: str | None
    """One of `model.router.RouterKind`, or None: exact mode without prediction only."""
    files: dict[str, FileEntry]
    created_by: str
    """`expertd X, transformers Y, torch Z`."""

    def record_bytes(self, layer: int) -> int:
        """Length in bytes of a record of MoE layer `layer`."""
        return self.layouts[self.layers[layer].layout].bytes

    def expert_bytes_total(self) -> int:
        """Bytes of all records."""
        return sum(self.record_bytes(i) * layer.num_experts for i, layer in enumerate(self.layers))
