"""Layout of an expert store on disk. Plain data: written by `prepare.py`, read by `store.py` and `record_file.py`.

    STORE/
      store.json            the index, written last: a directory without it is not a store
      experts.bin           records; each begins at a multiple of 4096 bytes and is padded to one
      dense.safetensors     everything else the model has, under transformers' parameter names
      config.json, generation_config.json, tokenizer.json, tokenizer_config.json, chat_template.jinja
                            as the checkpoint has them

One record is one contiguous, aligned read that lands in a slot as the kernels read it: no parsing, no repacking.
Its tensors are the same for every family: `gate_proj` `[I, H]` (absent where experts have no gate), `up_proj` `[I, H]`,
`down_proj` `[H, I]`, and `NAME_bias` (float32) where the family has biases; each multiplies as y = W x + bias. What the
family has as one interleaved or transposed parameter is taken apart when the store is made.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import msgspec

from expertd_engine.experts.events import ExpertId
from expertd_engine.kernels.formats import packed_bytes
from expertd_engine.kernels.row_order import matrix_bytes

FORMAT_VERSION = 2
INDEX_NAME = "store.json"
RECORDS_NAME = "experts.bin"
DENSE_NAME = "dense.safetensors"
ALIGNMENT = 4096
"""Bytes. Offset and length of direct reads, and slots, are multiples of it."""

_ITEM_BYTES = {"float32": 4, "bfloat16": 2}


TARGETS = {"cpu": "strips", "gpu": "rows"}
"""What a store is made for, as the user names it, and how its records' matrices lie: `kernels.formats` says how in
strips, `kernels.row_order` how in rows."""
ORDERS = tuple(TARGETS.values())


def tensor_bytes(dtype: str, shape: Sequence[int], order: str = "strips") -> int:
    """Bytes of a stored tensor; `dtype` as in `TensorSpec`. ValueError for a quantised one that is no matrix."""
    if dtype in _ITEM_BYTES:
        return _ITEM_BYTES[dtype] * math.prod(shape)
    rows, cols = shape
    return matrix_bytes(dtype, rows, cols) if order == "rows" else packed_bytes(dtype, rows, cols)


class TensorSpec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One tensor inside a record. `offset` is in bytes from the record's start, a multiple of 64."""

    name: str
    """`gate_proj`, `up_proj`, `down_proj`, or one of these and `_bias`."""
    dtype: str
    """`float32`, `bfloat16`, or a quantised format of `kernels.formats` or `kernels.row_order`."""
    shape: list[int]
    """In weights, padding of quantised formats left out."""
    offset: int


class QuantisedTensor(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A dense weight that lies in dense.safetensors as bytes (U8, one dimension) in a quantised format."""

    format: str
    """One of `kernels.formats.QUANTISED`."""
    shape: list[int]
    """`[N, K]` in weights, padding left out."""


class RecordLayout(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """How the bytes of one record are to be read."""

    format: str
    """What the user calls the matrices' format: `float32`, `bf16`, `int8`, `int4`, `int4s` or `fp8`."""
    bytes: int
    """Length of a record, padding included: a multiple of `ALIGNMENT`."""
    tensors: list[TensorSpec]
    order: str = "strips"
    """One of `ORDERS`: which processors can read it."""


class LayerEntry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One MoE layer. Record of expert e: bytes `[offset + e × layout.bytes, + layout.bytes)` of experts.bin."""

    module: str
    """Dotted name of the experts module in the transformers model, such as `model.layers.0.mlp.experts`."""
    num_experts: int
    layout: int
    """Index into `StoreIndex.layouts`."""
    offset: int
    crc32: list[int]
    """Checksum of each record, padding included."""
    norms: list[float] | None = None
    """Frobenius norm of each expert's matrices together, before quantisation: what virtual mode weighs them by. None in
    stores made without."""


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
    """`float32` or `bf16`: what the model computes in, and what is not quantised is stored in."""
    dense_format: str
    """Format of the dense matrices; those that are quantised stand in `quantised`, the others are `dense_dtype`."""
    experts_format: str
    top_k: int
    layouts: list[RecordLayout]
    layers: list[LayerEntry]
    """In the order the forward pass meets them."""
    router_kind: str | None
    """One of `model.router.RouterKind`, or None: exact mode without prediction only."""
    quantised: dict[str, QuantisedTensor]
    """By name in dense.safetensors: transformers' name of the weight."""
    files: dict[str, FileEntry]
    created_by: str
    """`expertd X, transformers Y, torch Z`."""

    def record_bytes(self, layer: int) -> int:
        """Length in bytes of a record of MoE layer `layer`."""
        return self.layouts[self.layers[layer].layout].bytes

    def record_offset(self, expert: ExpertId) -> int:
        """Byte in experts.bin at which the record begins, a multiple of `ALIGNMENT`."""
        return self.layers[expert.layer].offset + expert.expert * self.record_bytes(expert.layer)

    def expert_bytes_total(self) -> int:
        """Bytes of all records."""
        return sum(self.record_bytes(i) * layer.num_experts for i, layer in enumerate(self.layers))
